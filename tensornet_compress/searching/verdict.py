"""Whether an ordering counts, and why, in words."""

from __future__ import annotations

from math import inf

from tensornet_compress.searching.control import MARGIN, SHUFFLES, needed
from tensornet_compress.searching.result import Found, Null


def accepted(
    best: Found, without: Found, gain: float, null: Null | None, cost: str, *, controlled: bool, finished: bool, exact: bool
) -> tuple[Found, str]:
    """The network of choice and the reason: an ordering counts only when it gains more than on shuffled entries (``needed``).

    ``cost`` is what ``gain`` is a ratio of: ``bytes`` or ``error``. ``controlled``: whether the control was asked for; when it
    was and could not run, no ordering counts. ``finished``: whether everything was tried. ``exact``: whether the limit is an
    error that no network of floating point cores keeps.
    """
    luck = 1.0 if null is None else null.gain
    if best.ordered and gain == inf:
        return best, "nothing in native order keeps the limit"
    if best.ordered and controlled and null is None:
        return without, f"ordering gains {gain:.3f}, but the search was stopped before its control ran: not accepted"
    if best.ordered and gain < needed(null):
        begun = f"ordering gains {gain:.3f} here and {luck:.3f} on shuffled entries, "
        if null is None or gain < MARGIN * luck or len(null.gains) >= SHUFFLES:
            return without, begun + "too little beyond it: not accepted"
        few = f"of which {len(null.gains)} of {SHUFFLES} shuffles came to their end, too few for so small a gain"
        return without, begun + few + ": not accepted; give a longer time budget"
    if best.ordered:
        beyond = "" if null is None else f", {null.gain:.3f} on shuffled entries"
        return best, f"ordering accepted: {cost} without it over {cost} with it {gain:.3f}{beyond}"
    if best.family == "dense":
        name = best.network.spec.terms[0].formats[0].name
        if exact:
            return best, f"the dense tensor in {name}: no networks are tried for an error below what single precision resolves"
        if not finished:
            return best, f"so far no network beats the dense tensor in {name}, but not everything was tried"
        return best, f"no network beats the dense tensor in {name}: no structure to use"
    return best, "no ordering lowers the total, its own price included" + ("" if finished else " (not everything was tried)")

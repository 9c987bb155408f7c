"""Whether an ordering counts, and why, in words."""

from __future__ import annotations

from tensornet_compress.searching.result import Found, Null

_MARGIN = 1.01


def accepted(
    best: Found, without: Found, gain: float, null: Null | None, cost: str, *, controlled: bool, finished: bool
) -> tuple[Found, str]:
    """The network of choice and the reason: an ordering counts only when it gains 1 % more than on shuffled entries.

    ``cost`` is what ``gain`` is a ratio of: ``bytes`` or ``error``. ``controlled``: whether the control was asked for; when it
    was and could not run, no ordering counts. ``finished``: whether everything was tried.
    """
    luck = 1.0 if null is None else null.gain
    if best.ordered and controlled and null is None and gain != float("inf"):
        return without, f"ordering gains {gain:.3f}, but the search was stopped before its control ran: not accepted"
    if best.ordered and gain < _MARGIN * luck:
        return without, f"ordering gains {gain:.3f} here and {luck:.3f} on shuffled entries, too little beyond it: not accepted"
    if best.ordered and gain == float("inf"):
        return best, "nothing in native order keeps the limit"
    if best.ordered:
        beyond = "" if null is None else f", {null.gain:.3f} on shuffled entries"
        return best, f"ordering accepted: {cost} without it over {cost} with it {gain:.3f}{beyond}"
    if best.family == "dense":
        name = best.network.spec.terms[0].formats[0].name
        if not finished:
            return best, f"so far no network beats the dense tensor in {name}, but not everything was tried"
        return best, f"no network beats the dense tensor in {name}: no structure to use"
    return best, "no ordering lowers the total, its own price included" + ("" if finished else " (not everything was tried)")

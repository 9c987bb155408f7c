"""The null control: the same search on the same entries shuffled, as often as it takes to tell a gain from luck; and whether an
ordering counts beside it, in words."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from math import exp, inf, log
from statistics import mean, stdev

import torch
from torch import Tensor

from tensornet_compress.searching.limits import Deadline
from tensornet_compress.searching.result import Found, Measured, Null

SHUFFLES = 5
MARGIN = 1.01
_FEW = 1.25
_PLAIN = 2.0
_DEVIATIONS = 4.0


def shuffles(tensor: Tensor, seed: int) -> Iterator[Tensor]:
    """The same entries in one random order after the other."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(tensor.numel(), generator=generator).to(tensor.device)
        yield tensor.reshape(-1)[order].reshape(tensor.shape)


def controlled(
    shuffled: Iterator[Tensor], search: Callable[[Tensor], Null | None], gain: float, deadline: Deadline
) -> Null | None:
    """What ``search`` wins on shuffled entries; None where it was stopped before it came to anything.

    One shuffle settles a ``gain`` that is at most its own, or twice that; others take ``SHUFFLES`` until the deadline. An
    interrupt ends the control; shuffles before it count.
    """
    nulls: list[Null] = []
    try:
        for tensor in islice(shuffled, SHUFFLES):
            if deadline.passed() or (null := search(tensor)) is None:
                break
            nulls.append(null)
            luck = max(null.gain for null in nulls)
            if not MARGIN * luck <= gain < _PLAIN * luck:
                break
    except KeyboardInterrupt:
        pass
    return joined(nulls)


def joined(nulls: Sequence[Null]) -> Null | None:
    """Several shuffles as one control: the luckiest, with the gains of all that came to their end."""
    if not nulls:
        return None
    return replace(
        max(nulls, key=lambda null: null.gain),
        gains=tuple(null.gain for null in nulls if null.finished),
        entry_gain=max(null.entry_gain for null in nulls),
        measured=sum(null.measured for null in nulls),
        finished=all(null.finished for null in nulls),
    )


def needed(null: Null | None) -> float:
    """The gain from which an ordering counts: 1 % more than the luckiest of all shuffles, and 4 standard deviations (of its
    logarithm) above their mean; 25 % more where there was time for fewer, twice as much where not one came to its end."""
    if null is None:
        return MARGIN
    if not null.gains:
        return _PLAIN * null.gain
    if len(null.gains) < SHUFFLES:
        return _FEW * null.gain
    logarithms = [log(gain) for gain in null.gains]
    if inf in logarithms:
        return inf
    return max(MARGIN * null.gain, exp(mean(logarithms) + _DEVIATIONS * stdev(logarithms)))


def accepted(measured: Measured, null: Null | None, asked: bool, finished: bool) -> tuple[Found, str]:
    """The network of choice and the reason: an ordering counts only when it gains more than on shuffled entries (``needed``).

    ``asked``: whether the control was asked for; when it was and could not run, no ordering counts. ``finished``: whether
    everything was tried.
    """
    best, without, gain, limit = measured.choice(), measured.unordered(), measured.gain(), measured.limit
    if not best.ordered:
        return best, _unordered_reason(best, finished, limit.exact)
    if gain == inf:
        return best, "nothing in native order keeps the limit"
    if asked and null is None:
        return without, f"ordering gains {gain:.3f}, but the search was stopped before its control ran: not accepted"
    luck = 1.0 if null is None else null.gain
    if gain < needed(null):
        begun = f"ordering gains {gain:.3f} here and {luck:.3f} on shuffled entries, "
        if null is None or gain < MARGIN * luck or len(null.gains) >= SHUFFLES:
            return without, begun + "too little beyond it: not accepted"
        few = f"of which {len(null.gains)} of {SHUFFLES} shuffles came to their end, too few for so small a gain"
        return without, begun + few + ": not accepted; give a longer time budget"
    beyond = "" if null is None else f", {luck:.3f} on shuffled entries"
    cost = "error" if limit.max_error is None else "bytes"
    return best, f"ordering accepted: {cost} without it over {cost} with it {gain:.3f}{beyond}"


def _unordered_reason(best: Found, finished: bool, exact: bool) -> str:
    if best.family == "sorted":
        return "sorted entries beat all else" + ("" if finished else " (not everything was tried)")
    if best.family != "dense":
        return "no ordering lowers the total, its own price included" + ("" if finished else " (not everything was tried)")
    name = best.network.spec.terms[0].formats[0].name
    if exact:
        return f"the dense tensor in {name}: no networks are tried for an error below what single precision resolves"
    if not finished:
        return f"so far no network beats the dense tensor in {name}, but not everything was tried"
    return f"no network beats the dense tensor in {name}: no structure to use"

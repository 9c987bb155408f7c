"""The null control: the same search on the same entries shuffled, as often as it takes to tell a gain from luck."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from math import exp, inf, log
from statistics import mean, stdev

import torch
from torch import Tensor

from tensornet_compress.searching.result import Null

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
    shuffled: Iterator[Tensor], search: Callable[[Tensor], Null | None], gain: float, alive: Callable[[], bool]
) -> Null | None:
    """What ``search`` wins on shuffled entries; None where it was stopped before it came to anything.

    One shuffle settles a ``gain`` that is at most its own, or twice that; others take ``SHUFFLES`` while ``alive``. An
    interrupt ends the control; shuffles before it count.
    """
    found: list[Null] = []
    try:
        for tensor in islice(shuffled, SHUFFLES):
            if not alive() or (one := search(tensor)) is None:
                break
            found.append(one)
            luck = max(null.gain for null in found)
            if not MARGIN * luck <= gain < _PLAIN * luck:
                break
    except KeyboardInterrupt:
        pass
    return joined(found)


def joined(found: Sequence[Null]) -> Null | None:
    """Several shuffles as one control: the luckiest, with the gains of all that came to their end."""
    if not found:
        return None
    luckiest = max(found, key=lambda null: null.gain)
    return replace(
        luckiest,
        gains=tuple(null.gain for null in found if null.finished),
        entry_gain=max(null.entry_gain for null in found),
        measured=sum(null.measured for null in found),
        finished=all(null.finished for null in found),
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

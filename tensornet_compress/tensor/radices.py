"""Choice of radices for one axis: factor it, pad it, or leave it whole, whichever is cheapest."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from math import log, prod

from tensornet_compress.errors import TensorNetError

_PADDING_SURCHARGE = 1.1


@dataclass(frozen=True)
class RadixChoice:
    """The chosen digits of an axis of ``size`` and why they were chosen."""

    size: int
    radices: tuple[int, ...]
    cost: float
    reason: str

    @property
    def padding(self) -> int:
        """Zeros added to the axis."""
        return prod(self.radices) - self.size


def choose_radices(size: int, parts: int, max_padding: float = 0.1) -> RadixChoice:
    """At most ``parts`` radices for an axis of ``size``, padded by at most ``max_padding`` of its length.

    The cost of a choice is ``sum(radices) * padded / size``: at equal ranks a train stores numbers in proportion to the
    sum of its mode sizes, and padding dilutes what they describe. A padded split must be 10 % cheaper than the best one
    without padding, because it also costs arithmetic. Ties go to less padding, then to the shorter list.

    Raises:
        TensorNetError: ``size`` or ``parts`` below 1, or a negative ``max_padding``.
    """
    if size < 1 or parts < 1 or max_padding < 0:
        raise TensorNetError(f"cannot split an axis of size {size} in {parts} parts with padding share {max_padding}")
    best: tuple[float, int, tuple[int, ...]] | None = None
    for padded in range(size, int(size * (1 + max_padding)) + 1):
        for count in range(1, parts + 1):
            radices = _balanced_factors(padded, count)
            if radices is None:
                continue
            surcharge = 1.0 if padded == size else _PADDING_SURCHARGE
            candidate = (surcharge * sum(radices) * padded / size, padded - size, radices)
            if best is None or candidate < best:
                best = candidate
    assert best is not None  # the axis as one whole radix is always a candidate
    cost, padding, radices = best
    whole = "left whole" if len(radices) == 1 else "split as " + "x".join(map(str, radices))
    padded_text = f" after padding by {padding}" if padding else ""
    return RadixChoice(size, radices, cost, f"{size} {whole}{padded_text}: cost {cost:.1f} against {size} unsplit")


@cache
def _balanced_factors(number: int, count: int) -> tuple[int, ...] | None:
    """The factorisation of ``number`` in exactly ``count`` factors > 1 with the least sum, descending; None if none."""
    if count == 1:
        return (number,)
    best: tuple[int, ...] | None = None
    limit = round(number ** (1 / count)) + 1
    for smallest in range(limit, 1, -1):
        if number % smallest:
            continue
        rest = _balanced_factors(number // smallest, count - 1)
        if rest is None or rest[-1] < smallest:
            continue
        candidate = (*rest, smallest)
        if best is None or sum(candidate) < sum(best):
            best = candidate
    return best


def parts_for_radix(size: int, radix: int) -> int:
    """How many digits make the radices about ``radix``."""
    return max(1, round(log(max(size, 2)) / log(radix)))

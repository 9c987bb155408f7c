"""Choice of radices for one axis: factor it, pad it, or leave it whole, whichever is cheapest."""

from __future__ import annotations

from functools import cache

from tensornet_compress.errors import TensorNetError

_PADDING_SURCHARGE = 1.1


def choose_radices(size: int, parts: int, max_padding: float = 0.1) -> tuple[int, ...]:
    """At most ``parts`` radices for an axis of ``size``, padded by at most ``max_padding`` of its length.

    The cost of a choice is ``sum(radices) * padded / size``: at equal ranks a train stores numbers in proportion to the
    sum of its mode sizes, and padding dilutes what they describe. A padded split must be 10 % cheaper than the best one
    without padding, because it also costs arithmetic. Ties go to less padding, then to the shorter list.

    Raises:
        TensorNetError: ``size`` or ``parts`` below 1, or a negative ``max_padding``.
    """
    if size < 1 or parts < 1 or max_padding < 0:
        raise TensorNetError(f"cannot split an axis of size {size} in {parts} parts with padding share {max_padding}")
    return min(
        ((1.0 if padded == size else _PADDING_SURCHARGE) * sum(radices) * padded / size, padded - size, radices)
        for padded in range(size, int(size * (1 + max_padding)) + 1)
        for count in range(1, parts + 1)
        if (radices := _balanced_factors(padded, count)) is not None
    )[2]


@cache
def _balanced_factors(number: int, count: int) -> tuple[int, ...] | None:
    """The factorisation of ``number`` in exactly ``count`` factors > 1 with the least sum, descending; None if none."""
    if count == 1:
        return (number,)
    best: tuple[int, ...] | None = None
    for smallest in range(round(number ** (1 / count)) + 1, 1, -1):
        rest = None if number % smallest else _balanced_factors(number // smallest, count - 1)
        if rest is None or rest[-1] < smallest:
            continue
        if best is None or sum(rest) + smallest < sum(best):
            best = (*rest, smallest)
    return best

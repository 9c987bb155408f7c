"""Which integer grid a peer takes for a number of bits."""

from __future__ import annotations

from tensornet_compress.bench.side import Unavailable
from tensornet_compress.bench.weight_case import SLACK

GROUPS = (128, 64, 32, 16)


def grid_for(bits: float, codes: dict[int, float], overhead: float, groups: tuple[int, ...] = GROUPS) -> tuple[int, int]:
    """(bits of a code, group) of the fullest grid within ``bits`` per weight and the slack that steps need: most bits first,
    then the smallest groups.

    ``codes``: bits of a code -> bits that its packing takes; ``overhead``: bits of scale and zero point of a group.

    Raises:
        Unavailable: even the coarsest grid takes more.
    """
    for code in sorted(codes, reverse=True):
        for group in sorted(groups):
            if codes[code] + overhead / group <= SLACK * bits:
                return code, group
    least = codes[min(codes)] + overhead / max(groups)
    raise Unavailable(f"its coarsest grid takes {least:.3g} bits per weight, asked for {bits:g}")

"""Networks that were made, drawn."""

from __future__ import annotations

from collections.abc import Sequence

from tensornet_compress.report.charts.networks import MOST_CORES, network_chart
from tensornet_compress.report.groups import Group
from tensornet_compress.report.parts import Block, Section, Text
from tensornet_compress.report.schema import Drawing, Result

_MOST = 6


def networks(result: Result, found: Sequence[Group]) -> Section | None:
    """Drawings: ours first, each picture once."""
    drawings: dict[Drawing, None] = {}
    for group in found:
        for row in group.rivals:
            drawings |= dict.fromkeys(row.drawings)
    if not drawings:
        return None
    several = [drawing for drawing in drawings if 1 < len(drawing.legs) <= MOST_CORES]
    # One plain tensor looks like any other.
    alone = [drawing for drawing in drawings if len(drawing.legs) == 1][:1]
    small = [*several, *alone]
    blocks: list[Block] = [network_chart(drawing) for drawing in small[:_MOST]]
    left = len(several) + len(alone) - len(blocks)
    left += sum(len(drawing.legs) > MOST_CORES for drawing in drawings)
    if left:
        blocks.append(Text(f"{left} more networks are in the JSON file."))
    lead = (
        "Each disc is a core, a small tensor that is stored. Thick lines are bonds, with their rank; thin stubs are the "
        "indices of the "
        "original tensor, with their sizes. One disc alone is the plain tensor."
    )
    return Section("networks", "The networks, drawn", lead, tuple(blocks))

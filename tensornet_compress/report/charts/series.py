"""The methods of a group as lines of a chart: each keeps one colour and one mark on the whole page."""

from __future__ import annotations

from dataclasses import dataclass

from tensornet_compress.report.charts.palette import MARKERS, OURS, PEERS
from tensornet_compress.report.groups import Group, usable
from tensornet_compress.report.numbers import short
from tensornet_compress.report.parts import Key
from tensornet_compress.report.schema import Row


@dataclass(frozen=True)
class Series:
    """One method at all its sizes. ``marker`` is matplotlib's, ``mark`` the same shape as a character."""

    method: str
    ours: bool
    ink: str
    marker: str
    mark: str
    rows: tuple[Row, ...]

    @property
    def key(self) -> Key:
        """Its entry in a legend."""
        return Key(self.mark, self.ink, short(self.method) + (" (ours)" if self.ours and "ours" not in self.method else ""))

    def points(self, across: str, up: str) -> list[tuple[float, float]]:
        """Finite values of two measures, by the first."""
        return sorted((row.values[across], row.values[up]) for row in self.rows if usable(row, across) and usable(row, up))


def series(group: Group) -> list[Series]:
    """One for each method: ours first."""
    methods: dict[tuple[bool, str], list[Row]] = {}
    for row in group.rivals:
        methods.setdefault((not row.ours, row.method), []).append(row)
    made = []
    count = {True: 0, False: 0}
    for peer, method in sorted(methods, key=lambda key: key[0]):
        place, inks = count[peer], PEERS if peer else OURS
        count[peer] += 1
        # A peer must not share its mark with one of ours of the same rank, since not everyone tells all colours apart.
        marker, mark = MARKERS[(place + (len(OURS) if peer else 0) + place // len(inks)) % len(MARKERS)]
        made.append(Series(method, not peer, inks[place % len(inks)], marker, mark, tuple(methods[peer, method])))
    return made

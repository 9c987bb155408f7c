"""Who is best at equal bytes, ours or a peer: the comparison that the headline and its table speak of."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import isfinite
from typing import Literal

from tensornet_compress.report.groups import Group, usable
from tensornet_compress.report.schema import Row

_SAME_SIZE = 1.01
_EVEN = 0.02
_MOST_LEVELS = 8
_DIVERGENCES = ("kl", "divergence")


@dataclass(frozen=True)
class Duel:
    """The best of ours and the best peer under one limit: ``by`` is the measure that decides, ``limit_on`` the measure that the
    limit holds for (``None``: the error allowed, as the rows' budget says)."""

    group: Group
    by: str
    limit: float
    limit_on: str | None
    ours: Row
    peer: Row

    @property
    def factor(self) -> float:
        """Peer's value over ours (or the inverse where higher is better): above 1, ours is better."""
        mine, other = self._values
        if self.group.measures[self.by].better == "higher":
            mine, other = other, mine
        if mine == other:
            return 1.0
        return other / mine if mine > 0 else float("inf")

    @property
    def winner(self) -> Literal["ours", "peer", "even"]:
        """Who wins; within two percent nobody does."""
        if isfinite(self.factor) and abs(self.factor - 1) <= _EVEN:
            return "even"
        ours, peer = self._values
        return "ours" if self._better(ours, peer) else "peer"

    @property
    def lossless(self) -> bool:
        """Whether the winner diverges by no more than the original does from itself by rounding."""
        return self.winner != "even" and min(self._values) <= self._floor

    @property
    def _floor(self) -> float:
        original = self.group.original
        divergence = original is not None and any(word in self.by for word in _DIVERGENCES)
        return abs(original.values.get(self.by, 0.0)) if original is not None and divergence else float("-inf")

    @property
    def _values(self) -> tuple[float, float]:
        """Of ours and the peer; a divergence is no less than what the original shows against itself by rounding alone."""
        return max(self.ours.values[self.by], self._floor), max(self.peer.values[self.by], self._floor)

    def _better(self, one: float, other: float) -> bool:
        measure = self.group.measures[self.by]
        return one > other if measure.better == "higher" else one < other


def duels(group: Group) -> list[Duel]:
    """The duels of a group, from the smallest limit up; empty without both ours and peers."""
    if group.size is None or not group.ours or not group.peers:
        return []
    if group.task == "search" and not any(row.budget_unit == "bytes" for row in group.ours):
        return _at_equal_error(group, group.size)
    return [] if group.quality is None else _at_equal_size(group, group.size, group.quality)


def _at_equal_error(group: Group, size: str) -> list[Duel]:
    """Fewest bytes of either side among the rows that were given the same limit."""
    found = []
    for budget in sorted({row.budget for row in group.rivals if row.budget is not None}):
        sides = [[row for row in side if row.budget == budget and usable(row, size)] for side in (group.ours, group.peers)]
        if all(sides):
            ours, peer = (min(side, key=lambda row: row.values[size]) for side in sides)
            found.append(Duel(group, size, budget, None, ours, peer))
    return found


def _at_equal_size(group: Group, size: str, quality: str) -> list[Duel]:
    """Best quality of either side among the rows that take no more than each size that was measured."""
    rows = [row for row in group.rivals if usable(row, size) and usable(row, quality)]
    found: list[Duel] = []
    for limit in _levels(row.values[size] for row in rows):
        fitting = [row for row in rows if row.values[size] <= limit]
        ours = _best(group, quality, (row for row in fitting if row.ours))
        peer = _best(group, quality, (row for row in fitting if not row.ours))
        if ours is None or peer is None or (found and (found[-1].ours, found[-1].peer) == (ours, peer)):
            continue
        found.append(Duel(group, quality, limit, size, ours, peer))
    if len(found) <= _MOST_LEVELS:
        return found
    return [found[round(place * (len(found) - 1) / (_MOST_LEVELS - 1))] for place in range(_MOST_LEVELS)]


def _levels(sizes: Iterable[float]) -> list[float]:
    """Sizes in rising order, those that are alike taken together at their largest."""
    found: list[float] = []
    for size in sorted(sizes):
        if found and size <= found[-1] * _SAME_SIZE:
            found[-1] = size
        else:
            found.append(size)
    return found


def _best(group: Group, quality: str, rows: Iterable[Row]) -> Row | None:
    best: Row | None = None
    for row in rows:
        if best is None or group.better(quality, row.values[quality], best.values[quality]):
            best = row
    return best

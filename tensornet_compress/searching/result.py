"""What a search found, and how it says so."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from tensornet_compress.searching.entry_search import EntrySort
from tensornet_compress.tensor import TensorNetwork

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Found:
    """A network that was made and measured: ``error`` is relative, in the metric of the search."""

    family: str
    network: TensorNetwork
    error: float
    ordered: bool

    @cached_property
    def nbytes(self) -> int:
        """Stored bytes, orders included."""
        return self.network.nbytes

    def describe(self) -> str:
        """One line."""
        return f"{self.family}: {self.nbytes:,} bytes, error {self.error:.3g}, {self.network.spec.describe()}"


@dataclass(frozen=True)
class Event:
    """Something the search did: at ``seconds``, ``what``, and the bytes and error that this predicted or measured."""

    seconds: float
    what: str
    nbytes: int
    error: float


@dataclass(frozen=True)
class Null:
    """The same search on the same entries shuffled: what it wins is luck. Of several shuffles the luckiest. ``gain``: bytes
    without ordering over bytes with; ``entry_gain``: of the network over the best entry sort (0: none asked for, or none within
    the limit). ``measured``: how many networks; ``finished``: whether it came to its end; ``gains``: those of all shuffles that
    did."""

    nbytes: int
    error: float
    gain: float
    family: str
    entry_gain: float = 0.0
    measured: int = 0
    finished: bool = True
    gains: tuple[float, ...] = ()


@dataclass(frozen=True)
class SearchResult:
    """``best``: the network of choice. ``found``: everything measured. ``unordered``: the best that leaves all orders native.
    ``gain``: bytes (or errors, for a byte limit) without ordering over those with; it counts only beyond ``null.gain``.
    ``entry_sort``: the best entry sort, when these were asked for and one keeps the limit."""

    best: TensorNetwork
    choice: Found
    unordered: Found
    found: tuple[Found, ...]
    gain: float
    null: Null | None
    reason: str
    limit: str
    seconds: float
    unfoldings: int
    finished: bool
    spectra: dict[str, list[float]]
    history: tuple[Event, ...] = field(repr=False)
    entry_sort: EntrySort | None = None

    @property
    def error(self) -> float:
        """Measured relative error of ``best``."""
        return self.choice.error

    @property
    def pareto(self) -> tuple[Found, ...]:
        """Measured networks that no other beats in bytes and error, by ascending bytes."""
        front: list[Found] = []
        for item in sorted(self.found, key=lambda f: (f.nbytes, f.error)):
            if not front or item.error < front[-1].error:
                front.append(item)
        return tuple(front)

    def __str__(self) -> str:
        lines = [
            f"search for {self.limit}: {self.choice.describe()}",
            f"  {self.reason}",
            f"  without any ordering: {self.unordered.describe()}",
        ]
        if self.null is not None:
            luck = f"{self.null.family}, {self.null.nbytes:,} bytes, gain {self.null.gain:.3f}, {self.null.measured} measured"
            luck += f", {len(self.null.gains)} shuffles" if len(self.null.gains) > 1 else ""
            luck += "" if self.null.finished else ", stopped before its end"
            lines.append(f"  null control (same entries shuffled): {luck}")
        if self.entry_sort is not None:
            lines.append(f"  {self.entry_sort.describe()}")
        state = "finished" if self.finished else "stopped before its end; this is the best so far"
        lines.append(f"  {len(self.found)} networks measured, {self.unfoldings} unfoldings, {self.seconds:.1f} s, {state}")
        lines += [f"  {'*' if item is self.choice else ' '} {item.describe()}" for item in self.pareto]
        return "\n".join(lines)

    def plot(self) -> Figure:
        """Pareto front, spectra before and after ordering, and the drawn network; needs matplotlib (extra ``report``)."""
        from tensornet_compress.searching.plot import draw

        return draw(self)

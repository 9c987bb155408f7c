"""Candidates: a layout, a topology and a format, with bytes and error predicted from spectra alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

from tensornet_compress.coding import IntFormat, NamedFormat, format_nbytes
from tensornet_compress.decompose import feasible_ranks, ranks_for_bytes, ranks_for_error
from tensornet_compress.errors import TensorNetError
from tensornet_compress.options.rounding import rounding_error
from tensornet_compress.searching.limits import View
from tensornet_compress.searching.store import SpectrumStore
from tensornet_compress.searching.topologies import merged, native, with_one_core_less
from tensornet_compress.tensor import FibreOrder, Layout, Tensorization, TermSpec, Topology
from tensornet_compress.tensor.spec import core_shapes

_MOST_SLACK = 1.4


@dataclass(frozen=True)
class Shape:
    """A topology over the digits of a tensor, before ranks and formats. Positions of ``topology`` are the digits of
    ``tensorization`` in native order. ``ordered``: whether the order of modes was searched or fibres were reordered."""

    family: str
    tensorization: Tensorization
    topology: Topology
    fibre_orders: tuple[FibreOrder, ...] = ()
    ordered: bool = False

    def laid_out(self) -> tuple[Layout, Topology]:
        """The same with the modes in the order in which the cores come: a layout, and a topology of its positions."""
        order = tuple(mode for legs in self.topology.legs for mode in legs)
        place = {mode: position for position, mode in enumerate(order)}
        legs = tuple(tuple(place[mode] for mode in core) for core in self.topology.legs)
        layout = self.plain if order == self.plain.mode_order else self.plain.model_copy(update={"mode_order": order})
        return layout, Topology.unchecked(legs=legs, edges=self.topology.edges)

    @cached_property
    def plain(self) -> Layout:
        """A layout whose positions are the digits in native order: cores of ``topology`` have the same sizes with it."""
        plain = _plain(self.tensorization)
        return plain if not self.fibre_orders else plain.model_copy(update={"fibre_orders": self.fibre_orders})


@lru_cache(maxsize=256)
def _plain(tensorization: Tensorization) -> Layout:
    return Layout.of(tensorization.radices, tensorization.shape)


@dataclass(frozen=True)
class Candidate:
    """A shape with ranks and the format of its cores; ``error`` is the relative error that spectra and the format predict."""

    shape: Shape
    ranks: tuple[int, ...]
    fmt: NamedFormat
    nbytes: int
    error: float

    @cached_property
    def term(self) -> TermSpec:
        """What is to be realised."""
        layout, topology = self.shape.laid_out()
        return TermSpec(layout=layout, topology=topology, ranks=self.ranks, formats=(self.fmt,) * len(topology.legs))

    def key(self) -> tuple[object, ...]:
        """Equal for two candidates of one layout that are the same network."""
        return self.shape.topology.legs, self.shape.topology.edges, self.ranks, self.fmt.name

    def signature(self) -> tuple[object, ...]:
        """Equal for one network drawn in two ways: the digits of its cores, the wider bonds by the digits on one side, and,
        as bonds of rank 1 may join any two cores, the predicted error."""
        topology = self.shape.topology
        everything = frozenset(range(len(self.shape.tensorization.modes)))
        sides = [frozenset(topology.side(bond)) for bond in range(len(topology.edges))]
        cores = frozenset(frozenset(legs) for legs in topology.legs)
        wide = {(everything - side if 0 in side else side, rank) for side, rank in zip(sides, self.ranks) if rank > 1}
        return self.fmt.name, cores, frozenset(wide), round(self.error, 7)

    def overlap_slack(self) -> float:
        """How far beyond the limit a predicted error may lie: what several bonds drop overlaps, so that the sum of their tails
        is too careful."""
        return min(_MOST_SLACK, max(1, len(self.ranks)) ** 0.25)

    def at_its_least(self, view: View, slack: float) -> bool:
        """Whether no bond could do with less at this ``slack``, were it the only one that drops anything. Then ``predicted``
        comes to the same candidate again, if that was predicted with no more slack: cheap to know where a structure is
        exact."""
        if view.limit.max_error is None:
            return False
        most = (slack * view.limit.max_error) ** 2 * view.store.energy
        side = self.shape.topology.side
        return all(rank == 1 or view.store.tails(side(bond))[rank - 1] > most for bond, rank in enumerate(self.ranks))


def predicted(shape: Shape, view: View, fmt: NamedFormat, slack: float = 1.0) -> Candidate | None:
    """The candidate of fewest bytes whose predicted error is at most the limit's (times ``slack``, when a measurement has shown
    predictions to be too careful or too bold), or that of least predicted error within the limit's bytes.

    Cores that need no bond are merged, and ranks chosen again with what that leaves; where that does not keep the limit, with
    one core less. ``None`` where nothing does but one core, which is the dense tensor and competes as such.
    """
    if view.limit.max_error is not None and (slack * view.limit.max_error) ** 2 <= 2 * rounding_error(fmt):
        return None
    topology, dims = shape.topology, view.store.dims
    while len(topology.legs) > 1:
        ranks, kept = _ranks(topology, shape.plain, view, fmt, slack)
        simpler = merged(topology, dims, ranks, _overhead(fmt))
        if simpler is topology:
            if kept:
                ordered = shape.ordered and (bool(shape.fibre_orders) or not native(topology))
                return _candidate(replace(shape, topology=topology, ordered=ordered), view.store, fmt, tuple(ranks))
            simpler = with_one_core_less(topology, dims, ranks)
        topology = simpler
    return None


def _ranks(topology: Topology, layout: Layout, view: View, fmt: NamedFormat, slack: float) -> tuple[Sequence[int], bool]:
    """Ranks of a topology, and whether these keep the limit."""
    store, max_error = view.store, view.limit.max_error
    sides = [topology.side(bond) for bond in range(len(topology.edges))]
    if max_error is None:
        try:
            wanted = ranks_for_bytes([store.spectrum(side) for side in sides], view.limit.max_bytes or 0, layout, topology, fmt)
        except TensorNetError:
            # Fewer cores have fewer scales.
            return [1] * len(sides), False
        return feasible_ranks(wanted, layout, topology), True
    allowed = (slack * max_error) ** 2 - rounding_error(fmt) * len(topology.legs)
    # Rounding of fewer cores may leave room where that of all of them does not.
    squared = (allowed if allowed > 0 else (slack * max_error) ** 2) * store.energy
    dropped = [store.tails(side) for side in sides]
    # No bond can do with less than what it needs were it the only one that drops anything.
    wanted = tuple(store.rank(side, squared) for side in sides)
    if sum(drop[rank] for drop, rank in zip(dropped, wanted)) > squared:
        wanted = ranks_for_error([store.spectrum(side) for side in sides], squared, layout, topology, dropped)
    return feasible_ranks(wanted, layout, topology), allowed > 0


def _overhead(fmt: NamedFormat) -> float:
    """What the scale and zero point of one group of integers take, in numbers: all but the byte of a single code."""
    return 8 / fmt.bits * (format_nbytes(fmt, (1,)) - 1) if isinstance(fmt, IntFormat) else 0.0


def _candidate(shape: Shape, store: SpectrumStore, fmt: NamedFormat, ranks: tuple[int, ...]) -> Candidate:
    topology, layout = shape.topology, shape.plain
    nbytes = sum(format_nbytes(fmt, core) for core in core_shapes(topology, layout.dims, ranks)) + layout.order_nbytes
    sides = [topology.side(bond) for bond in range(len(ranks))]
    dropped = sum(float(store.tails(side)[rank]) for side, rank in zip(sides, ranks)) / max(store.energy, 1e-300)
    error = (dropped + rounding_error(fmt) * len(topology.legs)) ** 0.5
    return Candidate(shape, ranks, fmt, nbytes, error)

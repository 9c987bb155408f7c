"""Candidates: a layout, a topology and a format, with bytes and error predicted from spectra alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

from torch import Tensor

from tensornet_compress.coding import IntFormat, NumberFormat, format_nbytes
from tensornet_compress.decompose import feasible_ranks, ranks_for_bytes, ranks_for_error
from tensornet_compress.errors import TensorNetError
from tensornet_compress.options.rounding import rounding_error
from tensornet_compress.searching.graphs import merged, native, with_one_core_less
from tensornet_compress.searching.store import SpectrumStore
from tensornet_compress.tensor import FibreOrder, Layout, Tensorization, TermSpec, Topology
from tensornet_compress.tensor.spec import core_shapes

_MOST_SLACK = 1.4
RanksOf = Callable[[Topology], tuple[list[int], bool]]
"""Ranks of a topology, and whether these keep the limit."""


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


@dataclass(frozen=True)
class Candidate:
    """A shape with ranks and the format of its cores; ``error`` is the relative error that spectra and the format predict."""

    shape: Shape
    ranks: tuple[int, ...]
    fmt: NumberFormat
    nbytes: int
    error: float

    @cached_property
    def term(self) -> TermSpec:
        """What is to be realised."""
        layout, topology = self.shape.laid_out()
        return TermSpec(layout=layout, topology=topology, ranks=self.ranks, formats=(self.fmt,) * len(topology.legs))

    def same(self, other: Candidate) -> bool:
        """Whether both are one network of one layout."""
        return self.key() == other.key()

    def key(self) -> tuple[object, ...]:
        """Equal for two candidates of one layout that are the same network."""
        return self.shape.topology.legs, self.shape.topology.edges, self.ranks, self.fmt.name

    def joins(self, other: Candidate) -> bool:
        """Whether this has cores of ``other`` joined, so that it is another network, which competes by itself."""
        return len(self.shape.topology.legs) < len(other.shape.topology.legs)

    def signature(self) -> tuple[object, ...]:
        """Equal for one network drawn in two ways: the digits of its cores, the wider bonds by the digits on one side, and,
        as bonds of rank 1 may join any two cores, the predicted error."""
        topology = self.shape.topology
        everything = frozenset(range(len(self.shape.tensorization.modes)))
        sides = [frozenset(topology.side(bond)) for bond in range(len(topology.edges))]
        cores = frozenset(frozenset(legs) for legs in topology.legs)
        wide = {(everything - side if 0 in side else side, rank) for side, rank in zip(sides, self.ranks) if rank > 1}
        return self.fmt.name, cores, frozenset(wide), round(self.error, 7)


@lru_cache(maxsize=256)
def _plain(tensorization: Tensorization) -> Layout:
    return Layout.of(tensorization.radices, tensorization.shape)


def for_error(shape: Shape, store: SpectrumStore, fmt: NumberFormat, max_error: float, slack: float = 1.0) -> Candidate | None:
    """The candidate of fewest bytes whose predicted error is at most ``max_error`` (times ``slack``, when a measurement has
    shown predictions to be too careful or too bold); ``None`` where rounding alone exceeds it."""
    if (slack * max_error) ** 2 <= 2 * rounding_error(fmt):
        return None

    layout = shape.plain

    def ranks(topology: Topology) -> tuple[list[int], bool]:
        allowed = (slack * max_error) ** 2 - rounding_error(fmt) * len(topology.legs)
        # Rounding of fewer cores may leave room where that of all of them does not.
        squared = (allowed if allowed > 0 else (slack * max_error) ** 2) * store.energy
        dropped = [store.tails(topology.side(bond)) for bond in range(len(topology.edges))]
        # No bond can do with less than what it needs were it the only one that drops anything.
        wanted: Sequence[int] = [store.rank(topology.side(bond), squared) for bond in range(len(topology.edges))]
        if sum(drop[rank] for drop, rank in zip(dropped, wanted)) > squared:
            wanted = ranks_for_error(_spectra(store, topology), squared, layout, topology, dropped)
        return feasible_ranks(wanted, layout, topology), allowed > 0

    return _settled(shape, store, fmt, ranks)


def at_its_least(candidate: Candidate, store: SpectrumStore, max_error: float, slack: float) -> bool:
    """Whether no bond could do with less at this ``slack``, were it the only one that drops anything. Then ``for_error`` comes
    to the same candidate again, if that was predicted with no more slack: cheap to know where a structure is exact."""
    most = (slack * max_error) ** 2 * store.energy
    bonds = enumerate(candidate.ranks)
    return all(rank == 1 or store.tails(candidate.shape.topology.side(bond))[rank - 1] > most for bond, rank in bonds)


def overlap_slack(candidate: Candidate) -> float:
    """How far beyond the limit a predicted error may lie: what several bonds drop overlaps, so that the sum of their tails is
    too careful."""
    return min(_MOST_SLACK, max(1, len(candidate.shape.topology.edges)) ** 0.25)


def for_bytes(shape: Shape, store: SpectrumStore, fmt: NumberFormat, max_bytes: int) -> Candidate | None:
    """The candidate of least predicted error within ``max_bytes``; ``None`` where none fits."""

    layout = shape.plain

    def ranks(topology: Topology) -> tuple[list[int], bool]:
        try:
            wanted = ranks_for_bytes(_spectra(store, topology), max_bytes, layout, topology, fmt)
        except TensorNetError:
            # Fewer cores have fewer scales.
            return [1] * len(topology.edges), False
        return feasible_ranks(wanted, layout, topology), True

    return _settled(shape, store, fmt, ranks)


def _settled(shape: Shape, store: SpectrumStore, fmt: NumberFormat, ranks_of: RanksOf) -> Candidate | None:
    """Choose ranks, merge cores that need no bond, and choose again with what that leaves; where that does not keep the limit,
    with one core less. ``None`` when it comes to one core, which is the dense tensor and competes as such."""
    topology = shape.topology
    while len(topology.legs) > 1:
        ranks, kept = ranks_of(topology)
        simpler = merged(topology, store.dims, ranks, _overhead(fmt))
        if simpler is topology:
            if kept:
                ordered = shape.ordered and (bool(shape.fibre_orders) or not native(topology))
                return _candidate(replace(shape, topology=topology, ordered=ordered), store, fmt, ranks)
            simpler = with_one_core_less(topology, store.dims, ranks)
        topology = simpler
    return None


def _overhead(fmt: NumberFormat) -> float:
    """What the scale and zero point of one group of integers take, in numbers."""
    if not isinstance(fmt, IntFormat):
        return 0.0
    packed = 1  # Bytes of one number.
    return 8 / fmt.bits * (format_nbytes(fmt, (1,)) - packed)


def _spectra(store: SpectrumStore, topology: Topology) -> list[Tensor]:
    return [store.spectrum(topology.side(bond)) for bond in range(len(topology.edges))]


def _candidate(shape: Shape, store: SpectrumStore, fmt: NumberFormat, ranks: Sequence[int]) -> Candidate:
    topology, layout = shape.topology, shape.plain
    chosen = tuple(ranks)
    nbytes = sum(format_nbytes(fmt, core) for core in core_shapes(topology, layout.dims, chosen)) + layout.order_nbytes
    sides = [topology.side(bond) for bond in range(len(ranks))]
    dropped = sum(float(store.tails(side)[rank]) for side, rank in zip(sides, ranks)) / max(store.energy, 1e-300)
    error = (dropped + rounding_error(fmt) * len(topology.legs)) ** 0.5
    return Candidate(shape, chosen, fmt, nbytes, error)

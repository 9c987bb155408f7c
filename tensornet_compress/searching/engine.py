"""One run of the search over one tensor: what competes, in which order, and what was found."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial, reduce
from time import perf_counter

import torch
from torch import Tensor

from tensornet_compress.coding import NumberFormat, parse_format
from tensornet_compress.decompose import ErrorFeedback, column_feedback, realise
from tensornet_compress.errors import TensorNetError
from tensornet_compress.metric import KroneckerMetric, euclidean
from tensornet_compress.options.offered import (
    SEARCH_CORE_FORMATS,
    SEARCH_DENSE_FORMATS,
    SEARCH_FAMILIES,
    SearchFamily,
    fine_digits,
    in_reach,
    peak_of,
)
from tensornet_compress.searching.candidates import (
    Candidate,
    Shape,
    at_its_least,
    for_bytes,
    for_error,
    overlap_slack,
)
from tensornet_compress.searching.descent import descended, pays
from tensornet_compress.searching.entry_search import EntrySort, entry_sorts, entry_verdict
from tensornet_compress.searching.fibres import assigned, best_split
from tensornet_compress.searching.graphs import mutual_information, numbers, train_of
from tensornet_compress.searching.limit import Limit, Ordering
from tensornet_compress.searching.products import PURE
from tensornet_compress.searching.result import Event, Found, Null, SearchResult
from tensornet_compress.searching.shapes import native_shapes, searched_shapes
from tensornet_compress.searching.starts import LARGEST_ASSIGNED, changed_orders, fibre_starts
from tensornet_compress.searching.store import SpectrumStore
from tensornet_compress.searching.verdict import accepted
from tensornet_compress.searching.zero import zero_terms
from tensornet_compress.tensor import FibreOrder, Layout, NetworkSpec, Tensorization, TensorNetwork, TermSpec, Topology

_KEPT = 3
_TRIES = 4
_SMALL = 1 << 16
_SHARED = 1.02
_COARSE = 0.03
_FEW = 1 << 18
_LOOSE = 0.93


class Search:
    """One run over one tensor."""

    def __init__(
        self,
        tensor: Tensor,
        limit: Limit,
        metric: KroneckerMetric | None,
        orderings: Sequence[Ordering],
        families: Sequence[SearchFamily],
        formats: tuple[str, ...] | None,
        deadline: float,
    ):
        self.tensor = tensor.detach()
        self.work = self.tensor if tensor.dtype == torch.float64 else self.tensor.float()
        self.limit, self.orderings, self.families, self.deadline = limit, orderings, families, deadline
        self.metric, self.given_metric = metric or euclidean(), metric
        peak = peak_of(self.work)
        self.dense_formats, self.note = in_reach(peak, [parse_format(name) for name in formats or SEARCH_DENSE_FORMATS])
        self.formats, _ = in_reach(peak, [parse_format(name) for name in formats or SEARCH_CORE_FORMATS])
        self.norm = self.metric.norm2(self._matrix(self.work))
        self.zero = not self.norm > 0 and not self.work.any()
        if not self.zero and not self.norm > 0:
            raise TensorNetError(f"the tensor's squared norm in the metric is {self.norm:.3g}; give a positive definite metric")
        self.found: list[Found] = []
        self.entry_sorts: list[EntrySort] = []
        self.history: list[Event] = []
        self.stores: list[SpectrumStore] = []
        self.spectra: dict[str, list[float]] = {}
        self.placed: dict[int, tuple[Candidate, SpectrumStore, float]] = {}
        self.started, self.stopped = perf_counter(), False

    def interrupted(self) -> bool:
        """Run; True when the user interrupted after something was found."""
        try:
            self.run()
        except KeyboardInterrupt:
            if not self.found:
                raise
            self.stopped = True
            return True
        return False

    def as_null(self) -> Null:
        """This run as the control of another."""
        luck = self.limit.best(self.found)
        gain = 1.0 if luck is None else self.gain()
        luck = luck or self.limit.nearest(self.found)
        return Null(luck.nbytes, luck.error, gain, luck.family, self.entry_gain(), len(self.found), not self.stopped)

    def alive(self) -> bool:
        """False once the time is up."""
        self.stopped = self.stopped or perf_counter() >= self.deadline
        return not self.stopped

    def run(self) -> None:
        """Dense forms, then native formats, then orders of modes, then orders of fibres."""
        self._dense()
        for family, term in zero_terms(self.work, self.families, self.formats) if self.zero else ():
            self._measure(family, self._spec(term), ordered=False)
        if self.work.numel() < 4 or self.zero or self.limit.exact:
            return
        tensorization = fine_digits(tuple(self.work.shape))
        store = self._store(tensorization, ())
        self._try_native(store, tensorization, ("svd",))
        if "mode" in self.orderings and len(store.dims) > 2:
            # Needed below anyway; first, because it finds outer products, whose other spectra then cost nothing.
            mutual_information(store, self.alive)
        self._try_native(store, tensorization)
        whole = Tensorization.native(tuple(self.work.shape))
        if tensorization.padding or (whole != tensorization and self.work.ndim > 2):
            self._try_native(self._store(whole, ()), whole)
        if "mode" in self.orderings:
            self._try_kronecker(self.work, ())
            self._search_modes(store, tensorization, ())
        if "entry" in self.orderings:
            self.entry_sorts = entry_sorts(self.work, self._error_of, self.limit.allows, self.alive)
        if "fibre" in self.orderings and self.work.ndim <= 4:
            self._search_fibres(tensorization)

    def choice(self) -> Found:
        """The best of all; ties go to native order."""
        return self.limit.required(self.found)

    def unordered(self) -> Found:
        """The best without any ordering; what comes nearest where none keeps the limit."""
        items = [item for item in self.found if not item.ordered]
        return self.limit.best(items) or self.limit.nearest(items)

    def gain(self) -> float:
        """Bytes (or error) without ordering over those with."""
        return self.limit.gain(self.unordered(), self.choice())

    def entry_sort(self) -> EntrySort | None:
        """The best entry sort, if one keeps the limit."""
        return min(self.entry_sorts, key=lambda item: self.limit.cost(item.nbytes, item.error), default=None)

    def entry_gain(self) -> float:
        """Bytes (or error) of the best network over those of the best entry sort; 0 where there is none."""
        item, best = self.entry_sort(), self.limit.best(self.found)
        return 0.0 if item is None or best is None else self.limit.ratio(best, item)

    def result(self, null: Null | None, controlled: bool, seconds: float) -> SearchResult:
        """The result, with the null control (where one was asked for) applied."""
        without, gain, cost = self.unordered(), self.gain(), "bytes" if self.limit.max_error is not None else "error"
        state = {"controlled": controlled, "finished": not self.stopped, "exact": self.limit.exact}
        best, reason = accepted(self.choice(), without, gain, null, cost, **state)
        reason += self.note
        if "entry" in self.orderings:
            reason += "; " + entry_verdict(self.entry_sort(), self.entry_gain(), 0.0 if null is None else null.entry_gain)
        return SearchResult(
            best=best.network,
            choice=best,
            unordered=without,
            found=tuple(self.found),
            gain=gain,
            null=null,
            reason=reason,
            limit=str(self.limit),
            seconds=seconds,
            unfoldings=sum(len(store) for store in self.stores),
            finished=not self.stopped,
            spectra=self.spectra,
            history=tuple(self.history),
            entry_sort=self.entry_sort(),
        )

    def _dense(self) -> None:
        layout, topology = Layout.native(tuple(self.work.shape)), Topology.one_core(self.work.ndim)
        feedback = column_feedback(self.given_metric) if self.given_metric else None
        # The largest first, which keep any error: in a metric the others take long, and may be left out once the time is up.
        for fmt in reversed(self.dense_formats):
            if self.given_metric is None or self.limit.best(self.found) is None or self.alive():
                spec = self._spec(TermSpec(layout=layout, topology=topology, ranks=(), formats=(fmt,)))
                self._measure("dense", spec, ordered=False, feedback=feedback)

    def _store(self, tensorization: Tensorization, orders: tuple[FibreOrder, ...]) -> SpectrumStore:
        ordered = reduce(lambda kept, order: order.apply(kept), orders, self.work)
        error = self.limit.max_error
        precise = ordered.numel() <= _FEW if error is None else error < _COARSE
        # What is allowed to be dropped must not be taken for rounding.
        pure = PURE if error is None else min(PURE, max((0.5 * error) ** 2, 1e-30))
        energy = self.norm if self.given_metric is None else None
        self.stores.append(SpectrumStore(tensorization.apply(ordered), precise=precise, pure=pure, energy=energy))
        return self.stores[-1]

    def _search_modes(self, store: SpectrumStore, tensorization: Tensorization, orders: tuple[FibreOrder, ...]) -> None:
        if not self.alive():
            return
        self._try(store, searched_shapes(store, tensorization, self.families, self._allowed(store), self.alive, orders))
        self._descend(store)

    def _descend(self, store: SpectrumStore) -> None:
        """Where the best so far is small, so that scales of cores matter: trees near it, by careful and by bold predictions."""
        best = self.limit.best(self.found)
        known = None if best is None else self.placed.get(id(best.network))
        if known is not None and known[1] is store and pays(known[0]) and "tree" in self.families:
            shape, fmt = known[0].shape, known[0].fmt
            near = [descended(shape, partial(self._price, store, fmt, slack), self.alive) for slack in (1.0, known[2])]
            self._try(store, near)

    def _price(self, store: SpectrumStore, fmt: NumberFormat, slack: float, shape: Shape) -> float:
        return self.limit.price(self._predict(shape, store, fmt, slack))

    def _promising(self, store: SpectrumStore) -> bool:
        """Whether reordered fibres make a train over the digits smaller, or make digits share more, than in native order."""
        if len(store.dims) < 3:
            return False
        train, allowed = train_of(range(len(store.dims))), self._allowed(store)
        if numbers(store, train, allowed) < numbers(self.stores[0], train, allowed):
            return True
        here, native = (float(mutual_information(part, self.alive).sum()) for part in (store, self.stores[0]))
        return here > _SHARED * native + 1e-3

    def _allowed(self, store: SpectrumStore) -> float:
        """The squared norm that structure is judged at: the limit, or the error that the best so far has."""
        best, error = self.limit.best(self.found), self.limit.max_error
        reached = 1.0 if best is None else best.error
        return max((0.95 * (reached if error is None else error)) ** 2, 1e-14) * store.energy

    def _try_kronecker(self, tensor: Tensor, orders: tuple[FibreOrder, ...]) -> None:
        """The cut between high and low digits that stands out most, with digits that fit it."""
        if tensor.ndim != 2 or "cut" not in self.families or not self.alive():
            return
        if (split := best_split(tensor, self.alive)) is not None:
            tensorization = Tensorization(shape=tuple(tensor.shape), radices=split)
            shape = Shape("cut", tensorization, Topology.two_cores(4, (0, 2)), orders, ordered=True)
            self._try(self._store(tensorization, orders), [shape])

    def _search_fibres(self, tensorization: Tensorization) -> None:
        for orders in fibre_starts(self.work, self.alive):
            if not self.alive():
                return
            store = self._store(tensorization, orders)
            self._try(store, native_shapes(tensorization, self.families, orders))
            if "mode" in self.orderings and self._promising(store):
                self._search_modes(store, tensorization, orders)
        if self.work.ndim == 2 and max(self.work.shape) <= LARGEST_ASSIGNED and self.alive():
            if (split := best_split(self.work, self.alive)) is None:
                return
            rows, columns = assigned(self.work, split, self.alive)
            orders = changed_orders((rows, columns))
            if orders:
                self._try_kronecker(self.work[rows][:, columns], orders)
                self._search_modes(self._store(tensorization, orders), tensorization, orders)

    def _try_native(
        self, store: SpectrumStore, tensorization: Tensorization, among: Sequence[SearchFamily] = SEARCH_FAMILIES
    ) -> None:
        """SearchFamily by family, so that no family alone would have found more than all of them together."""
        for family in (family for family in self.families if family in among):
            self._try(store, native_shapes(tensorization, (family,)))

    def _try(self, store: SpectrumStore, shapes: Iterable[Shape]) -> None:
        """Predict all shapes in all formats; make and measure the best few of those that could beat the best so far, and as
        many more as miss the limit when measured."""
        predicted: list[tuple[Candidate, float, bool]] = []
        for shape in shapes:
            for fmt in self.formats:
                candidate, slack, careful = self._expected(shape, store, fmt)
                if candidate is not None:
                    self._note(f"{shape.family} in {fmt.name}, predicted", candidate.nbytes, candidate.error)
                    predicted.append((candidate, slack, careful))
        predicted.sort(key=lambda item: self.limit.cost(item[0].nbytes, item[0].error))
        most = _KEPT if self.work.numel() > _SMALL else _KEPT + 1
        made: list[tuple[object, ...]] = []
        signatures, missed = set(), 0
        for candidate, slack, careful in predicted:
            if len(made) - missed >= most or self.limit.hopeless(candidate, self.found) or not self.alive():
                return
            if candidate.key() in made:
                continue
            made.append(candidate.key())
            if candidate.signature() not in signatures:
                signatures.add(candidate.signature())
                missed += not self._make(candidate, store, slack) and missed < most
                other = None if careful or len(made) > 1 else self._predict(candidate.shape, store, candidate.fmt, 1.0)
                if other is not None and not other.same(candidate):
                    self._make(other, store, 1.0)

    def _expected(self, shape: Shape, store: SpectrumStore, fmt: NumberFormat) -> tuple[Candidate | None, float, bool]:
        """The candidate that is likely to keep the limit, the slack that takes, and whether it is what a careful prediction,
        one without slack, comes to as well."""
        candidate = self._predict(shape, store, fmt, 1.0)
        slack = 1.0 if candidate is None or self.limit.max_error is None else overlap_slack(candidate)
        if candidate is None or slack == 1.0 or self._final(candidate, store, slack):
            return candidate, slack, True
        bold = self._predict(candidate.shape, store, fmt, slack)
        return bold or candidate, slack, bold is None

    def _predict(self, shape: Shape, store: SpectrumStore, fmt: NumberFormat, slack: float) -> Candidate | None:
        if self.limit.max_error is not None:
            return for_error(shape, store, fmt, self.limit.max_error, slack)
        return for_bytes(shape, store, fmt, self.limit.max_bytes or 0)

    def _final(self, candidate: Candidate, store: SpectrumStore, slack: float) -> bool:
        """Whether more slack than this candidate was predicted with changes nothing."""
        return self.limit.max_error is not None and at_its_least(candidate, store, self.limit.max_error, slack)

    def _make(self, candidate: Candidate, store: SpectrumStore, slack: float) -> bool:
        """Decompose and measure; where the error was predicted too high or too low, once more with other ranks. Whether any of
        these keeps the limit."""
        kept: Found | None = None
        for _ in range(_TRIES):
            found = self._measure(candidate.shape.family, self._spec(candidate.term), candidate.shape.ordered)
            self.placed[id(found.network)] = candidate, store, slack
            if self.limit.max_error is None or self.limit.max_error == 0.0:
                break
            ratio = found.error / self.limit.max_error
            if kept is not None and (ratio > 1 or found.nbytes >= kept.nbytes):
                break
            if ratio <= 1:
                kept = found
                if ratio > _LOOSE:
                    break
            slack *= min(4.0, 0.985 / ratio) if ratio > 0 else 4.0
            if ratio <= 1 and self._final(candidate, store, slack):
                break
            following = self._predict(candidate.shape, store, candidate.fmt, slack)
            if following is None or following.same(candidate) or not self.alive() or following.joins(candidate):
                break
            candidate = following
        if store.dims and "native" not in self.spectra:
            self.spectra["native"] = store.leading(range((len(store.dims) + 1) // 2))
        ranks, topology = candidate.ranks, candidate.shape.topology
        if ranks and self.limit.best(self.found) is self.found[-1]:
            widest = max(range(len(ranks)), key=ranks.__getitem__)
            self.spectra["best"] = store.leading(topology.side(widest))
        return kept is not None or self.limit.keeps(found)

    def _measure(self, family: str, spec: NetworkSpec, ordered: bool, feedback: ErrorFeedback | None = None) -> Found:
        network: TensorNetwork = realise(self.tensor, spec, self.given_metric, 1, feedback=feedback)
        error = 0.0 if self._kept_whole(network) else self._error_of(network.to_dense(self.work.dtype))
        found = Found(family, network, error, ordered)
        self.found.append(found)
        self._note(f"{family} measured", network.nbytes, error)
        return found

    def _kept_whole(self, network: TensorNetwork) -> bool:
        """Whether what is stored are the very entries of the tensor, in native order."""
        if len(network.stored) > 1 or not network.spec.terms[0].layout.is_native:
            return False
        (core,) = network.stored.values()
        return core.dtype == self.work.dtype and core.shape == self.work.shape and torch.equal(core, self.work)

    def _error_of(self, dense: Tensor) -> float:
        squared = self.metric.norm2(self._matrix(self.work - dense))
        return (squared / self.norm) ** 0.5 if self.norm else 0.0 if squared == 0.0 else float("inf")

    def _spec(self, term: TermSpec) -> NetworkSpec:
        return NetworkSpec.of(term, self.tensor.dtype)

    def _note(self, what: str, nbytes: int, error: float) -> None:
        self.history.append(Event(perf_counter() - self.started, what, nbytes, error))

    @staticmethod
    def _matrix(tensor: Tensor) -> Tensor:
        return tensor.reshape(tensor.shape[0], -1)

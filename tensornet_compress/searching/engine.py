"""One run of the search over one tensor: what competes, and in which order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import reduce
from time import perf_counter

from torch import Tensor

from tensornet_compress.coding import IntFormat, NumberFormat, parse_format
from tensornet_compress.decompose import ErrorFeedback, column_feedback
from tensornet_compress.metric import KroneckerMetric
from tensornet_compress.options.offered import (
    SEARCH_CORE_FORMATS,
    SEARCH_DENSE_FORMATS,
    SEARCH_FAMILIES,
    SearchFamily,
    fine_digits,
    in_reach,
    peak_of,
)
from tensornet_compress.searching.candidates import Shape, predicted
from tensornet_compress.searching.control import accepted
from tensornet_compress.searching.entries import entry_formats, entry_verdict
from tensornet_compress.searching.kronecker import assigned, best_split
from tensornet_compress.searching.limits import Deadline, Limit, View
from tensornet_compress.searching.result import Found, Measured, Null, SearchResult
from tensornet_compress.searching.seriation import LARGEST_ASSIGNED, changed_orders, fibre_starts
from tensornet_compress.searching.shapes import (
    descended,
    mutual_information,
    native_shapes,
    numbers,
    searched_shapes,
    train_of,
)
from tensornet_compress.searching.store import PURE, SpectrumStore
from tensornet_compress.searching.trials import Target, Trials
from tensornet_compress.tensor import FibreOrder, Layout, Tensorization, TermSpec, Topology

_SHARED = 1.02
_COARSE = 0.03
_FEW = 1 << 18
_DESCENDED_NBYTES = 2048
_CODING = 0.2
"""Share of the time that entropy-coded cores have for themselves, which come last and often win."""
Orders = tuple[FibreOrder, ...]


class Search:
    """One run over one tensor."""

    def __init__(
        self,
        tensor: Tensor,
        limit: Limit,
        metric: KroneckerMetric | None,
        orderings: Sequence[str],
        families: Sequence[SearchFamily],
        formats: tuple[str, ...] | None,
        deadline: float,
    ):
        now = perf_counter()
        self.target, self.measured = Target(tensor, metric), Measured(limit)
        self.deadline, self.coding_deadline = Deadline(now + (1 - _CODING) * (deadline - now)), Deadline(deadline)
        self.work, self.limit, self.orderings, self.families = self.target.work, limit, orderings, families
        peak = peak_of(self.work)
        # Entropy-coded integers have no scales that could be out of reach, and come last: a step for the best layouts.
        self.coded = formats is None or "ec" in formats
        formats = (formats and tuple(name for name in formats if name != "ec")) or None
        self.dense_formats, self.note = in_reach(peak, [parse_format(name) for name in formats or SEARCH_DENSE_FORMATS])
        core_formats, _ = in_reach(peak, [parse_format(name) for name in formats or SEARCH_CORE_FORMATS])
        self.trials = Trials(self.target, self.measured, core_formats)
        self.views: list[View] = []

    @property
    def finished(self) -> bool:
        """Whether the time sufficed for all that there was to try."""
        return not (self.deadline.stopped or self.coding_deadline.stopped)

    def interrupted(self) -> bool:
        """Run; True when the user interrupted after something was found."""
        try:
            self.run()
            if self.coded and not self.target.zero:
                self.trials.try_coded(self.coding_deadline)
        except KeyboardInterrupt:
            if not self.measured.networks:
                raise
            self.deadline.stopped = True
            return True
        return False

    def run(self) -> None:
        """Dense forms, then native formats, then orders of modes, then orders of fibres."""
        self._dense()
        if self.target.zero:
            self._zeros()
        if self.work.numel() < 4 or self.target.zero or self.limit.exact:
            return
        tensorization = fine_digits(tuple(self.work.shape))
        view = self._view(tensorization)
        self._try_native(view, tensorization, ("svd",))
        if "mode" in self.orderings and len(view.store.dims) > 2:
            # Needed below anyway; first, because it finds outer products, whose other spectra then cost nothing.
            mutual_information(view)
        self._try_native(view, tensorization, SEARCH_FAMILIES)
        whole = Tensorization.native(tuple(self.work.shape))
        if tensorization.padding or (whole != tensorization and self.work.ndim > 2):
            self._try_native(self._view(whole), whole, SEARCH_FAMILIES)
        if "mode" in self.orderings:
            self._try_kronecker(self.work, ())
            self._search_modes(view, tensorization, ())
        if "entry" in self.orderings:
            for fmt in entry_formats(self.work, self.target.error_of, self.limit, self.deadline):
                self._one_core("sorted", fmt)
        if "fibre" in self.orderings and self.work.ndim <= 4:
            self._search_fibres(tensorization)

    def _dense(self) -> None:
        metric = self.target.metric
        feedback = None if metric is None else column_feedback(metric)
        # The largest first, which keep any error: in a metric the others take long, and may be left out once the time is up.
        for fmt in reversed(self.dense_formats):
            if metric is None or self.measured.best() is None or not self.deadline.passed():
                self._one_core("dense", fmt, feedback)

    def _one_core(self, family: str, fmt: NumberFormat, feedback: ErrorFeedback | None = None) -> None:
        layout, topology = Layout.native(tuple(self.work.shape)), Topology.one_core(self.work.ndim)
        term = TermSpec(layout=layout, topology=topology, ranks=(), formats=(fmt,))
        self.trials.measure(family, term, ordered=False, feedback=feedback)

    def _zeros(self) -> None:
        """One rank stands for all entries: every native form of the whole axes, in every format."""
        for shape in native_shapes(Tensorization.native(tuple(self.work.shape)), self.families):
            layout, topology = shape.laid_out()
            for fmt in self.trials.formats:
                ranks, kinds = (1,) * len(topology.edges), (fmt,) * len(topology.legs)
                term = TermSpec(layout=layout, topology=topology, ranks=ranks, formats=kinds)
                self.trials.measure(shape.family, term, ordered=False)

    def _view(self, tensorization: Tensorization, orders: Orders = ()) -> View:
        ordered = reduce(lambda kept, order: order.apply(kept), orders, self.work)
        error = self.limit.max_error
        precise = ordered.numel() <= _FEW if error is None else error < _COARSE
        # What is allowed to be dropped must not be taken for rounding.
        pure = PURE if error is None else min(PURE, max((0.5 * error) ** 2, 1e-30))
        energy = self.target.energy if self.target.metric is None else None
        store = SpectrumStore(tensorization.apply(ordered), precise=precise, pure=pure, energy=energy)
        self.views.append(View(store, self.limit, self.deadline))
        return self.views[-1]

    def _judging(self, view: View) -> View:
        """A view that judges structure at the limit, or at the error that the best so far has."""
        best, error = self.measured.best(), self.limit.max_error
        reached = 1.0 if best is None else best.error
        allowed = max((0.95 * (reached if error is None else error)) ** 2, 1e-14) * view.store.energy
        return replace(view, allowed=allowed)

    def _try_native(self, view: View, tensorization: Tensorization, among: Sequence[SearchFamily]) -> None:
        """Family by family, so that no family alone would have found more than all of them together."""
        for family in (family for family in self.families if family in among):
            self.trials.try_shapes(view, native_shapes(tensorization, (family,)))

    def _try_kronecker(self, tensor: Tensor, orders: Orders) -> None:
        """The cut between high and low digits that stands out most, with digits that fit it."""
        if tensor.ndim != 2 or "cut" not in self.families or self.deadline.passed():
            return
        if (split := best_split(tensor, self.deadline)) is not None:
            tensorization = Tensorization(shape=tuple(tensor.shape), radices=split)
            shape = Shape("cut", tensorization, Topology.two_cores(4, (0, 2)), orders, ordered=True)
            self.trials.try_shapes(self._view(tensorization, orders), [shape])

    def _search_modes(self, view: View, tensorization: Tensorization, orders: Orders) -> None:
        if self.deadline.passed():
            return
        view = self._judging(view)
        self.trials.try_shapes(view, searched_shapes(view, tensorization, self.families, orders))
        self._descend(view)

    def _descend(self, view: View) -> None:
        """Where the best so far is small, so that scales of cores matter: trees near it, by careful and by bold predictions."""
        trial = self.trials.best_trial()
        if trial is None or trial.view.store is not view.store or "tree" not in self.families:
            return
        shape, fmt = trial.candidate.shape, trial.candidate.fmt
        if not isinstance(fmt, IntFormat) or trial.candidate.nbytes > _DESCENDED_NBYTES:
            return

        def near(slack: float) -> Shape:
            def price(shape: Shape) -> float:
                candidate = predicted(shape, view, fmt, slack)
                return float("inf") if candidate is None else self.limit.cost(candidate)

            return descended(shape, price, self.deadline)

        self.trials.try_shapes(view, [near(slack) for slack in (1.0, trial.slack)])

    def _search_fibres(self, tensorization: Tensorization) -> None:
        for orders in fibre_starts(self.work, self.deadline):
            if self.deadline.passed():
                return
            view = self._view(tensorization, orders)
            self.trials.try_shapes(view, native_shapes(tensorization, self.families, orders))
            if "mode" in self.orderings and self._promising(view):
                self._search_modes(view, tensorization, orders)
        if self.work.ndim == 2 and max(self.work.shape) <= LARGEST_ASSIGNED and not self.deadline.passed():
            if (split := best_split(self.work, self.deadline)) is None:
                return
            rows, columns = assigned(self.work, split, self.deadline)
            if orders := changed_orders((rows, columns)):
                self._try_kronecker(self.work[rows][:, columns], orders)
                self._search_modes(self._view(tensorization, orders), tensorization, orders)

    def _promising(self, view: View) -> bool:
        """Whether reordered fibres make a train over the digits smaller, or make digits share more, than in native order."""
        here = self._judging(view)
        native = replace(here, store=self.views[0].store)
        count = len(view.store.dims)
        if count < 3:
            return False
        if numbers(here, train_of(range(count))) < numbers(native, train_of(range(count))):
            return True
        return float(mutual_information(here).sum()) > _SHARED * float(mutual_information(native).sum()) + 1e-3

    def as_null(self) -> Null:
        """This run as the control of another."""
        best = self.measured.best()
        gain, luckiest = (1.0, self.measured.nearest()) if best is None else (self.measured.gain(), best)
        measured, finished = len(self.measured.networks), self.finished
        return Null(luckiest.nbytes, luckiest.error, gain, luckiest.family, self._entry_gain(), measured, finished)

    def result(self, null: Null | None, controlled: bool, seconds: float) -> SearchResult:
        """The result, with the null control (where one was asked for) applied."""
        best, reason = accepted(self.measured, null, controlled, self.finished)
        reason += self.note
        if "entry" in self.orderings:
            luck = 0.0 if null is None else null.entry_gain
            reason += "; " + entry_verdict(self._best(entry_sort=True), self._entry_gain(), luck)
        return SearchResult(
            best=best.network,
            choice=best,
            unordered=self.measured.unordered(),
            found=tuple(self.measured.networks),
            gain=self.measured.gain(),
            null=null,
            reason=reason,
            limit=str(self.limit),
            seconds=seconds,
            unfoldings=sum(len(view.store) for view in self.views),
            finished=self.finished,
            spectra=self.trials.spectra,
            history=tuple(self.trials.history),
            entry_sort=self._best(entry_sort=True),
        )

    def _best(self, entry_sort: bool) -> Found | None:
        """The best entry sort that keeps the limit, or the best of all else; None where there is none."""
        kept = [found for found in self.measured.networks if (found.family == "sorted") is entry_sort]
        return min(filter(self.limit.keeps, kept), key=self.limit.sort_key, default=None)

    def _entry_gain(self) -> float:
        """Cost of the best other network over that of the best entry sort; 0 where one of them is missing."""
        best, item = self._best(entry_sort=False), self._best(entry_sort=True)
        if best is None or item is None:
            return 0.0
        return self.limit.cost(best) / self.limit.cost(item) if self.limit.cost(item) > 0 else 1.0

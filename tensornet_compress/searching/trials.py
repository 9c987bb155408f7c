"""Candidates become networks: predicted in all formats, the best few made and measured."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import inf, prod
from time import perf_counter
from typing import Literal

import torch
from torch import Tensor

from tensornet_compress.coding import CodedFormat, NamedFormat, parse_format
from tensornet_compress.coding.trellis import STATES
from tensornet_compress.decompose import ErrorFeedback, realise
from tensornet_compress.decompose.realise import is_matrix_cut
from tensornet_compress.decompose.tree import decompose_tree
from tensornet_compress.errors import CodeError, TensorNetError
from tensornet_compress.metric import KroneckerMetric, euclidean
from tensornet_compress.searching.candidates import Candidate, Shape, predicted
from tensornet_compress.searching.limits import Deadline, View
from tensornet_compress.searching.result import Event, Found, Measured
from tensornet_compress.tensor import Layout, NetworkSpec, TensorNetwork, TermSpec, Topology

_KEPT = 3
# Layouts of each kind that are tried with entropy-coded cores, what their ranks may drop of the error, and tries for a step.
_CODED, _SHARES, _STEPS, _CLOSE = 2, (0.5, 0.7), 6, 1.01
# What a coded core takes beside its codes makes nothing smaller below these bytes.
_LEAST_CODED = 2048
_EXACT = parse_format("fp32")
_TRIES = 4
_SMALL = 1 << 16
_LOOSE = 0.93


class Target:
    """The tensor, and the inner product that errors of it are measured in."""

    def __init__(self, tensor: Tensor, metric: KroneckerMetric | None):
        """Raises ``TensorNetError`` where the metric does not see the tensor."""
        self.tensor, self.metric = tensor.detach(), metric
        self.work = self.tensor if tensor.dtype == torch.float64 else self.tensor.float()
        self.energy = self._norm2(self.work)
        self.zero = not self.energy > 0 and not self.work.any()
        if not self.zero and not self.energy > 0:
            raise TensorNetError(
                f"the tensor's squared norm in the metric is {self.energy:.3g}; give a positive definite metric"
            )

    def _norm2(self, tensor: Tensor) -> float:
        return (self.metric or euclidean()).norm2(tensor.reshape(tensor.shape[0], -1))

    def error_of(self, dense: Tensor) -> float:
        """Relative error of a decoded tensor."""
        squared = self._norm2(self.work - dense)
        return (squared / self.energy) ** 0.5 if self.energy else 0.0 if squared == 0.0 else float("inf")

    def error_of_network(self, network: TensorNetwork) -> float:
        """The same of a network; 0 at once where what is stored are the very entries of the tensor, in native order."""
        if len(network.stored) == 1 and network.spec.terms[0].layout.is_native:
            (core,) = network.stored.values()
            if core.dtype == self.work.dtype and core.shape == self.work.shape and torch.equal(core, self.work):
                return 0.0
        return self.error_of(network.to_dense(self.work.dtype))


@dataclass(frozen=True)
class Trial:
    """A measured network with what it was predicted from."""

    found: Found
    candidate: Candidate
    view: View
    slack: float


class Trials:
    """Makes and measures networks of one tensor, and remembers all of them."""

    def __init__(self, target: Target, measured: Measured, formats: Sequence[NamedFormat]):
        self.target, self.measured, self.formats = target, measured, formats
        self.limit = measured.limit
        self.trials: list[Trial] = []
        self.history: list[Event] = []
        self.spectra: dict[str, list[float]] = {}
        self._started = perf_counter()

    def measure(self, family: str, term: TermSpec, ordered: bool, feedback: ErrorFeedback | None = None) -> Found:
        """Make one network and measure it."""
        target = self.target
        network = realise(target.tensor, NetworkSpec.of(term, target.tensor.dtype), target.metric, feedback=feedback)
        found = Found(family, network, target.error_of_network(network), ordered)
        self.measured.networks.append(found)
        self._note(f"{family} measured", found.nbytes, found.error)
        return found

    def try_coded(self, deadline: Deadline) -> None:
        """The dense tensor, and the best layouts in native and in searched orders, in entropy-coded integers. The best native
        one is among them even where it is far from the best of all: what ordering gains is told of the same formats."""
        best = self.measured.best()
        if best is None or max(best.nbytes, self.measured.unordered().nbytes) < _LEAST_CODED:
            return
        small = best.nbytes < _LEAST_CODED
        shape = tuple(self.target.tensor.shape)
        fmt = CodedFormat(step=1.0, states=STATES)
        term = TermSpec(layout=Layout.native(shape), topology=Topology.one_core(len(shape)), ranks=(), formats=(fmt,))
        self._coded("dense", term, False, 0.0, deadline)
        tried: list[tuple[object, ...]] = []
        for trial in sorted(self.trials, key=lambda trial: self.limit.sort_key(trial.found)):
            shape_of, ordered = trial.candidate.shape, trial.found.ordered
            layout, topology = shape_of.laid_out()
            key = (ordered, layout, topology)
            alike = sum(other[0] == ordered for other in tried)
            spared = (ordered or alike > 0) and (small or self.measured.hopeless(trial.found))
            if key in tried or alike == _CODED or spared:
                continue
            tried.append(key)
            for share in _SHARES if self.limit.max_error is not None else (1.0,):
                chosen = trial.candidate if share == 1.0 else predicted(shape_of, trial.view, _EXACT, share)
                if chosen is not None:
                    formats = (fmt,) * len(chosen.term.formats)
                    term = chosen.term.model_copy(update={"formats": formats})
                    self._coded(shape_of.family, term, ordered, share, deadline)

    def _coded(self, family: str, term: TermSpec, ordered: bool, share: float, deadline: Deadline) -> None:
        """One term at the coarsest step that keeps the error, or the finest that keeps the bytes. ``share``: of the error that
        its ranks already drop."""
        target, limit = self.target, self.limit
        numbers = sum(prod(term.core_shape(core)) for core in range(len(term.formats)))
        reached = min((found.error for found in self.measured.networks if limit.keeps(found)), default=1.0)
        error = reached if limit.max_error is None else limit.max_error * max(1 - share**2, 0.1) ** 0.5
        step = error * (24 * target.energy / numbers) ** 0.5
        known = None
        if len(term.formats) > 1 and not is_matrix_cut(term) and target.metric is None:
            known = decompose_tree(term.layout.apply(target.work), term.topology, term.ranks)[0]
        # Of small cores a trellis may take more than it saves, and some codes are beyond it.
        coders: tuple[Literal[0, 8], ...] = (STATES, 0) if numbers <= _SMALL else (STATES,)
        tries = [self._at_best_step(family, term, ordered, step, known, states, deadline) for states in coders]
        found = [kept for kept in tries if kept is not None]
        if found:
            kept = min(found, key=limit.sort_key)
            self.measured.networks.append(kept)
            self._note(f"{family} entropy-coded, measured", kept.nbytes, kept.error)

    def _at_best_step(
        self,
        family: str,
        term: TermSpec,
        ordered: bool,
        step: float,
        known: list[Tensor] | None,
        states: Literal[0, 8],
        deadline: Deadline,
    ) -> Found | None:
        """The network that keeps the limit best, with this coder."""
        target, limit = self.target, self.limit
        numbers = sum(prod(term.core_shape(core)) for core in range(len(term.formats)))
        kept: Found | None = None
        bounds = [0.0, inf]
        for _ in range(_STEPS):
            if step <= 0 or deadline.passed():
                break
            coded = term.model_copy(update={"formats": tuple(CodedFormat(step=step, states=states) for _ in term.formats)})
            try:
                network = realise(target.tensor, NetworkSpec.of(coded, target.tensor.dtype), target.metric, cores=known)
            except CodeError:
                break
            found = Found(family, network, target.error_of_network(network), ordered)
            keeps = limit.keeps(found)
            if keeps and (kept is None or limit.sort_key(found) < limit.sort_key(kept)):
                kept = found
            coarser = keeps == (limit.max_error is not None)
            bounds[not coarser] = step
            if limit.max_error is not None:
                ratio = limit.max_error / max(found.error, 1e-300)
                step *= min(max(ratio**1.3, 0.25), 4.0) * (0.995 if ratio < 1 else 1.0)
                if kept is found and ratio < _CLOSE:
                    break
            else:
                step *= 2.0 ** (8 * (found.nbytes - 0.995 * (limit.max_bytes or 0)) / numbers)
            if not bounds[0] < step < bounds[1]:
                step = (bounds[0] * bounds[1]) ** 0.5 if bounds[0] > 0 and bounds[1] < inf else 0.0
        return kept

    def best_trial(self) -> Trial | None:
        """How the best network so far was predicted; None for a dense one."""
        best = self.measured.best()
        return next((trial for trial in self.trials if trial.found is best), None)

    def try_shapes(self, view: View, shapes: Iterable[Shape]) -> None:
        """Predict all shapes in all formats; make and measure the best few of those that could beat the best so far, and as
        many more as miss the limit when measured."""
        expected = [item for shape in shapes for fmt in self.formats if (item := self._expected(shape, view, fmt)) is not None]
        expected.sort(key=lambda item: self.limit.sort_key(item[0]))
        most = _KEPT if self.target.work.numel() > _SMALL else _KEPT + 1
        keys: list[tuple[object, ...]] = []
        signatures, missed = set(), 0
        for candidate, slack, careful in expected:
            if len(keys) - missed >= most or self.measured.hopeless(candidate) or view.deadline.passed():
                return
            if candidate.key() in keys:
                continue
            keys.append(candidate.key())
            if candidate.signature() not in signatures:
                signatures.add(candidate.signature())
                missed += not self._make(candidate, view, slack) and missed < most
                other = None if careful or len(keys) > 1 else predicted(candidate.shape, view, candidate.fmt)
                if other is not None and other.key() != candidate.key():
                    self._make(other, view, 1.0)

    def _expected(self, shape: Shape, view: View, fmt: NamedFormat) -> tuple[Candidate, float, bool] | None:
        """The candidate that is likely to keep the limit, the slack that takes, and whether it is what a careful prediction,
        one without slack, comes to as well."""
        candidate = predicted(shape, view, fmt)
        if candidate is None:
            return None
        slack, careful = 1.0 if self.limit.max_error is None else candidate.overlap_slack(), True
        if slack != 1.0 and not candidate.at_its_least(view, slack):
            bold = predicted(candidate.shape, view, fmt, slack)
            candidate, careful = bold or candidate, bold is None
        self._note(f"{shape.family} in {fmt.name}, predicted", candidate.nbytes, candidate.error)
        return candidate, slack, careful

    def _make(self, candidate: Candidate, view: View, slack: float) -> bool:
        """Decompose and measure; where the error was predicted too high or too low, again with other ranks. Whether any of
        these keeps the limit."""
        kept: Found | None = None
        for _ in range(_TRIES):
            found = self.measure(candidate.shape.family, candidate.term, candidate.shape.ordered)
            self.trials.append(Trial(found, candidate, view, slack))
            if not self.limit.max_error:
                break
            ratio = found.error / self.limit.max_error
            if kept is not None and (ratio > 1 or found.nbytes >= kept.nbytes):
                break
            if ratio <= 1:
                kept = found
                if ratio > _LOOSE:
                    break
            slack *= min(4.0, 0.985 / ratio) if ratio > 0 else 4.0
            if ratio <= 1 and candidate.at_its_least(view, slack):
                break
            following = predicted(candidate.shape, view, candidate.fmt, slack)
            if following is None or following.key() == candidate.key() or view.deadline.passed():
                break
            if len(following.shape.topology.legs) < len(candidate.shape.topology.legs):
                # With cores joined it is another network, which competes by itself.
                break
            candidate = following
        self._keep_spectra(candidate, view)
        return kept is not None or self.limit.keeps(found)

    def _keep_spectra(self, candidate: Candidate, view: View) -> None:
        """For plots: the spectrum of a cut in halves of the first view, and that of the widest bond of the best."""
        store, ranks = view.store, candidate.ranks
        if store.dims and "native" not in self.spectra:
            self.spectra["native"] = store.leading(range((len(store.dims) + 1) // 2))
        if ranks and self.measured.best() is self.measured.networks[-1]:
            widest = max(range(len(ranks)), key=ranks.__getitem__)
            self.spectra["best"] = store.leading(candidate.shape.topology.side(widest))

    def _note(self, what: str, nbytes: int, error: float) -> None:
        self.history.append(Event(perf_counter() - self._started, what, nbytes, error))

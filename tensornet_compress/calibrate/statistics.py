"""What a layer tells of itself during calibration, and the metrics that follow from it.

====================  ============================================  ======================================================
kind                  collected                                     metric
====================  ============================================  ======================================================
diagonal              mean ``|x_j|``                                columns ``mean|x|^(2 a)``, a = 1/2 (ASVD 2312.05821)
input                 ``E[x x']``                                   columns (SVD-LLM 2403.07378)
row-fisher            row sums of squared gradients, per example    rows ``d_i^2`` (FWSVD 2207.00112)
kronecker             ``E[x x']`` and ``E[g g']``, per token        both sides (KFAC)
elementwise           mean squared gradients, per example           one weight per entry
====================  ============================================  ======================================================
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor

from tensornet_compress.calibrate.hooks import version_of
from tensornet_compress.errors import TensorNetError
from tensornet_compress.metric import ElementwiseMetric, KroneckerMetric, MetricKind, input_second_moment, metric_kind

CLIP_QUANTILE = 0.95
DROPPED_ENDS = 0.125
NORM_RANGE = (0.1, 10.0)
SHRINK_INPUT, SHRINK_GRADIENT = 0.1, 0.3
ASVD_EXPONENT = 0.5


class InputMoment:
    """Running sum of ``x x'`` (or ``z x'``) and count of the vectors ``x``; float64 sums, float32 products."""

    def __init__(self, total: Tensor | None = None, count: int = 0) -> None:
        # One product alone stays in single precision.
        self._sum, self.count = total, count

    @property
    def sum(self) -> Tensor | None:
        """The sum, float64."""
        if self._sum is not None and self._sum.dtype != torch.float64:
            self._sum = self._sum.double()
        return self._sum

    def add(self, vectors: Tensor, others: Tensor | None = None) -> None:
        """Add (tokens, n) vectors; with ``others`` (tokens, k) the products are ``vectors' others``, shape (n, k). Dimensions
        in front are kept apart."""
        vectors = vectors.float()
        others = vectors if others is None else others.float()
        # Under autocast the product would be rounded to half precision, and no longer be positive definite.
        with torch.autocast(vectors.device.type, enabled=False):
            product = vectors.mT @ others
        self._sum = product if self.sum is None else self.sum.add_(product)
        self.count += vectors.shape[-2]

    def merge(self, other: InputMoment) -> None:
        """Add what another moment has summed up."""
        if other._sum is not None:
            self._sum = other._sum.clone() if self.sum is None else self.sum.add_(other._sum)
            self.count += other.count

    @property
    def silent(self) -> bool:
        """Whether all vectors were zero, or so small that their squares are lost in rounding."""
        return self.sum is not None and float(self.sum.diagonal().mean()) <= 1e-30 * self.count

    @property
    def mean(self) -> Tensor:
        """``E[x x']``, float64 (n, n).

        Raises:
            TensorNetError: no vector was added.
        """
        if self.sum is None or not self.count:
            raise TensorNetError("a layer received no input during calibration; give batches that reach it, or ignore it")
        return self.sum / self.count

    def settled_mean(self) -> Tensor:
        """``mean`` in the place of the sum: nothing may be added afterwards."""
        if self.sum is None or not self.count:
            return self.mean
        self._sum, self.count = self.sum.div_(self.count), 1
        return self._sum


@dataclass
class _Pending:
    """The last input, the layers that were given it so far, and the moment that they had before it."""

    given: Tensor
    version: int | None
    moment: InputMoment
    before: InputMoment | None
    names: set[str]

    def shows(self, given: Tensor) -> bool:
        """Whether a tensor is this input; one that was changed in place since is another."""
        return given is self.given and self.version is not None and self.version == version_of(given)


class SharedMoments:
    """Input moments by layer. Layers share one moment for as long as they are given the very same tensors."""

    def __init__(self) -> None:
        self.of: dict[str, InputMoment] = {}
        self._sharers: dict[InputMoment, set[str]] = {}
        self._pending: _Pending | None = None

    def add(self, name: str, given: Tensor, vectors: Tensor) -> None:
        """Add the (tokens, n) vectors of a tensor that a layer was given."""
        last = self._pending
        if last is not None and last.shows(given) and last.before is self.of.get(name) and name not in last.names:
            last.names.add(name)
            return
        self.settle()
        moment = InputMoment()
        moment.add(vectors)
        self._pending = _Pending(given, version_of(given), moment, self.of.get(name), {name})

    def settle(self) -> None:
        """Count the last input; call it after the last ``add``."""
        last, self._pending = self._pending, None
        if last is None:
            return
        if last.before is not None:
            sharers = self._sharers[last.before]
            if sharers == last.names:
                last.before.merge(last.moment)
                return
            # Some layers that shared a moment were not given this tensor: the others part from them.
            sharers -= last.names
            last.moment.merge(last.before)
        self._sharers[last.moment] = set(last.names)
        self.of |= dict.fromkeys(last.names, last.moment)


class GradientStatistics:
    """Running statistics of one layer; ``kinds`` says which. All sums are float64."""

    def __init__(self, kinds: Collection[MetricKind]):
        self.kinds = frozenset(kinds)
        self.input, self.gradient = InputMoment(), InputMoment()
        self.examples = 0
        self.tokens = 0
        self._vectors = 0
        self._absolute: Tensor | None = None
        self._rows: list[Tensor] = []
        self._columns = 0
        self._entries: Tensor | None = None
        self._lengths: list[float] = []

    def add_inputs(self, vectors: Tensor, again: bool = False) -> None:
        """Count (tokens, n) input vectors; ``again``: of tokens that the layer was called on before. Their second moment is
        added up beside this object and set as ``input``, because layers share it."""
        if "diagonal" in self.kinds:
            total = vectors.abs().double().sum(0)
            self._absolute = total if self._absolute is None else self._absolute + total
        self._vectors += len(vectors)
        self.tokens += 0 if again else len(vectors)

    def add_example(self, calls: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Add one example: for each call of the layer its input vectors (tokens, n) and the gradients (tokens, m) of the
        example's loss with respect to outputs.

        For the Kronecker factor the first and last 12.5 % of positions are left out and each gradient's length is brought
        within [0.1, 10] times the call's mean length; per-example weight gradients take all positions of all calls.
        """
        self.examples += 1
        if "kronecker" in self.kinds:
            for _, gradients in calls:
                self.gradient.add(_trimmed(gradients.float()))
        if self.kinds & {"row-fisher", "elementwise"}:
            with torch.autocast(calls[0][0].device.type, enabled=False):
                weight_gradient = calls[0][1].float().T @ calls[0][0].float()
                for vectors, gradients in calls[1:]:
                    weight_gradient += gradients.float().T @ vectors.float()
            squares = weight_gradient.square().double()
            self._lengths.append(sqrt(float(squares.sum())))
            if "row-fisher" in self.kinds:
                self._rows.append(squares.sum(1))
                self._columns = squares.shape[1]
            if "elementwise" in self.kinds:
                # The quantile of what was seen so far: all gradients together would not fit in memory.
                squares = squares * self._shortening(self._lengths)[-1]
                self._entries = squares if self._entries is None else self._entries.add_(squares)

    def metric(self, kind: MetricKind) -> KroneckerMetric | ElementwiseMetric:
        """The metric of a kind that was collected.

        Raises:
            TensorNetError: the kind was not collected, or the layer saw no input or no gradient.
        """
        metric_kind(kind)
        if kind == "euclidean":
            return KroneckerMetric()
        if kind not in self.kinds:
            raise TensorNetError(f"metric {kind!r} was not collected, only {sorted(self.kinds)}")
        if kind == "diagonal":
            return KroneckerMetric(columns=self._diagonal())
        if kind == "input":
            return input_second_moment(self.input.mean)
        if not self.reached:
            raise TensorNetError(
                f"a layer received no gradient but zeros in {self.examples} calibration examples, so it has no {kind} metric; "
                "its output does not reach the loss: choose the input metric for it, or ignore it"
            )
        if kind == "kronecker":
            rows, columns = shrunk(self.gradient.mean, SHRINK_GRADIENT), shrunk(self.input.mean, SHRINK_INPUT)
            return KroneckerMetric(rows, columns, rate=0.5 * self._vectors / max(self.tokens, 1))
        per_token = self.examples / max(self.tokens, 1)
        if kind == "row-fisher":
            rows, level = _normalised(self._row_fisher())
            # Rows are sums over the columns, whose mean weighs each entry of an error.
            return KroneckerMetric(rows=rows, rate=0.5 * level * per_token / self._columns)
        if kind != "elementwise":
            raise ValueError(f"no way to make a {kind} metric")
        entries, level = _normalised(self._entry_fisher())
        return ElementwiseMetric(entries, rate=0.5 * level * per_token)

    @property
    def called(self) -> bool:
        """Whether the layer was given any input vector at a position that counts."""
        return self._vectors > 0

    @property
    def silent(self) -> bool:
        """Whether all input vectors were zero, or so small that their squares are lost in rounding."""
        return self.input.silent or (self._absolute is not None and float(self._absolute.abs().sum()) == 0)

    @property
    def reached(self) -> bool:
        """Whether any gradient but zeros came back to the layer, at a position that counts."""
        factor = self.gradient.sum
        return any(length > 0 for length in self._lengths) or (factor is not None and float(factor.trace()) > 0)

    def _diagonal(self) -> Tensor:
        if self._absolute is None or not float(self._absolute.sum()) > 0:
            raise TensorNetError("a layer received no input during calibration; give batches that reach it, or ignore it")
        mean = self._absolute / self._vectors
        return mean.clamp_min(1e-6 * float(mean.mean())) ** (2 * ASVD_EXPONENT)

    def _row_fisher(self) -> Tensor:
        return (torch.stack(self._rows) * self._shortening(self._lengths)[:, None].to(self._rows[0].device)).mean(0)

    def _entry_fisher(self) -> Tensor:
        assert self._entries is not None
        return self._entries / self.examples

    @staticmethod
    def _shortening(lengths: list[float]) -> Tensor:
        """Squared factors that bring per-example gradients down to the 95th percentile of their lengths."""
        all_lengths = torch.tensor(lengths, dtype=torch.float64)
        limit = all_lengths.quantile(CLIP_QUANTILE)
        return (limit / all_lengths.clamp_min(1e-300)).clamp_max(1.0).square()


def shrunk(moment: Tensor, share: float) -> Tensor:
    """``(1 - a) C + a mean(diag C) I``.

    Raises:
        TensorNetError: the moment is zero.
    """
    level = float(moment.diagonal().mean())
    if not level > 0:
        raise TensorNetError(f"a second moment of shape {tuple(moment.shape)} has trace {level}; the layer saw no signal")
    return (1 - share) * moment + share * level * torch.eye(len(moment), dtype=moment.dtype, device=moment.device)


def _trimmed(gradients: Tensor) -> Tensor:
    """Gradients (tokens, m) without both ends of the sequence, their lengths brought near the mean one."""
    cut = int(DROPPED_ENDS * len(gradients))
    kept = gradients[cut : len(gradients) - cut]
    lengths = kept.norm(dim=1, keepdim=True)
    mean = float(lengths.mean())
    return kept * (lengths.clamp(NORM_RANGE[0] * mean, NORM_RANGE[1] * mean) / lengths.clamp_min(1e-30))


def _normalised(weights: Tensor) -> tuple[Tensor, float]:
    """Weights of mean one, none of them zero, and the mean that they had."""
    level = float(weights.mean())
    if not level > 0:
        raise TensorNetError("all gradients of a layer are zero; its output does not reach the loss")
    return (weights / level).clamp_min(1e-6), level

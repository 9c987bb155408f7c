"""One pass over calibration batches that collects what a set of metrics needs, and frees gradients as it goes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tensornet_compress.calibrate.batches import call, kept_output, model_inputs, without_padding
from tensornet_compress.calibrate.divergence import sampled_loss
from tensornet_compress.calibrate.hooks import (
    Backward,
    autocast,
    by_example,
    calls_and_gradients,
    frozen,
    hooked,
    input_vectors,
    output_vectors,
    require_unchanged,
    version_of,
    weight_users,
)
from tensornet_compress.calibrate.statistics import GradientStatistics, SharedMoments
from tensornet_compress.errors import TensorNetError
from tensornet_compress.metric import GRADIENT_KINDS, metric_kind

Loss = Callable[[nn.Module, Any], Tensor]


def collect_statistics(
    model: nn.Module,
    batches: Iterable[Any],
    names: Collection[str],
    kinds: Collection[str],
    *,
    tied: Mapping[str, Sequence[str]] | None = None,
    loss: Loss | None = None,
    precision: torch.dtype | None = None,
    advance: Callable[[], None] = lambda: None,
    seed: int = 0,
    strict: bool = True,
) -> dict[str, GradientStatistics]:
    """Statistics of the named layers for the given metrics, in one pass.

    Args:
        model: left as found (mode, parameters, ``requires_grad`` flags, gradients, hooks). No parameter gets a gradient: what a
            layer needs is made from the gradient of its output and dropped at once.
        batches: ids or dicts as everywhere; anything else when ``loss`` takes it. An ``attention_mask`` in a dict leaves
            padding out.
        names: linear, Conv1D and ungrouped convolution layers.
        kinds: metrics to prepare, see ``METRIC_KINDS``; without gradient metrics no backward pass is made.
        tied: modules that use a named layer's weight too: their calls count as calls of that layer. The gradients of all calls
            with one example make up that example's gradient; calls with unlike numbers of examples count each for itself.
        loss: ``loss(model, batch)``, summed over examples, each example's part depending on that example alone. By default
            minus the log-likelihood of labels drawn from the model itself (the true Fisher information).
        precision: dtype of matrix products under autocast.
        strict: refuse a loss that depends on no named layer; without it such layers have no gradients (see ``reached``).

    Raises:
        TensorNetError: an unknown metric or layer, no batches, or a loss that depends on no named layer.
    """
    wanted = [metric_kind(kind) for kind in kinds]
    known = dict(model.named_modules())
    users = {name: weight_users(model, [name, *(tied or {}).get(name, ())]) if name in known else [] for name in names}
    for name, modules in users.items():
        if not modules:
            raise TensorNetError(f"{name!r} is no layer with input vectors; linear layers and ungrouped convolutions are")
    collector = _Collector({name: GradientStatistics(wanted) for name in names}, bool(GRADIENT_KINDS & set(wanted)))
    device = next(model.parameters()).device
    generator = torch.Generator(device=device).manual_seed(seed)
    count = 0
    handles = calls_and_gradients(users, collector.called)
    with hooked(handles), frozen(model), torch.set_grad_enabled(collector.gradients):
        for batch in batches:
            collector.begin(batch)
            with autocast(device, precision):
                if loss is not None:
                    total = loss(model, batch)
                elif collector.gradients:
                    total = sampled_loss(*kept_output(model, model_inputs(batch, device)), generator)
                else:
                    call(model, model_inputs(batch, device))
            if collector.gradients:
                if total.requires_grad:
                    total.backward()
                elif strict:
                    raise unreached(model)
            collector.end()
            count += 1
            advance()
    if not count:
        raise TensorNetError("calibration was given no batches")
    return collector.statistics


def unreached(model: nn.Module) -> TensorNetError:
    """The error of a loss that depends on no named layer."""
    return TensorNetError(f"no named layer reaches the loss of {type(model).__name__}")


class _Collector:
    def __init__(self, statistics: dict[str, GradientStatistics], gradients: bool):
        self.statistics, self.gradients = statistics, gradients
        self._moments = SharedMoments()
        self._mask: Tensor | None = None
        self._calls: dict[str, _Calls] = {}

    def begin(self, batch: Any) -> None:
        """Note the padding of a batch."""
        mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
        self._mask = None if mask is None else mask.bool()
        self._calls = {name: _Calls(statistics) for name, statistics in self.statistics.items()}

    def end(self) -> None:
        """Take in what came back of layers some of whose calls do not reach the loss."""
        for calls in self._calls.values():
            calls.finish()
        self._moments.settle()
        for name, moment in self._moments.of.items():
            self.statistics[name].input = moment

    def called(self, name: str, module: nn.Module, given: Tensor, _output: Tensor) -> Backward:
        """Count the input of a call; what to do with the gradient of its output."""
        statistics, calls = self.statistics[name], self._calls[name]
        vectors = input_vectors(module, given.detach())
        mask = self._mask if self._mask is not None and self._mask.shape == vectors.shape[:2] else None
        flat = without_padding(vectors, mask)
        statistics.add_inputs(flat, again=calls.made > 0)
        if statistics.kinds & {"input", "kronecker"}:
            self._moments.add(name, given, flat)
        calls.made += 1
        if not self.gradients:
            return None
        version = version_of(vectors)

        def backward(gradient: Tensor) -> None:
            if statistics.kinds & {"row-fisher", "elementwise"}:
                require_unchanged(vectors, version, name, "the input or the kronecker metric")
            calls.came_back(module, vectors, gradient, mask)

        return backward


class _Calls:
    """The calls of one layer with one batch, whose gradients are kept until all of them came back."""

    def __init__(self, statistics: GradientStatistics):
        self.made = 0
        self._statistics = statistics
        self._back: list[tuple[Tensor, Tensor, Tensor | None]] = []

    def came_back(self, module: nn.Module, vectors: Tensor, gradient: Tensor, mask: Tensor | None) -> None:
        """Note the gradient of one call's output, beside its input vectors (examples, tokens, n)."""
        self._back.append((vectors, by_example(output_vectors(module, gradient.detach())), mask))
        if len(self._back) == self.made:
            self.finish()

    def finish(self) -> None:
        """Add the examples of the calls that came back."""
        back, self._back = self._back, []
        alike = len({len(vectors) for vectors, _, _ in back}) == 1
        for calls in [back] if alike else [[one] for one in back]:
            for example in range(len(calls[0][0])):
                self._statistics.add_example([_real_tokens(*one, example) for one in calls])


def _real_tokens(vectors: Tensor, gradients: Tensor, mask: Tensor | None, example: int) -> tuple[Tensor, Tensor]:
    kept = slice(None) if mask is None else mask[example].to(gradients.device)
    return vectors[example][kept], gradients[example][kept]

"""The Fisher metric of every targeted layer from one forward and one backward pass over calibration batches.

For a layer ``y = W x`` an error ``E`` costs about ``1/2 E[g_r^2] E_r C E_r'`` nats a token, summed over outputs r, with
``C = E[x x']`` and g the gradient of the log-likelihood of labels drawn from the model. The table of an embedding, and a head
that shares it, costs ``1/2 (h_v e_v C_h e_v' + f_v e_v G e_v')`` for an error ``e_v`` in row v: h_v is the Fisher information
of logit v, C_h the second moment of the head's inputs, f_v how often token v occurs, and G the second moment of gradients at
the embedding's output.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save_file
from torch import Tensor, nn

from tensornet_compress.calibrate.batches import Batch, kept_output, model_inputs, named_parts, without_padding
from tensornet_compress.calibrate.collect import Loss
from tensornet_compress.calibrate.divergence import sampled_loss
from tensornet_compress.calibrate.hooks import (
    Backward,
    autocast,
    calls_and_gradients,
    frozen,
    has_input_vectors,
    hooked,
    input_vectors,
    output_vectors,
)
from tensornet_compress.calibrate.statistics import InputMoment, SharedMoments
from tensornet_compress.errors import TensorNetError
from tensornet_compress.metric import KroneckerMetric
from tensornet_compress.nn import Target
from tensornet_compress.nn.kinds import embedding_scale

GROUP = 8
"""Batches whose sums are made for themselves, with labels of their own seed, and then added to those of the groups before: what
is found does not depend on where each group was summed up."""
_NUMBERS = 1 << 22
_LEAST_TOKEN = 0.3
"""Rows of an embedding weigh at least this share of the mean row: tokens that calibration never saw have to live too."""


@dataclass
class _Seen:
    """What the calls of one module told of it, summed over batches."""

    inputs: InputMoment | None = None
    outputs: Tensor | None = None
    gradients: InputMoment = field(default_factory=InputMoment)
    calls: Tensor | None = None
    vectors: int = 0

    @property
    def silent(self) -> bool:
        """Whether all input vectors were as good as zero."""
        return self.inputs is not None and self.inputs.silent

    def add_output(self, squares: Tensor) -> None:
        self.outputs = squares if self.outputs is None else self.outputs + squares

    def add_calls(self, calls: Tensor) -> None:
        self.calls = calls if self.calls is None else self.calls + calls

    def merge(self, other: _Seen) -> None:
        """Add all that another was told, but for the inputs."""
        if other.outputs is not None:
            self.add_output(other.outputs)
        if other.calls is not None:
            self.add_calls(other.calls)
        self.gradients.merge(other.gradients)
        self.vectors += other.vectors


def fisher_metrics(
    model: nn.Module,
    batches: Iterable[Batch],
    targets: Sequence[Target],
    *,
    loss: Loss | None = None,
    precision: torch.dtype | None = None,
    advance: Callable[[], None] = lambda: None,
    seed: int = 0,
) -> dict[str, KroneckerMetric]:
    """Metrics, in nats per token, of the targets that calibration reached.

    Layers that were fed one tensor share one column factor (the same object). The model is left as found.

    Args:
        loss: ``loss(model, batch)``, summed over examples, to which divergences then refer in place of tokens; by default minus
            the log-likelihood of labels drawn from the model.
        precision: dtype of matrix products under autocast, None for the model's own.

    Raises:
        TensorNetError: no batches, or the loss depends on none of the model's parts.
    """
    total = FisherCollector(model, targets)
    for number, group in enumerate(in_groups(batches)):
        total.merge(_collected(model, group, targets, loss, precision, advance, seed + number))
    if not total.tokens:
        raise TensorNetError("no calibration batch holds a token that is not padding; check their attention_mask")
    return total.metrics(targets)


def in_groups(batches: Iterable[Any]) -> Iterator[list[Any]]:
    """``GROUP`` batches, or whatever is counted like them, at a time."""
    waiting = iter(batches)
    while group := list(islice(waiting, GROUP)):
        yield group


def _collected(
    model: nn.Module,
    batches: Sequence[Batch],
    targets: Sequence[Target],
    loss: Loss | None,
    precision: torch.dtype | None,
    advance: Callable[[], None],
    seed: int,
) -> FisherCollector:
    """What one group told."""
    collector = FisherCollector(model, targets)
    device = next(model.parameters()).device
    generator = torch.Generator(device=device).manual_seed(seed)
    with hooked(calls_and_gradients(collector.modules, collector.called)), frozen(model), torch.enable_grad():
        for batch in batches:
            collector.begin(batch)
            if loss is None:
                with autocast(device, precision):
                    output, is_logits = kept_output(model, model_inputs(batch, device))
                if not len(output):
                    advance()
                    continue
                collector.end_forward(output if is_logits else None)
                collector.tokens += len(output)
                total = sampled_loss(output, is_logits, generator)
            else:
                with autocast(device, precision):
                    total = loss(model, batch)
                collector.end_forward(None)
                collector.tokens += _examples(batch)
            if not total.requires_grad:
                raise TensorNetError(f"no targeted layer reaches the loss of {type(model).__name__}")
            total.backward()
            advance()
    return collector


class FisherCollector:
    """What the modules of targets are given, and the gradients of what they give, batch by batch."""

    def __init__(self, model: nn.Module, targets: Sequence[Target]):
        self.model = model
        names = dict.fromkeys(name for target in targets for name in (target.name, *target.tied))
        self.modules = {name: [model.get_submodule(name)] for name in names}
        self.seen = {name: _Seen() for name in names}
        self.tokens = 0
        self._mask: Tensor | None = None
        self._moments = SharedMoments()
        self._means: dict[InputMoment, Tensor] = {}
        # Moments that are added to others of tied modules.
        self._summed_again: set[InputMoment | None] = set()
        # The layer called last, which may be the one that gives the logits.
        self._head: tuple[str, Tensor] | None = None
        self._exact: set[str] = set()

    def begin(self, batch: Any) -> None:
        """Note the padding of a batch."""
        mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
        self._mask = None if mask is None else mask.bool()
        self._head = None

    def end_forward(self, logits: Tensor | None) -> None:
        """Of a layer whose outputs are the logits the Fisher information is known, without drawing labels: p (1 - p)."""
        if self._head is not None and logits is not None:
            name, output = self._head
            kept = without_padding(output.detach(), self._mask)
            if kept.shape == logits.shape and torch.equal(kept[:1], logits.detach()[:1]):
                for part in _parts(kept):
                    chance = part.float().softmax(-1)
                    self.seen[name].add_output((chance - chance.square()).double().sum(0))
                self._exact.add(name)
        self._moments.settle()
        for name, moment in self._moments.of.items():
            self.seen[name].inputs = moment
        self._head = None

    def merge(self, other: FisherCollector) -> None:
        """Add what another has taken in of the same modules; the other is used up."""
        self.tokens += other.tokens
        pairs = {name: (self.seen[name].inputs, seen.inputs) for name, seen in other.seen.items() if seen.inputs is not None}
        # Modules share a moment where they shared one in both.
        uses = Counter(own for own, _ in set(pairs.values()))
        uses.update({seen.inputs for name, seen in self.seen.items() if name not in pairs})
        joined: dict[tuple[InputMoment | None, InputMoment], InputMoment] = {}
        for pair in pairs.values():
            if pair not in joined:
                own, added = pair
                moment = added if own is None else own
                if own is not None:
                    if uses[own] > 1:
                        moment = InputMoment()
                        moment.merge(own)
                    moment.merge(added)
                joined[pair] = moment
        for name, seen in other.seen.items():
            self.seen[name].merge(seen)
            if name in pairs:
                self.seen[name].inputs = joined[pairs[name]]

    def write(self, file: Path) -> dict[str, Any]:
        """Write the tensors of what was taken in; what ``read`` needs beside them, as JSON."""
        moments: dict[InputMoment, int] = {}
        tensors: dict[str, Tensor] = {}
        told: dict[str, Any] = {"tokens": self.tokens, "vectors": {}, "inputs": {}, "counts": {}}
        for name, seen in self.seen.items():
            told["vectors"][name] = seen.vectors
            for kind, part in (("outputs", seen.outputs), ("calls", seen.calls), ("gradients", seen.gradients.sum)):
                if part is not None:
                    tensors[f"{kind} {name}"] = part
            told["counts"][name] = seen.gradients.count
            if seen.inputs is not None and seen.inputs.sum is not None:
                told["inputs"][name] = number = moments.setdefault(seen.inputs, len(moments))
                tensors[f"inputs {number}"] = seen.inputs.sum
        told["moments"] = [moment.count for moment in moments]
        save_file({name: part.cpu().contiguous() for name, part in tensors.items()}, file)
        return told

    @classmethod
    def read(cls, file: Path, told: Mapping[str, Any], model: nn.Module, targets: Sequence[Target]) -> FisherCollector:
        """What ``write`` wrote of these targets."""
        found, tensors = cls(model, targets), load(file.read_bytes())
        moments = [InputMoment(tensors[f"inputs {number}"], count) for number, count in enumerate(told["moments"])]
        found.tokens = told["tokens"]
        for name, seen in found.seen.items():
            seen.vectors = told["vectors"][name]
            seen.outputs, seen.calls = tensors.get(f"outputs {name}"), tensors.get(f"calls {name}")
            seen.gradients = InputMoment(tensors.get(f"gradients {name}"), told["counts"][name])
            seen.inputs = moments[told["inputs"][name]] if name in told["inputs"] else None
        return found

    def metrics(self, targets: Sequence[Target]) -> dict[str, KroneckerMetric]:
        """Of the targets that were reached; to be asked once."""
        tied = [name for target in targets if target.tied for name in (target.name, *target.tied)]
        self._summed_again = {self.seen[name].inputs for name in tied}
        found = {target.name: self._metric(target) for target in targets}
        return {name: metric for name, metric in found.items() if metric is not None}

    def _metric(self, target: Target) -> KroneckerMetric | None:
        seen = [self.seen[name] for name in dict.fromkeys((target.name, *target.tied))]
        looked_up = [part for part in seen if part.calls is not None and part.gradients.count]
        multiplied = [part for part in seen if part.outputs is not None and float(part.outputs.sum()) > 0 and not part.silent]
        if target.kind == "embedding" or looked_up:
            return self._table(multiplied, looked_up)
        if not multiplied:
            return None
        vectors = sum(part.vectors for part in multiplied)
        rows = torch.stack([part.outputs for part in multiplied if part.outputs is not None]).sum(0) / vectors
        moments = [part.inputs for part in multiplied if part.inputs is not None]
        columns = self._mean(moments[0]) if len(moments) == 1 else None
        if len(moments) > 1:
            sums = torch.stack([moment.sum for moment in moments if moment.sum is not None])
            columns = (sums.sum(0) / sum(moment.count for moment in moments)).cpu()
        return KroneckerMetric(rows.cpu(), columns, 0.5 * vectors / self.tokens)

    def _table(self, multiplied: Sequence[_Seen], looked_up: Sequence[_Seen]) -> KroneckerMetric | None:
        """Rows: what an error in a token's row costs; columns: the mean of both uses' second moments, each of trace one."""
        rows: Tensor | None = None
        columns: Tensor | None = None
        for part in multiplied:
            assert part.outputs is not None
            assert part.inputs is not None
            rows, columns = _added(rows, columns, part.outputs / self.tokens, part.inputs.mean)
        for part in looked_up:
            assert part.calls is not None
            rows, columns = _added(rows, columns, part.calls / self.tokens, part.gradients.mean)
        if rows is None or columns is None or not float(rows.sum()) > 0:
            return None
        columns = columns * (len(columns) / columns.trace())
        rows = rows / len(columns)
        return KroneckerMetric(rows.clamp_min(_LEAST_TOKEN * rows.mean()).cpu(), columns.cpu(), 0.5)

    def _mean(self, moment: InputMoment) -> Tensor:
        """One tensor for all layers that share a moment."""
        if moment not in self._means:
            mean = moment.mean if moment in self._summed_again else moment.settled_mean()
            self._means[moment] = mean.cpu()
        return self._means[moment]

    def called(self, name: str, module: nn.Module, given: Tensor, output: Tensor) -> Backward:
        """Take in what a module was given; what to do with the gradient of its output."""
        seen = self.seen[name]
        if isinstance(module, nn.Embedding):
            flat = without_padding(given[..., None], self._mask)[:, 0]
            calls = torch.bincount(flat, minlength=module.num_embeddings).double()
            seen.add_calls(calls)
            scale = embedding_scale(module) or 1.0
            return lambda gradient: seen.gradients.add(without_padding(gradient.detach() * scale, self._mask))
        if has_input_vectors(module):
            self._moments.add(name, given, without_padding(input_vectors(module, given.detach()), self._mask))
        if output_vectors(module, output) is output:
            self._head = (name, output)

        def backward(gradient: Tensor) -> None:
            kept = without_padding(output_vectors(module, gradient.detach()), self._mask)
            seen.vectors += len(kept)
            if name not in self._exact:
                seen.add_output(torch.stack([part.double().square().sum(0) for part in _parts(kept)]).sum(0))

        return backward


def _parts(vectors: Tensor) -> tuple[Tensor, ...]:
    """Some vectors at a time, so that a copy in double precision takes little beside them."""
    return vectors.split(max(1, min(256, _NUMBERS // vectors.shape[-1])))


def _examples(batch: Any) -> int:
    return len(next(iter(named_parts(batch).values())))


def _added(rows: Tensor | None, columns: Tensor | None, weight: Tensor, moment: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over uses of a table: row weights times the trace of their moment, and moments in proportion to what rows weigh."""
    trace = moment.trace()
    weight = weight * trace
    share = moment * (weight.sum() / trace.clamp_min(1e-300))
    return (weight if rows is None else rows + weight), (share if columns is None else columns + share)


def metric_level(metric: KroneckerMetric) -> float:
    """Mean weight of an entry's squared error, in nats."""
    return 2 * (0.5 if metric.rate is None else metric.rate) * metric.mean_price

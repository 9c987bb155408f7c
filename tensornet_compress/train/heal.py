"""Healing: training the numbers of a compressed model so that its outputs follow the original's, or fit a task."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from math import isfinite
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tensornet_compress.calibrate import Batch, kept_output, model_inputs, total_divergence
from tensornet_compress.calibrate.batches import Inputs, named_parts
from tensornet_compress.calibrate.blocks import find_blocks, replaced_forwards, without_cache
from tensornet_compress.calibrate.hooks import autocast, evaluating
from tensornet_compress.compressing.refine import master_parameters, relative_groups
from tensornet_compress.errors import TensorNetError
from tensornet_compress.frozen import Frozen
from tensornet_compress.nn import NetworkModule
from tensornet_compress.progress import Progress, SilentProgress
from tensornet_compress.train.problem import MeanLoss


class HealReport(Frozen):
    """``initial`` and ``best`` held-out loss per token, the step that gave the best, every held-out measurement as
    (step, loss), the loss of each training step, tokens trained on, seconds, and whether it ended early."""

    initial: float
    best: float
    best_step: int
    heldout: tuple[tuple[int, float], ...]
    losses: tuple[float, ...]
    tokens: int
    seconds: float
    stopped_early: bool


def heal(
    model: nn.Module,
    batches: Sequence[Any],
    *,
    teacher: nn.Module | None = None,
    loss: MeanLoss | None = None,
    steps: int = 100,
    rate: float = 2e-3,
    validation: Sequence[Any] | None = None,
    every: int = 10,
    patience: int = 3,
    checkpointing: bool = False,
    precision: torch.dtype | None = None,
    cache_teacher: bool = False,
    progress: Progress | None = None,
) -> HealReport:
    """Train cores, scales, norms and biases of a compressed model in place; bytes stay what they were.

    Args:
        model: a model with network modules; dense weights and packed integers are not touched.
        batches: ids (batch, length) or dicts; taken in turn, again from the first when used up.
        teacher: the original model. The loss is then KL(teacher || model) per token, or for outputs that are not logits one
            minus the cosine.
        loss: in place of a teacher, ``loss(model, batch)``, a mean over the batch (see ``next_token_loss``); batches may then
            be anything.
        steps, rate: steps of Adam; the learning rate is ``rate`` times each parameter's own size, with a short warm-up, falling
            to zero along a cosine.
        validation: batches that decide which parameters are kept; the last tenth (at least one) of ``batches`` by default,
            which is then not trained on.
        every, patience: steps between measurements, and measurements without a gain after which training ends.
        checkpointing: compute each block again in the backward pass in place of keeping its activations.
        precision: dtype of matrix products under autocast, None for the model's own.
        cache_teacher: keep the teacher's outputs in half precision in place of running it at each step.

    The parameters with the least held-out loss are kept, the starting ones included, after rounding to what is stored; so
    they are when training is interrupted or fails.

    >>> import torch, tensornet_compress as tnc
    >>> x = torch.randn(64, 12)
    >>> data = [(x, x @ torch.randn(12, 8))]
    >>> loss = lambda model, batch: (model(batch[0]) - batch[1]).square().mean()
    >>> model = torch.nn.Sequential(torch.nn.Linear(12, 8))
    >>> report = tnc.compress(model, tnc.Budget(bits_per_weight=8), allocator="energy")
    >>> healed = tnc.train.heal(model, data, loss=loss, steps=20, validation=data)
    >>> healed.best <= healed.initial
    True

    Raises:
        TensorNetError: not exactly one of ``teacher`` and ``loss``, too few batches, or a loss (of a training step or held
            out) that is not finite.
    """
    if (teacher is None) == (loss is None):
        raise TensorNetError("give either a teacher model or a task loss, not both or neither")
    if steps < 1 or every < 1 or rate <= 0:
        raise TensorNetError(f"steps and every must be at least 1 and rate positive, were given {steps}, {every} and {rate}")
    train, heldout = _split(batches, validation)
    objective = _Objective(model, teacher, loss, precision, cache_teacher)
    started = perf_counter()
    with (
        evaluating(model),
        checkpointed(model) if checkpointing else nullcontext(),
        (progress or SilentProgress()).stage("heal", steps) as advance,
        master_parameters(model.modules()) as parameters,
        torch.enable_grad(),
    ):
        training = _Training(objective, parameters, steps, rate)
        training.run(train, heldout, every, patience, advance)
    return HealReport(
        initial=training.measured[0][1],
        best=training.best,
        best_step=training.best_step,
        heldout=tuple(training.measured),
        losses=tuple(training.losses),
        tokens=training.tokens,
        seconds=perf_counter() - started,
        stopped_early=len(training.losses) < steps,
    )


def next_token_loss(model: Any, batch: Batch) -> Tensor:
    """Mean cross-entropy of the next token, padding left out: a loss for ``heal`` or ``isvt``.

    >>> import torch, tensornet_compress as tnc
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = dict(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    >>> model = LlamaForCausalLM(LlamaConfig(**sizes))
    >>> float(tnc.train.next_token_loss(model, torch.randint(32, (2, 8)))) > 0
    True
    """
    inputs = model_inputs(batch, next(model.parameters()).device)
    logits, ids, mask = model(**inputs).logits[:, :-1].float(), inputs["input_ids"][:, 1:], inputs.get("attention_mask")
    losses = F.cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="none")
    return losses.mean() if mask is None else losses[mask[:, 1:].flatten().bool()].mean()


@dataclass(eq=False)
class _Example:
    """A batch, and what the teacher makes of it once it was asked."""

    batch: Any
    target: Tensor | None = None

    @property
    def tokens(self) -> int:
        """Tokens of a batch of ids, examples of any other."""
        if isinstance(self.batch, Tensor | Mapping):
            parts = named_parts(self.batch)
            first = parts.get("input_ids", next(iter(parts.values())))
            return len(first) if first.is_floating_point() or "input_ids" not in parts else first.numel()
        return len(self.batch[0])


def _split(batches: Sequence[Any], validation: Sequence[Any] | None) -> tuple[list[_Example], list[_Example]]:
    train = [_Example(batch) for batch in batches]
    if validation is not None:
        held = [_Example(batch) for batch in validation]
    else:
        cut = max(1, len(train) // 10)
        train, held = train[:-cut], train[-cut:]
    if not train or not held:
        raise TensorNetError(
            f"healing needs batches to train on and to measure with, was given {len(train)} and {len(held)}; "
            "give more batches, or validation batches"
        )
    return train, held


@dataclass
class _Objective:
    """The loss of one batch, per token."""

    model: nn.Module
    teacher: nn.Module | None
    loss: MeanLoss | None
    precision: torch.dtype | None
    cache: bool

    def __call__(self, example: _Example) -> Tensor:
        device = next(self.model.parameters()).device
        if self.loss is not None:
            with autocast(device, self.precision):
                return self.loss(self.model, example.batch)
        inputs = model_inputs(example.batch, device)
        target = example.target if example.target is not None else self._asked(inputs)
        if self.cache:
            example.target = target
        with autocast(device, self.precision):
            output, logits = kept_output(self.model, inputs)
        return total_divergence(target, output, logits, normalised=True) / len(output)

    def _asked(self, inputs: Inputs) -> Tensor:
        """The teacher's log probabilities, in half precision if they are kept, or its output vectors."""
        assert self.teacher is not None
        with evaluating(self.teacher), torch.no_grad(), autocast(next(self.teacher.parameters()).device, self.precision):
            output, logits = kept_output(self.teacher, inputs)
        if not logits:
            return output.float()
        target = output.float().log_softmax(-1)
        return target.half() if self.cache else target


class _Training:
    """Adam with a short warm-up, a cosine fall, and the best parameters kept."""

    def __init__(self, objective: _Objective, parameters: list[nn.Parameter], steps: int, rate: float):
        self.objective, self.parameters, self.steps = objective, parameters, steps
        self.optimiser = torch.optim.Adam(relative_groups(parameters, rate), betas=(0.9, 0.95))
        warm = max(1, steps // 20)
        falling = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimiser, max(1, steps - warm))
        rising = torch.optim.lr_scheduler.LinearLR(self.optimiser, 1 / (warm + 1), 1.0, warm)
        self.schedule = torch.optim.lr_scheduler.SequentialLR(self.optimiser, [rising, falling], [warm])
        self.losses: list[float] = []
        self.measured: list[tuple[int, float]] = []
        self.best, self.best_step, self.tokens = float("inf"), 0, 0
        self._kept: list[Tensor] = []

    def run(
        self,
        train: Sequence[_Example],
        heldout: Sequence[_Example],
        every: int,
        patience: int,
        advance: Callable[[], None],
    ) -> None:
        """Train, and leave the best parameters, also when training is interrupted or fails."""
        try:
            self._measure(heldout)
            since = 0
            for step in range(1, self.steps + 1):
                self._step(train[(step - 1) % len(train)])
                advance()
                if step % every == 0 or step == self.steps:
                    since = 0 if self._measure(heldout) else since + 1
                    if since >= patience:
                        break
        finally:
            with torch.no_grad():
                for parameter, value in zip(self.parameters, self._kept):
                    parameter.copy_(value)

    def _step(self, example: _Example) -> None:
        self.optimiser.zero_grad(set_to_none=True)
        loss = self.objective(example)
        value = float(loss.detach())
        if not isfinite(value):
            raise TensorNetError(f"the loss became {value} at step {len(self.losses) + 1}; lower the rate")
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimiser.step()
        self.schedule.step()
        self.losses.append(value)
        self.tokens += example.tokens

    def _measure(self, heldout: Sequence[_Example]) -> bool:
        """Whether the held-out loss is the least so far."""
        step = len(self.losses)
        with torch.no_grad():
            loss = sum(float(self.objective(example)) for example in heldout) / len(heldout)
        if not isfinite(loss):
            advice = "lower the rate" if step else "look at the model and at the validation batches"
            raise TensorNetError(f"the held-out loss is {loss} after step {step}; {advice}")
        self.measured.append((step, loss))
        if loss >= self.best:
            return False
        self.best, self.best_step = loss, step
        self._kept = [parameter.detach().clone() for parameter in self.parameters]
        return True


def checkpointed(model: nn.Module) -> AbstractContextManager[None]:
    """Blocks that keep no activations for the backward pass but compute them again.

    Raises:
        TargetError: the model has no list of blocks.
    """
    names = [name for name, module in model.named_modules() if isinstance(module, NetworkModule)]

    def again(_number: int, block: nn.Module) -> Callable[..., Any]:
        original = block.forward

        def forward(*arguments: Any, **keywords: Any) -> Any:
            given, named = without_cache(arguments, keywords)
            return checkpoint(original, *given, use_reentrant=False, **named)

        return forward

    return replaced_forwards(find_blocks(model, names), again)

"""How far a model's outputs lie from a reference: KL divergence of logits, one minus the cosine of other outputs.

Padding must be taken out of outputs beforehand, as ``kept_output`` does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tensornet_compress.calibrate.batches import Batch, kept_output, model_inputs
from tensornet_compress.calibrate.hooks import evaluating
from tensornet_compress.errors import TensorNetError

# Numbers of an output that are worked on at once: large vocabularies would need several times the memory of their logits.
CHUNK_NUMBERS, _GRADIENT_NUMBERS = 1 << 23, 1 << 21


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) in nats at each position, from log probabilities (..., vocabulary) to (...)."""
    return _kl_terms(log_p, log_q).sum(-1)


def token_divergence(reference: Tensor, output: Tensor, logits: bool) -> Tensor:
    """Divergence of each token (tokens,) of ``output`` from ``reference``, both (tokens, n) in any floating dtype: of logits
    KL(reference || output) in nats, else one minus the cosine."""
    return torch.cat(_chunked(lambda p, q: _terms(p, q, logits, False).sum(-1), reference, output))


def total_divergence(reference: Tensor, output: Tensor, logits: bool, normalised: bool = False) -> Tensor:
    """``token_divergence`` summed over tokens, to be differentiated: memory beside the two outputs is bounded, also in the
    backward pass.

    Args:
        normalised: the reference holds log probabilities, which are taken as they are (rounded to half precision they add up
            to one only nearly).
    """
    first, *others = _chunked(lambda p, q: _terms(p, q, logits, normalised).sum(), reference, output)
    return sum(others, start=first)


def output_divergence(reference: Tensor, output: Tensor, logits: bool) -> float:
    """Mean of ``token_divergence`` over tokens."""
    return float(token_divergence(reference, output, logits).mean())


def _kl_terms(log_p: Tensor, log_q: Tensor) -> Tensor:
    return log_p.exp() * (log_p - log_q)


def _terms(reference: Tensor, output: Tensor, logits: bool, normalised: bool) -> Tensor:
    """Parts of the divergence (tokens, parts)."""
    reference, output = reference.float(), output.float()
    if not logits:
        return 1 - F.cosine_similarity(reference, output, dim=-1)[:, None]
    return _kl_terms(reference if normalised else reference.log_softmax(-1), output.log_softmax(-1))


def _rows(output: Tensor, numbers: int = CHUNK_NUMBERS) -> tuple[Tensor, ...]:
    """Outputs, some tokens at a time."""
    return output.split(max(1, numbers // output.shape[-1]))


def _chunked(measure: Callable[[Tensor, Tensor], Tensor], output: Tensor, other: Tensor) -> list[Tensor]:
    """``measure`` of all tokens, some at a time; what it takes for a backward pass is computed again there."""
    parts = _rows(output)
    if len(parts) == 1:
        return [measure(output, other)]
    return [checkpoint(measure, *pair, use_reentrant=False) for pair in zip(parts, other.split(len(parts[0])))]


def sampled_loss(output: Tensor, is_logits: bool, generator: torch.Generator) -> Tensor:
    """Minus the log-likelihood of labels drawn from the model itself, summed over tokens.

    The second moment of its gradient is the Hessian of the divergence at no error (the true Fisher information); outputs that
    are not logits get Gaussian labels.
    """
    output = output.float()
    if is_logits:
        labels = torch.cat([_drawn(part, generator) for part in _rows(output.detach())])
        loss: Tensor = _CrossEntropy.apply(output, labels)
        return loss
    noise = torch.randn(output.shape, generator=generator, device=output.device)
    return (F.normalize(output, dim=-1) * noise).sum()


class _CrossEntropy(torch.autograd.Function):
    """Cross-entropy of logits (tokens, n), summed, with its gradient made at once: one tensor beside the logits, where autograd
    takes several."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        total, gradient = logits.new_zeros(()), torch.empty_like(logits)
        parts, places = _rows(logits, _GRADIENT_NUMBERS), _rows(gradient, _GRADIENT_NUMBERS)
        for part, label, place in zip(parts, labels.split(len(parts[0])), places):
            chance = part.log_softmax(-1)
            total -= chance.gather(1, label[:, None]).sum()
            chosen = torch.zeros_like(part).scatter_(1, label[:, None], -1.0)
            place.copy_(torch.ops.aten._log_softmax_backward_data(chosen, chance, -1, part.dtype))
        ctx.gradient = gradient
        return total

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, None]:
        return (ctx.gradient if float(outer) == 1 else ctx.gradient * outer), None


def _drawn(logits: Tensor, generator: torch.Generator) -> Tensor:
    """A label of each row, (tokens,): the first whose cumulated chance exceeds a uniform number. (torch.multinomial takes as
    many random numbers as there are labels, and a tenth of a calibration's time.)"""
    reached = logits.softmax(-1).cumsum(-1)
    drawn = torch.rand(len(logits), 1, generator=generator, device=logits.device, dtype=logits.dtype)
    whole = reached[:, -1:]
    if not whole.isfinite().all():
        raise TensorNetError("the model's logits are not finite on the calibration text; no label can be drawn from them")
    # Below the whole even where rounding reaches it: what comes last may have no chance.
    below = torch.minimum(drawn * whole, torch.nextafter(whole, torch.zeros_like(whole)))
    return torch.searchsorted(reached, below, right=True)[:, 0]


class Reference:
    """What a model gives on fixed batches, logits in half precision, to measure how far its outputs lie from that later."""

    def __init__(self, model: nn.Module, batches: Sequence[Batch]):
        device = next(model.parameters()).device
        self.model = model
        self.inputs = [model_inputs(batch, device) for batch in batches]
        self.outputs: list[tuple[Tensor, bool]] = []
        with evaluating(model), torch.no_grad():
            for batch in self.inputs:
                output, logits = kept_output(model, batch)
                self.outputs.append((output.half() if logits else output, logits))

    def divergence(self) -> float:
        """``output_divergence`` of the model as it is now, mean over batches."""
        with evaluating(self.model), torch.no_grad():
            pairs = zip(self.inputs, self.outputs)
            values = [output_divergence(known, kept_output(self.model, batch)[0], logits) for batch, (known, logits) in pairs]
        return sum(values) / len(values)

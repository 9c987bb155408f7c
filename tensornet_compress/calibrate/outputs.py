"""Where a backward pass begins and ends: the start of its graph, and the loss of the Fisher information at real positions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def kept_output(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, bool]:
    """Outputs at positions that are not padding, (tokens, n), and whether they are logits."""
    result = model(**batch)
    logits = getattr(result, "logits", None)
    output = logits if logits is not None else getattr(result, "last_hidden_state", result)
    if isinstance(output, tuple):
        output = output[0]
    mask = batch.get("attention_mask")
    if mask is not None and mask.shape == output.shape[:-1]:
        return output[mask.bool()], logits is not None
    return output.reshape(-1, output.shape[-1]), logits is not None


def sampled_loss(output: Tensor, is_logits: bool, generator: torch.Generator) -> Tensor:
    """Minus the log-likelihood of labels drawn from the model, summed over tokens."""
    output = output.float()
    if is_logits:
        labels = torch.multinomial(output.detach().softmax(-1), 1, generator=generator)[:, 0]
        return F.cross_entropy(output, labels, reduction="sum")
    noise = torch.randn(output.shape, generator=generator, device=output.device)
    return (F.normalize(output, dim=-1) * noise).sum()


def graph_start(output: Tensor) -> Tensor:
    """``output`` as the start of a graph, copied so that the model may change it in place."""
    return output.detach().requires_grad_().clone()

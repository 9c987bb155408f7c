"""Language-model quality on token windows: perplexity, divergence from a reference, agreement."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tensornet_compress.calibrate import kl_divergence
from tensornet_compress.calibrate.hooks import evaluating
from tensornet_compress.errors import TensorNetError
from tensornet_compress.frozen import Frozen


class LanguageQuality(Frozen):
    """Means over all predicted tokens. ``kl`` is KL(reference || model) in nats, ``top1`` the share of equal best tokens;
    both None without a reference."""

    tokens: int
    cross_entropy: float
    perplexity: float
    kl: float | None = None
    top1: float | None = None


class Reference:
    """Next-token log probabilities of a reference model on fixed windows, kept in half precision."""

    def __init__(self, model: Any, windows: Tensor, batch: int = 4, advance: Callable[[], None] = lambda: None):
        self.windows = windows
        self.batch = batch
        self.log_probabilities: list[Tensor] = []
        for logits in _logits(model, windows, batch, advance):
            self.log_probabilities.append(logits.log_softmax(-1).half())


def evaluate_language(
    model: Any,
    windows: Tensor,
    reference: Reference | None = None,
    batch: int = 4,
    advance: Callable[[], None] = lambda: None,
) -> LanguageQuality:
    """Quality of a causal language model on windows (count, length) of int64 ids.

    Raises:
        TensorNetError: windows of fewer than two tokens, or a reference made on other windows or of another
            vocabulary.
    """
    if windows.ndim != 2 or windows.shape[1] < 2:
        raise TensorNetError(f"windows must be (count, length >= 2), were given {tuple(windows.shape)}")
    if reference is not None and (reference.batch != batch or not torch.equal(reference.windows, windows)):
        raise TensorNetError("the reference was made on other windows or another batch size")
    entropy = divergence = 0.0
    agree = 0
    for number, logits in enumerate(_logits(model, windows, batch, advance)):
        targets = windows[number * batch : number * batch + len(logits), 1:]
        log_q = logits.log_softmax(-1)
        entropy -= float(log_q.gather(-1, targets.to(log_q.device)[..., None]).double().sum())
        if reference is not None:
            log_p = reference.log_probabilities[number].float().log_softmax(-1)
            if log_p.shape[-1] != log_q.shape[-1]:
                raise TensorNetError(
                    f"the model predicts {log_q.shape[-1]:,} tokens and the reference {log_p.shape[-1]:,}; give a reference of "
                    "the same vocabulary"
                )
            divergence += float(kl_divergence(log_p, log_q).double().sum())
            agree += int((log_p.argmax(-1) == log_q.argmax(-1)).sum())
    tokens = windows.shape[0] * (windows.shape[1] - 1)
    mean = entropy / tokens
    return LanguageQuality(
        tokens=tokens,
        cross_entropy=mean,
        perplexity=float(torch.tensor(mean).double().exp()),
        kl=None if reference is None else divergence / tokens,
        top1=None if reference is None else agree / tokens,
    )


def _logits(model: Any, windows: Tensor, batch: int, advance: Callable[[], None]) -> Any:
    """Float32 logits of all positions but the last, batch by batch."""
    device = next(model.parameters()).device
    with evaluating(model):
        for start in range(0, len(windows), batch):
            with torch.no_grad():
                logits = model(input_ids=windows[start : start + batch].to(device)).logits[:, :-1].float()
            yield logits
            advance()

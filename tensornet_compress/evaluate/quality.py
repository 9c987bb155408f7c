"""Quality of models, measured: language models and their caches on token windows, encoders on sentences."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tensornet_compress.calibrate.batches import check_calibration
from tensornet_compress.calibrate.divergence import kl_divergence
from tensornet_compress.calibrate.hooks import evaluating
from tensornet_compress.errors import TensorNetError
from tensornet_compress.frozen import Frozen

if TYPE_CHECKING:
    from tensornet_compress.kv.profile.profile import Profile


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
        self.log_probabilities = [logits.log_softmax(-1).half() for logits in _logits(model, windows, batch, advance)]


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
    perplexity = float(torch.tensor(mean).double().exp())
    compared = {} if reference is None else {"kl": divergence / tokens, "top1": agree / tokens}
    return LanguageQuality(tokens=tokens, cross_entropy=mean, perplexity=perplexity, **compared)


@torch.no_grad()
def evaluate_cache(
    model: Any, windows: Tensor, bits: float, mode: str, profile: Profile | None, advance: Callable[[], None] = lambda: None
) -> dict[str, float]:
    """What a compressed cache costs on windows (count, tokens): the first seven eighths are cached, the rest is read.

    Returns mean KL to the exact cache and change of cross-entropy (nats a token), top-1 agreement, bits per element of the
    payload and of everything held, and bytes.

    Raises:
        TensorNetError: windows so short that nothing of them is compressed.
    """
    from transformers import DynamicCache

    from tensornet_compress.kv.cache import CompressedCache

    ahead = max(1, windows.shape[1] // 8)
    total: dict[str, float] = {}
    for ids in windows.split(1):
        context, following = ids[:, :-ahead], ids[:, -ahead:]
        cache: CompressedCache = CompressedCache(model, bits=bits, mode=mode, profile=profile)
        model(context, past_key_values=cache, use_cache=True)
        report = cache.report()
        if not report.sealed_tokens:
            raise TensorNetError(
                f"{context.shape[1]} cached tokens leave nothing to compress: blocks of {cache.block} are sealed "
                f"behind a window of {cache.window}; use longer windows (--length)"
            )
        got = model(following, past_key_values=cache, use_cache=True).logits[0].float().log_softmax(-1)
        known = DynamicCache(config=model.config)
        model(context, past_key_values=known, use_cache=True)
        exact = model(following, past_key_values=known, use_cache=True).logits[0].float().log_softmax(-1)
        target = following[0, 1:, None]
        elements = report.exact_nbytes / report.tokens / next(model.parameters()).element_size()
        row = {
            "kl": float(kl_divergence(exact, got).mean()),
            "dce": float((exact[:-1].gather(1, target) - got[:-1].gather(1, target)).mean()),
            "top1_agreement": float((got.argmax(-1) == exact.argmax(-1)).float().mean()),
            "payload_bits_per_element": 8 * report.payload_nbytes / (report.sealed_tokens * elements),
            "bits_per_element": report.bits_per_element,
            "nbytes": float(report.nbytes - report.working_nbytes),
            "exact_nbytes": float(report.exact_nbytes),
        }
        for name, value in row.items():
            total[name] = total.get(name, 0.0) + value / len(windows)
        advance()
    return total


def _logits(model: Any, windows: Tensor, batch: int, advance: Callable[[], None]) -> Iterator[Tensor]:
    """Float32 logits of all positions but the last, batch by batch."""
    device = next(model.parameters()).device
    check_calibration(model, [windows])
    with evaluating(model):
        for ids in windows.split(batch):
            with torch.no_grad():
                logits = model(input_ids=ids.to(device)).logits[:, :-1].float()
            yield logits
            advance()


class SentenceQuality(Frozen):
    """Cosine between original and compressed embeddings over all sentences; ``cosine_error``: standard error of the mean."""

    sentences: int
    mean_cosine: float
    least_cosine: float
    cosine_error: float


def sentence_embeddings(model: Any, tokenizer: Any, sentences: Sequence[str], batch: int = 16, length: int = 128) -> Tensor:
    """Mean-pooled, normalised last hidden states: float32 (sentences, width)."""
    device = next(model.parameters()).device
    options = {"padding": True, "truncation": True, "max_length": length, "return_tensors": "pt"}
    rows = []
    with evaluating(model), torch.no_grad():
        for start in range(0, len(sentences), batch):
            encoded = tokenizer(list(sentences[start : start + batch]), **options).to(device)
            hidden = model(**encoded).last_hidden_state.float()
            mask = encoded["attention_mask"][..., None].float()
            rows.append((hidden * mask).sum(1) / mask.sum(1))
    return torch.nn.functional.normalize(torch.cat(rows), dim=-1)


def compare_embeddings(original: Tensor, compressed: Tensor) -> SentenceQuality:
    """Cosines of normalised embeddings, row by row."""
    cosine = (original * compressed).sum(-1)
    mean, least = float(cosine.mean()), float(cosine.min())
    error = float(cosine.double().std() / len(cosine) ** 0.5) if len(cosine) > 1 else 0.0
    return SentenceQuality(sentences=len(cosine), mean_cosine=mean, least_cosine=least, cosine_error=error)

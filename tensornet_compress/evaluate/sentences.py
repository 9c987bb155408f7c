"""Sentence-embedding quality: how far the embeddings of a compressed encoder turn away from the original's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tensornet_compress.calibrate.hooks import evaluating
from tensornet_compress.frozen import Frozen


class SentenceQuality(Frozen):
    """Cosine between original and compressed embeddings over all sentences."""

    sentences: int
    mean_cosine: float
    least_cosine: float


def sentence_embeddings(model: Any, tokenizer: Any, sentences: Sequence[str], batch: int = 16, length: int = 128) -> Tensor:
    """Mean-pooled, normalised last hidden states: float32 (sentences, width)."""
    device = next(model.parameters()).device
    rows = []
    with evaluating(model), torch.no_grad():
        for start in range(0, len(sentences), batch):
            encoded = tokenizer(
                list(sentences[start : start + batch]),
                padding=True,
                truncation=True,
                max_length=length,
                return_tensors="pt",
            ).to(device)
            hidden = model(**encoded).last_hidden_state.float()
            mask = encoded["attention_mask"][..., None].float()
            rows.append((hidden * mask).sum(1) / mask.sum(1))
    return torch.nn.functional.normalize(torch.cat(rows), dim=-1)


def compare_embeddings(original: Tensor, compressed: Tensor) -> SentenceQuality:
    """Cosines of normalised embeddings, row by row."""
    cosine = (original * compressed).sum(-1)
    return SentenceQuality(sentences=len(cosine), mean_cosine=float(cosine.mean()), least_cosine=float(cosine.min()))

"""What a whole language model still knows: its answers on held-out domains, and small zero-shot sets."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tensornet_compress.calibrate.hooks import evaluating
from tensornet_compress.errors import TensorNetError
from tensornet_compress.evaluate.quality import Reference, evaluate_language
from tensornet_compress.nn import decoded

_BATCH = 16


@dataclass(frozen=True)
class Scored:
    """A text after its context: the sum of its log probabilities in nats, its tokens, whether each was the likeliest one."""

    log_probability: float
    tokens: int
    likeliest: bool


def score_texts(model: Any, tokenizer: Any, items: Sequence[tuple[str, str]]) -> list[Scored]:
    """Score (context, text) pairs with a causal language model; a text begins with the space that sets it off.

    Raises:
        TensorNetError: a context or text without tokens.
    """
    coded: list[tuple[Tensor, int]] = []
    for context, text in items:
        ids = tokenizer(context + text, return_tensors="pt")["input_ids"][0]
        begin = len(tokenizer(context)["input_ids"])
        if not 0 < begin < len(ids):
            raise TensorNetError(f"{text!r} after {context!r} leaves no token to predict; give both some text")
        coded.append((ids, begin))
    found: dict[int, Scored] = {}
    with evaluating(model), torch.no_grad():
        for batch in _of_equal_length(coded):
            logits = model(input_ids=torch.stack([coded[item][0] for item in batch])).logits
            for item, own in zip(batch, logits):
                ids, begin = coded[item]
                answers, wanted = own[begin - 1 : -1].float().log_softmax(-1), ids[begin:].to(own.device)
                sum_of_logs = float(answers.gather(1, wanted[:, None]).double().sum())
                found[item] = Scored(sum_of_logs, len(wanted), bool((answers.argmax(1) == wanted).all()))
    return [found[item] for item in range(len(items))]


def _of_equal_length(coded: Sequence[tuple[Tensor, int]]) -> Iterator[list[int]]:
    """Numbers of items whose ids are equally long: no padding, which models may treat differently."""
    by_length: dict[int, list[int]] = {}
    for item, (ids, _) in enumerate(coded):
        by_length.setdefault(len(ids), []).append(item)
    for same in by_length.values():
        for start in range(0, len(same), _BATCH):
            yield same[start : start + _BATCH]


@dataclass(frozen=True)
class Suite:
    """``domains``: windows (count, length) by name; ``last_words`` and ``rare_words``: (context, text); ``pairs``: (context,
    right text, wrong text)."""

    domains: Mapping[str, Tensor]
    last_words: Sequence[tuple[str, str]] = ()
    pairs: Sequence[tuple[str, str, str]] = ()
    rare_words: Sequence[tuple[str, str]] = ()

    def reference(self, model: Any, advance: Callable[[], None] = lambda: None) -> dict[str, Reference]:
        """A model's answers on the domains, to which others are compared."""
        return {name: Reference(model, windows, 1, advance) for name, windows in self.domains.items()}

    @property
    def steps(self) -> int:
        """How often ``advance`` is called: once a window, and once for each of the three sets."""
        return sum(map(len, self.domains.values())) + 3

    def measure(
        self,
        model: Any,
        tokenizer: Any,
        reference: Mapping[str, Reference] | None = None,
        advance: Callable[[], None] = lambda: None,
    ) -> dict[str, float]:
        """``perplexity_NAME`` and (with a reference) ``kl_NAME`` of each domain; ``last_words`` and ``agreement``: shares that
        are right; ``rare_words``: cross-entropy in nats a token. Compressed layers are held decoded meanwhile."""
        values: dict[str, float] = {}
        with decoded(model):
            for name, windows in self.domains.items():
                quality = evaluate_language(model, windows, (reference or {}).get(name), 1, advance)
                values[f"perplexity_{name}"] = quality.perplexity
                if quality.kl is not None:
                    values[f"kl_{name}"] = quality.kl
            if self.last_words:
                scored = score_texts(model, tokenizer, self.last_words)
                values["last_words"] = sum(score.likeliest for score in scored) / len(scored)
            advance()
            if self.pairs:
                right = score_texts(model, tokenizer, [(context, text) for context, text, _ in self.pairs])
                wrong = score_texts(model, tokenizer, [(context, text) for context, _, text in self.pairs])
                better = sum(r.log_probability > w.log_probability for r, w in zip(right, wrong))
                values["agreement"] = better / len(self.pairs)
            advance()
            if self.rare_words:
                scored = score_texts(model, tokenizer, self.rare_words)
                lost = -sum(score.log_probability for score in scored)
                values["rare_words"] = lost / sum(score.tokens for score in scored)
            advance()
        return values

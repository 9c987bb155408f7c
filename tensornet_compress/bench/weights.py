"""``bench weights``: every method at every size on one model, judged on held-out text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from tensornet_compress.bench import methods as _registered  # noqa: F401
from tensornet_compress.bench.harness import ERROR, STORED, Job, lower
from tensornet_compress.bench.metrics import Means, Scores, evaluate, metrics_of
from tensornet_compress.bench.peer_packages import require_fit
from tensornet_compress.bench.registry import Method
from tensornet_compress.bench.run import ModelBench, ModelSettings
from tensornet_compress.bench.weight_case import SLACK, WEIGHT_METHODS, Compressed, WeightCase
from tensornet_compress.calibrate.hooks import evaluating
from tensornet_compress.errors import TensorNetError
from tensornet_compress.evaluate import compare_embeddings, sentence_embeddings
from tensornet_compress.nn import find_targets
from tensornet_compress.report import Measure

MEASURES = {
    "bits_per_weight": lower(
        "bits per weight",
        "bits",
        "8 x all stored bytes of the compressed layers (codes, scales, zero points, orders, biases) / weights.",
    ),
    "targeted_nbytes": lower("compressed layers", "bytes"),
    "nbytes": STORED,
    "error": ERROR,
}
COSINE = {
    "mean_cosine": Measure(
        title="mean cosine",
        better="higher",
        explanation="Cosine of sentence embeddings to the original's, mean over sentences.",
    ),
    "least_cosine": Measure(title="least cosine", better="higher"),
}


@dataclass(frozen=True)
class WeightSettings(ModelSettings):
    """What a run of ``bench weights`` does. ``blocks``: how many middle blocks are compressed, all for ``None``; ``targets``:
    patterns that take the place of it."""

    FULL: ClassVar[Mapping[str, Any]] = {
        "bits": (8.0, 6.0, 4.5, 3.5, 3.0, 2.5), "blocks": None, "calibration_windows": 16, "heldout_windows": 4, "length": 512,
    }  # fmt: skip
    bits: tuple[float, ...] = (4.5, 3.0)
    targets: tuple[str, ...] | None = None
    blocks: int | None = 1
    calibration_windows: int = 4
    heldout_windows: int = 2
    length: int = 256


class WeightBench(ModelBench[WeightSettings]):
    """Every method on one model, in the bytes of so many bits a weight."""

    task = "weights"
    unit = "bits/weight"
    loaded = ("tokenizer", "case", "reference")

    def __init__(self, settings: WeightSettings):
        super().__init__(settings, WEIGHT_METHODS)

    def measures(self) -> dict[str, Measure]:
        causal = {metric.name: metric.measure for metric in metrics_of("weights")}
        return MEASURES | (causal if self.source.kind == "causal" else COSINE)

    def jobs(self) -> Iterator[Job]:
        """The dense model, then every method at every size."""
        yield Job(self.task, self.settings.model, "dense", self.dense, None, self.unit)
        yield from super().jobs()

    def dense(self) -> dict[str, Any]:
        """The original, as it lies in memory."""
        original = sum(p.numel() * p.element_size() for t in self.case.targets for p in self.case.original(t).parameters())
        quality = self.quality()
        values = self._sizes(original, 0.0) | quality.values
        return {"values": values, "errors": quality.errors, "seed": self.settings.seed, "note": "the original model in fp32"}

    def row(self, method: Method[WeightCase, Compressed], bits: float) -> dict[str, Any]:
        """One method at one size."""
        try:
            made = method.run(self.case, bits)
            nbytes = sum(cell.nbytes for cell in made.layers)
            if method.ours and nbytes > bits * self.case.weights / 8:
                raise TensorNetError(f"{method.name} takes {nbytes:,} bytes, more than {bits:g} bits per weight")
            if not method.ours:
                # Biases come on top of what peers were asked for; they count in their rows.
                coded = 8 * (nbytes - made.ledger.get("biases", 0)) / self.case.weights
                require_fit("it", coded, SLACK * bits, "weight", bits)
            sizes, quality = self._sizes(nbytes, self._error(made)), self.quality()
        finally:
            self.case.put_back()
        return {
            "values": sizes | quality.values,
            "errors": quality.errors,
            "settings": made.settings,
            "note": made.note,
            "layers": made.layers,
            "ledger": made.ledger | {"other tensors": self.case.other_nbytes},
            "drawings": made.drawings,
        }

    def _error(self, made: Compressed) -> float:
        norms = {target.name: float(self.case.matrix(target).square().sum()) for target in self.case.targets}
        lost = sum(norms[cell.name] * (cell.error or 0.0) ** 2 for cell in made.layers)
        return float((lost / max(sum(norms.values()), 1e-30)) ** 0.5)

    def _sizes(self, nbytes: int, error: float) -> dict[str, float]:
        return {
            "bits_per_weight": 8 * nbytes / self.case.weights,
            "targeted_nbytes": float(nbytes),
            "nbytes": float(nbytes + self.case.other_nbytes),
            "error": error,
        }

    @cached_property
    def case(self) -> WeightCase:
        """The model with its calibration."""
        settings = self.settings
        if self.source.kind == "causal":
            windows = self.text.windows(self.tokenizer, "calibration", settings.length, settings.calibration_windows)
            batches: list[Any] = list(windows.split(4))
        else:
            sentences = self.text.sentences("calibration", 16 * settings.calibration_windows)
            batches = [self.encoded(sentences[start : start + 16]) for start in range(0, len(sentences), 16)]
        model = self.source.load()
        patterns = list(settings.targets) if settings.targets else middle_blocks(model, settings.blocks)
        case = WeightCase(model, batches, patterns, settings.quick, settings.seed)
        _ = case.kept, case.targets
        return case

    @cached_property
    def reference(self) -> Any:
        """Held-out windows with the original's log probabilities in half precision, or held-out sentences with embeddings."""
        settings = self.settings
        if self.source.kind == "causal":
            windows = self.text.windows(self.tokenizer, "heldout", settings.length, settings.heldout_windows)
            return windows, [answers.half() for answers in self._answers(windows)]
        sentences = self.text.sentences("heldout", 32 * settings.heldout_windows)
        return sentences, sentence_embeddings(self.case.model, self.tokenizer, sentences)

    def quality(self) -> Means:
        """What the case's model answers on the held-out text as it is now."""
        held, exact = self.reference
        if self.source.kind == "causal":
            parts = zip(exact, self._answers(held), held)
            scores = (Scores(known.float().log_softmax(-1), got, window[1:]) for known, got, window in parts)
            return evaluate(scores, self.task)
        quality = compare_embeddings(exact, sentence_embeddings(self.case.model, self.tokenizer, held))
        values = {"mean_cosine": quality.mean_cosine, "least_cosine": quality.least_cosine}
        return Means(values, {"mean_cosine": quality.cosine_error})

    def encoded(self, sentences: list[str]) -> dict[str, Tensor]:
        """Sentences as a batch of the model."""
        encoded = self.tokenizer(sentences, padding=True, truncation=True, max_length=128, return_tensors="pt")
        return {name: encoded[name] for name in ("input_ids", "attention_mask")}

    def _answers(self, windows: Tensor) -> Iterator[Tensor]:
        model: Any = self.case.model
        for window in windows.split(1):
            with evaluating(model), torch.no_grad():
                yield model(input_ids=window).logits[0, :-1].float().log_softmax(-1)


def middle_blocks(model: torch.nn.Module, count: int | None) -> list[str] | None:
    """Patterns of the layers of ``count`` blocks in the middle of the model's list of blocks; ``None`` for all layers."""
    if count is None:
        return None
    from tensornet_compress.calibrate.blocks import find_blocks

    names = [target.name for target in find_targets(model)[0]]
    blocks = [prefix for prefix, _ in find_blocks(model, names)]
    first = max(0, (len(blocks) - count) // 2)
    return [f"{prefix}.*" for prefix in blocks[first : first + count]]

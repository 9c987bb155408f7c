"""``bench weights``: every method at every size on one model, judged on held-out text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch
from pydantic import JsonValue
from torch import Tensor

from tensornet_compress.bench import methods as _registered  # noqa: F401
from tensornet_compress.bench.common_measures import ERROR, STORED
from tensornet_compress.bench.harness import Job
from tensornet_compress.bench.metrics.registry import Scores, evaluate, metrics_of
from tensornet_compress.bench.models import find_model
from tensornet_compress.bench.side import require_fit
from tensornet_compress.bench.texts import find_text
from tensornet_compress.bench.weight_case import SLACK, WEIGHT_METHODS, Compressed, WeightCase, WeightMethod
from tensornet_compress.calibrate.hooks import evaluating
from tensornet_compress.errors import TensorNetError
from tensornet_compress.evaluate import compare_embeddings, sentence_embeddings
from tensornet_compress.nn import find_targets
from tensornet_compress.report import Measure

FULL_BITS = (8.0, 6.0, 4.5, 3.5, 3.0, 2.5)
QUICK_BITS = (4.5, 3.0)
MEASURES = {
    "bits_per_weight": Measure(
        title="bits per weight",
        unit="bits",
        better="lower",
        explanation="8 x all stored bytes of the compressed layers (codes, scales, zero points, orders, biases) / weights.",
    ),
    "targeted_nbytes": Measure(title="compressed layers", unit="bytes", better="lower"),
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
class WeightSettings:
    """What a run of ``bench weights`` does. ``blocks``: how many middle blocks are compressed, all for ``None``; ``targets``:
    patterns that take the place of it."""

    model: str = "smollm2-135m"
    text: str = "wikipedia"
    bits: tuple[float, ...] = QUICK_BITS
    methods: tuple[str, ...] | None = None
    targets: tuple[str, ...] | None = None
    blocks: int | None = 1
    calibration_windows: int = 4
    heldout_windows: int = 2
    length: int = 256
    quick: bool = True
    seed: int = 0

    @classmethod
    def full(cls, **changed: Any) -> WeightSettings:
        """The full table: all layers, calibration on 16 windows and evaluation on 4, of 512 tokens."""
        whole: dict[str, Any] = {"bits": FULL_BITS, "blocks": None, "calibration_windows": 16, "heldout_windows": 4}
        return cls(**whole | {"length": 512, "quick": False} | changed)

    def as_json(self) -> dict[str, JsonValue]:
        """For ``Result.settings``."""
        made: dict[str, Any] = asdict(self)
        made["methods"] = [method.name for method in WEIGHT_METHODS.choose(self.methods)]
        return {name: list(value) if isinstance(value, tuple) else value for name, value in made.items()}


@dataclass
class WeightBench:
    """Loads the model when the first row needs it."""

    settings: WeightSettings

    def __post_init__(self) -> None:
        if not self.settings.bits or min(self.settings.bits) <= 0:
            raise TensorNetError(f"bits per weight must be positive, were given {list(self.settings.bits)}")
        self.methods: list[WeightMethod] = WEIGHT_METHODS.choose(self.settings.methods)
        self.source = find_model(self.settings.model)
        self.text = find_text(self.settings.text)

    def describe(self) -> dict[str, JsonValue]:
        """The settings as data."""
        return self.settings.as_json()

    def measures(self) -> dict[str, Measure]:
        """Of the values that rows have."""
        causal = {metric.name: metric.measure for metric in metrics_of("weights")}
        return MEASURES | (causal if self.source.kind == "causal" else COSINE)

    def prepare(self) -> None:
        """Load what the jobs need, so that bad input ends the command and is not taken for a method's failure."""
        _ = self.case, self.reference

    def release(self) -> None:
        """Let go of the model."""
        for name in ("case", "reference", "tokenizer"):
            self.__dict__.pop(name, None)

    def jobs(self) -> Iterator[Job]:
        """The dense model, then every method at every size."""

        def job(method: WeightMethod, bits: float) -> Job:
            return Job(
                "weights", self.settings.model, method.name, lambda: self.row(method, bits), bits, "bits/weight", method.ours
            )

        yield Job("weights", self.settings.model, "dense", self.dense, None, "bits/weight")
        for method in self.methods:
            for bits in sorted(self.settings.bits, reverse=True):
                yield job(method, bits)

    def dense(self) -> dict[str, Any]:
        """The original, as it lies in memory."""
        original = sum(p.numel() * p.element_size() for t in self.case.targets for p in self.case.original(t).parameters())
        return {"values": self._values(original, 0.0), "seed": self.settings.seed, "note": "the original model in fp32"}

    def row(self, method: WeightMethod, bits: float) -> dict[str, Any]:
        """One method at one size."""
        torch.manual_seed(self.settings.seed)
        try:
            made = method.compress(self.case, bits)
            nbytes = sum(cell.nbytes for cell in made.layers)
            if method.ours and nbytes > bits * self.case.weights / 8:
                raise TensorNetError(f"{method.name} takes {nbytes:,} bytes, more than {bits:g} bits per weight")
            if not method.ours:
                # Biases come on top of what peers were asked for; they count in their rows.
                coded = 8 * (nbytes - made.ledger.get("biases", 0)) / self.case.weights
                require_fit("it", coded, SLACK * bits, "weight", bits)
            values = self._values(nbytes, self._error(made))
        finally:
            self.case.put_back()
        ledger = made.ledger | {"other tensors": self.case.other_nbytes}
        return {
            "values": values,
            "seed": self.settings.seed,
            "settings": {"explanation": method.explanation} | made.settings,
            "note": made.note,
            "layers": made.layers,
            "ledger": ledger,
            "drawings": made.drawings,
        }

    def _error(self, made: Compressed) -> float:
        norms = {target.name: float(self.case.matrix(target).square().sum()) for target in self.case.targets}
        lost = sum(norms[cell.name] * (cell.error or 0.0) ** 2 for cell in made.layers)
        return float((lost / max(sum(norms.values()), 1e-30)) ** 0.5)

    def _values(self, nbytes: int, error: float) -> dict[str, float]:
        values = {
            "bits_per_weight": 8 * nbytes / self.case.weights,
            "targeted_nbytes": float(nbytes),
            "nbytes": float(nbytes + self.case.other_nbytes),
            "error": error,
        }
        return values | (self._language() if self.source.kind == "causal" else self._sentences())

    @cached_property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        return self.source.tokenizer()

    @cached_property
    def case(self) -> WeightCase:
        """The model with its calibration."""
        settings = self.settings
        if self.source.kind == "causal":
            windows = self.text.windows(self.tokenizer, "calibration", settings.length, settings.calibration_windows)
            batches: list[Any] = list(windows.split(4))
        else:
            sentences = self.text.sentences("calibration", 16 * settings.calibration_windows)
            batches = [self._encoded(sentences[start : start + 16]) for start in range(0, len(sentences), 16)]
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

    def _encoded(self, sentences: Sequence[str]) -> dict[str, Tensor]:
        encoded = self.tokenizer(list(sentences), padding=True, truncation=True, max_length=128, return_tensors="pt")
        return {name: encoded[name] for name in ("input_ids", "attention_mask")}

    def _answers(self, windows: Tensor) -> Iterator[Tensor]:
        model: Any = self.case.model
        for window in windows.split(1):
            with evaluating(model), torch.no_grad():
                yield model(input_ids=window).logits[0, :-1].float().log_softmax(-1)

    def _language(self) -> dict[str, float]:
        windows, exact = self.reference
        answers = self._answers(windows)
        return evaluate(
            (Scores(known.float().log_softmax(-1), got, window[1:]) for known, got, window in zip(exact, answers, windows)),
            "weights",
        )

    def _sentences(self) -> dict[str, float]:
        sentences, original = self.reference
        quality = compare_embeddings(original, sentence_embeddings(self.case.model, self.tokenizer, sentences))
        return {"mean_cosine": quality.mean_cosine, "least_cosine": quality.least_cosine}


def middle_blocks(model: torch.nn.Module, count: int | None) -> list[str] | None:
    """Patterns of the layers of ``count`` blocks in the middle of the model's list of blocks; ``None`` for all layers."""
    if count is None:
        return None
    from tensornet_compress.calibrate.blocks import find_blocks

    names = [target.name for target in find_targets(model)[0]]
    blocks = [prefix for prefix, _ in find_blocks(model, names)]
    first = max(0, (len(blocks) - count) // 2)
    return [f"{prefix}.*" for prefix in blocks[first : first + count]]

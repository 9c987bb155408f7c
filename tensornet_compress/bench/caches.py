"""``bench kv``: every cache at every rate, judged by what the model answers when it reads on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from pydantic import JsonValue

from tensornet_compress.bench import methods as _registered  # noqa: F401
from tensornet_compress.bench.cache_case import CACHE_METHODS, STEP, CacheCase, CacheMethod
from tensornet_compress.bench.cache_documents import COPY_SKIP, Document, Reading, documents, read_on
from tensornet_compress.bench.harness import Job
from tensornet_compress.bench.metrics.registry import Scores, evaluate, metrics_of
from tensornet_compress.bench.models import find_model
from tensornet_compress.bench.side import require_fit
from tensornet_compress.bench.texts import TEXTS, find_text
from tensornet_compress.errors import TensorNetError
from tensornet_compress.report import BitsOfLayer, Measure

FULL_BITS = (4.0, 3.0, 2.0, 1.5, 1.25, 1.0)
QUICK_BITS = (4.0, 2.0, 1.0)
LOOKED_AT = 8
"""Held-out windows of the bundled texts that were looked at while the codecs were made; they are left out."""
PARTS = {"natural": "natural text", "copy": "verbatim copy"}
MEASURES = {
    "bits_per_element": Measure(
        title="bits per element",
        unit="bits",
        better="lower",
        explanation="8 x payload bytes of the coded tokens / their key and value elements; scales and zero points counted.",
    ),
    "kilotoken_nbytes": Measure(title="bytes for 1,000 coded tokens", unit="bytes", better="lower"),
    "profile_nbytes": Measure(
        title="profile",
        unit="bytes",
        better="lower",
        explanation="What calibration learned; stored once per model, whatever the number of caches.",
    ),
    "attention_error": Measure(
        title="attention error",
        better="lower",
        explanation="Relative error of attention outputs, mean over layers, natural text.",
    ),
}


@dataclass(frozen=True)
class CacheSettings:
    """What a run of ``bench kv`` does. The first ``sinks`` and last ``window`` of ``context`` tokens stay exact; ``ahead``
    tokens are read with the coded cache. ``profile``: a folder of our profile, made there when it is missing."""

    model: str = "smollm2-135m"
    text: str = "wikipedia"
    bits: tuple[float, ...] = QUICK_BITS
    methods: tuple[str, ...] | None = None
    profile: str | None = None
    documents: int = 2
    context: int = 448
    ahead: int = 48
    sinks: int = 4
    window: int = 64
    calibration_windows: int = 6
    calibration_length: int = 384
    sensitivity_windows: int = 2
    draws: int = 1
    quick: bool = True
    seed: int = 0

    @classmethod
    def full(cls, **changed: Any) -> CacheSettings:
        """The full table: 3 documents of 1,024 tokens, a profile from 24 windows of 1,152."""
        whole: dict[str, Any] = {"bits": FULL_BITS, "documents": 3, "context": 1024, "ahead": 128, "quick": False}
        whole |= {"calibration_windows": 24, "calibration_length": 1152, "sensitivity_windows": 16, "draws": 1}
        return cls(**whole | changed)

    def as_json(self) -> dict[str, JsonValue]:
        """For ``Result.settings``."""
        made: dict[str, Any] = asdict(self)
        made["methods"] = [method.name for method in CACHE_METHODS.choose(self.methods)]
        return {name: list(value) if isinstance(value, tuple) else value for name, value in made.items()}


@dataclass
class CacheBench:
    """Loads the model, and calibrates, when the first row needs it."""

    settings: CacheSettings

    def __post_init__(self) -> None:
        if not self.settings.bits or min(self.settings.bits) <= 0:
            raise TensorNetError(f"bits per element must be positive, were given {list(self.settings.bits)}")
        self.methods: list[CacheMethod] = CACHE_METHODS.choose(self.settings.methods)
        self.source = find_model(self.settings.model)
        self.text = find_text(self.settings.text)
        if self.source.kind != "causal":
            raise TensorNetError(f"{self.settings.model!r} is an encoder and keeps no cache; give a causal language model")

    def describe(self) -> dict[str, JsonValue]:
        """The settings as data."""
        return self.settings.as_json()

    def measures(self) -> dict[str, Measure]:
        """Of the values that rows have."""
        found = dict(MEASURES)
        for part, title in PARTS.items():
            for metric in metrics_of("kv"):
                words = metric.measure.title.replace("the dense model", "the exact cache")
                found[f"{metric.name}_{part}"] = metric.measure.model_copy(update={"title": f"{words}, {title}"})
        return found

    def prepare(self) -> None:
        """Load the model and calibrate; bad input ends the command here."""
        _ = self.case.rotary, self.case.profile, self.documents

    def release(self) -> None:
        """Let go of the model."""
        for name in ("case", "documents", "tokenizer"):
            self.__dict__.pop(name, None)

    def jobs(self) -> Iterator[Job]:
        """Every method at every rate."""

        def job(method: CacheMethod, bits: float) -> Job:
            return Job(
                "kv", self.settings.model, method.name, lambda: self.row(method, bits), bits, "bits/element", method.ours
            )

        for method in self.methods:
            for bits in sorted(self.settings.bits, reverse=True):
                yield job(method, bits)

    @cached_property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        return self.source.tokenizer()

    @cached_property
    def case(self) -> CacheCase:
        """The model with calibration windows."""
        settings = self.settings
        windows = self.text.windows(self.tokenizer, "calibration", settings.calibration_length, settings.calibration_windows)
        folder = None if settings.profile is None else Path(settings.profile)
        return CacheCase(self.source.load(), windows, settings.sinks, settings.sensitivity_windows, settings.draws, folder)

    @property
    def reading(self) -> Reading:
        """How a document is read."""
        settings = self.settings
        return Reading(settings.context, settings.ahead, settings.sinks, settings.window)

    @cached_property
    def documents(self) -> list[Document]:
        """Held-out contexts with exact answers."""
        settings = self.settings
        skipped = LOOKED_AT if settings.text in TEXTS else 0
        length = settings.context + settings.ahead
        windows = self.text.windows(self.tokenizer, "heldout", length, settings.documents + skipped)[skipped:]
        return documents(self.case.model, windows, self.reading)

    def row(self, method: CacheMethod, bits: float) -> dict[str, Any]:
        """One method at one rate: means over documents."""
        torch.manual_seed(self.settings.seed)
        peer = method.make(self.case, bits)
        reading = self.reading
        positions = torch.arange(reading.context)[reading.body]
        scores: dict[str, list[Scores]] = {part: [] for part in PARTS}
        spent, errors = [], []
        for document in self.documents:
            body = [[x[:, reading.body] for x in states] for states in (document.keys, document.values)]
            with torch.no_grad():
                keys, values, used = peer.recode(body[0], body[1], positions)
            spent.append(used)
            whole = [
                [torch.cat([x[:, : reading.sinks], y, x[:, -reading.window :]], 1) for x, y in zip(exact, coded)]
                for exact, coded in ((document.keys, keys), (document.values, values))
            ]
            for part, (got, attention) in read_on(self.case.model, whole[0], whole[1], document.continuations).items():
                scores[part].append(_scores(document, part, got))
                if part == "natural":
                    pairs = zip(attention, document.attention[part])
                    errors.append(mean(float((a - b).norm() / b.norm()) for a, b in pairs))
        if method.ours and mean(spent) > bits * (1 + 1e-9):
            raise TensorNetError(f"{method.name} takes {mean(spent):.4f} bits per element, asked for {bits:g}")
        if not method.ours:
            require_fit("it", mean(spent), bits + STEP, "element", bits)
        elements = 1000 * sum(k.shape[0] * k.shape[2] for k in (*self.documents[0].keys, *self.documents[0].values))
        found = {
            "bits_per_element": mean(spent),
            "kilotoken_nbytes": mean(spent) * elements / 8,
            "attention_error": mean(errors),
        }
        found["profile_nbytes"] = float(getattr(peer, "profile_nbytes", 0))
        for part in PARTS:
            found |= {f"{name}_{part}": value for name, value in evaluate(scores[part], "kv").items()}
        layers = getattr(peer, "layer_bits", None) or []
        return {
            "values": found,
            "seed": self.settings.seed,
            "settings": {"explanation": method.explanation, "form": peer.name},
            "ledger": {"profile": int(found["profile_nbytes"]), "payload of 1,000 tokens": int(found["kilotoken_nbytes"])},
            "cache_bits": tuple(BitsOfLayer(layer=i, keys=k, values=v) for i, (k, v) in enumerate(layers)),
        }


def _scores(document: Document, part: str, got: torch.Tensor) -> Scores:
    """Answers at the positions that count: in a copy the first ones cannot be known."""
    skip = COPY_SKIP if part == "copy" else 0
    whole = Scores(document.exact[part][:-1], got[:-1], document.continuations[part][1:])
    return replace(whole, exact=whole.exact[skip:], got=whole.got[skip:], target=whole.target[skip:])

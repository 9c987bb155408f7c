"""``bench kv``: every cache at every rate, judged by what the model answers when it reads on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import mean
from typing import Any, ClassVar

import torch

from tensornet_compress.bench import methods as _registered  # noqa: F401
from tensornet_compress.bench.cache_case import CACHE_METHODS, STEP, CacheCase, CacheCoder
from tensornet_compress.bench.cache_documents import Document, Reading, documents, read_on
from tensornet_compress.bench.harness import lower
from tensornet_compress.bench.metrics import Scores, evaluate, metrics_of
from tensornet_compress.bench.peer_packages import require_fit
from tensornet_compress.bench.registry import Method
from tensornet_compress.bench.run import ModelBench, ModelSettings
from tensornet_compress.bench.texts import TEXTS
from tensornet_compress.errors import TensorNetError
from tensornet_compress.report import BitsOfLayer, Measure

LOOKED_AT = 8
"""Held-out windows of the bundled texts that were looked at while the codecs were made; they are left out."""
COPY_SKIP = 8
"""Positions of a copy that do not count: that it is one cannot be known yet."""
PARTS = {"natural": "natural text", "copy": "verbatim copy"}
MEASURES = {
    "bits_per_element": lower(
        "bits per element",
        "bits",
        "8 x payload bytes of the coded tokens / their key and value elements; scales and zero points counted.",
    ),
    "kilotoken_nbytes": lower("bytes for 1,000 coded tokens", "bytes"),
    "profile_nbytes": lower(
        "profile", "bytes", "What calibration learned; stored once per model, whatever the number of caches."
    ),
    "attention_error": lower(
        "attention error", explanation="Relative error of attention outputs, mean over layers, natural text."
    ),
}


@dataclass(frozen=True)
class CacheSettings(ModelSettings):
    """What a run of ``bench kv`` does. The first ``sinks`` and last ``window`` of ``context`` tokens stay exact; ``ahead``
    tokens are read with the coded cache. ``profile``: a folder of our profile, made there when it is missing."""

    FULL: ClassVar[Mapping[str, Any]] = {
        "bits": (4.0, 3.0, 2.0, 1.5, 1.25, 1.0), "documents": 9, "context": 1024, "ahead": 128,
        "calibration_windows": 24, "calibration_length": 1152, "sensitivity_windows": 16,
    }  # fmt: skip
    bits: tuple[float, ...] = (4.0, 2.0, 1.0)
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


class CacheBench(ModelBench[CacheSettings]):
    """Every cache of one model, at so many bits an element."""

    task = "kv"
    unit = "bits/element"
    loaded = ("tokenizer", "case", "documents")

    def __init__(self, settings: CacheSettings):
        super().__init__(settings, CACHE_METHODS)
        if self.source.kind != "causal":
            raise TensorNetError(f"{settings.model!r} is an encoder and keeps no cache; give a causal language model")

    def measures(self) -> dict[str, Measure]:
        measures = dict(MEASURES)
        for part, title in PARTS.items():
            for metric in metrics_of(self.task):
                words = metric.measure.title.replace("the dense model", "the exact cache")
                measures[f"{metric.name}_{part}"] = metric.measure.model_copy(update={"title": f"{words}, {title}"})
        return measures

    def prepare(self) -> None:
        """Load the model and calibrate; bad input ends the command here."""
        _ = self.case.rotary, self.case.profile
        super().prepare()

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
        return documents(self.case.model, self.windows(), self.reading)

    def windows(self) -> torch.Tensor:
        """Tokens of held-out contexts and what follows them, int64 (documents, context + ahead)."""
        settings = self.settings
        skipped = LOOKED_AT if settings.text in TEXTS else 0
        length = settings.context + settings.ahead
        return self.text.windows(self.tokenizer, "heldout", length, settings.documents + skipped)[skipped:]

    def row(self, method: Method[CacheCase, CacheCoder], bits: float) -> dict[str, Any]:
        """One method at one rate: means over documents."""
        coder = method.run(self.case, bits)
        scores: dict[str, list[Scores]] = {part: [] for part in PARTS}
        spent, errors = [], []
        for document in self.documents:
            keys, values, used = self._recoded(coder, document)
            spent.append(used)
            for part, (got, attention) in read_on(self.case.model, keys, values, document.continuations).items():
                scores[part].append(_scores(document, part, got))
                if part == "natural":
                    pairs = zip(attention, document.attention[part])
                    errors.append(mean(float((a - b).norm() / b.norm()) for a, b in pairs))
        if method.ours and mean(spent) > bits * (1 + 1e-9):
            raise TensorNetError(f"{method.name} takes {mean(spent):.4f} bits per element, asked for {bits:g}")
        if not method.ours:
            require_fit("it", mean(spent), bits + STEP, "element", bits)
        payload = mean(spent) * 1000 * self._elements / 8
        measured = {
            "bits_per_element": mean(spent),
            "kilotoken_nbytes": payload,
            "attention_error": mean(errors),
            "profile_nbytes": float(coder.profile_nbytes),
        }
        spread: dict[str, float] = {}
        for part in PARTS:
            means = evaluate(scores[part], self.task)
            measured |= {f"{name}_{part}": value for name, value in means.values.items()}
            spread |= {f"{name}_{part}": error for name, error in means.errors.items()}
        return {
            "values": measured,
            "errors": spread,
            "settings": {"form": coder.form},
            "ledger": {"profile": coder.profile_nbytes, "payload of 1,000 tokens": int(payload)},
            "cache_bits": tuple(BitsOfLayer(layer=i, keys=k, values=v) for i, (k, v) in enumerate(coder.layer_bits)),
        }

    @torch.no_grad()
    def _recoded(self, coder: CacheCoder, document: Document) -> tuple[list[torch.Tensor], list[torch.Tensor], float]:
        """Keys and values of a document with its body coded, and the bits per element of it."""
        reading, exact = self.reading, (document.keys, document.values)
        body = [[states[:, reading.body] for states in side] for side in exact]
        *coded, used = coder.recode(body[0], body[1], torch.arange(reading.context)[reading.body])
        whole = [
            [torch.cat([x[:, : reading.sinks], y, x[:, -reading.window :]], 1) for x, y in zip(side, middle)]
            for side, middle in zip(exact, coded)
        ]
        return whole[0], whole[1], used

    @property
    def _elements(self) -> int:
        """Of keys and values of one token."""
        return sum(states.shape[0] * states.shape[2] for states in (*self.documents[0].keys, *self.documents[0].values))


def _scores(document: Document, part: str, got: torch.Tensor) -> Scores:
    """Answers at the positions that count."""
    skip = COPY_SKIP if part == "copy" else 0
    return Scores(document.exact[part][skip:-1], got[skip:-1], document.continuations[part][1 + skip :])

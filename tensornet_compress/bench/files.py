"""``bench model``: whole files of a language model, embeddings included: bytes on disk and in memory, seconds to load, speed,
and what the model still knows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

from tensornet_compress.bench import methods as _registered  # noqa: F401
from tensornet_compress.bench.file_case import FILE_METHODS, FileCase, WholeFile, decode, resident_nbytes
from tensornet_compress.bench.harness import STORED, Job, lower
from tensornet_compress.bench.metrics import TOKEN_METRICS
from tensornet_compress.bench.peer_packages import require_fit
from tensornet_compress.bench.registry import Method
from tensornet_compress.bench.run import ModelBench, ModelSettings
from tensornet_compress.bench.speed_case import clock
from tensornet_compress.bench.weight_case import SLACK
from tensornet_compress.errors import TensorNetError
from tensornet_compress.evaluate import Reference, Suite
from tensornet_compress.inputs import domain_windows, zero_shot_sets
from tensornet_compress.report import Measure

DOMAINS = {"prose": "held-out English prose", "technical": "held-out technical articles", "python": "Python reference"}
_PROMPT = 32


def suite_measures() -> dict[str, Measure]:
    """What ``Suite.measure`` gives."""
    found: dict[str, Measure] = {}
    for name, title in DOMAINS.items():
        found[f"kl_{name}"] = lower(f"KL, {title}", "nats/token", TOKEN_METRICS["kl"].measure.explanation)
        found[f"perplexity_{name}"] = lower(f"perplexity, {title}", explanation=f"On {title}.")
    return found | {
        "last_words": Measure(
            title="last words", better="higher", explanation="Share of last words of held-out passages that are the likeliest."
        ),
        "agreement": Measure(
            title="agreement", better="higher", explanation="Share of minimal pairs whose right sentence is the likelier."
        ),
        "rare_words": lower(
            "loss on rare words", "nats/token", "Cross-entropy of rare words after their definitions and the reverse."
        ),
    }


MEASURES = {
    "bits_per_weight": lower("bits per weight", "bits", "8 x stored bytes / numbers of the whole model."),
    "nbytes": STORED,
    "file_nbytes": lower("files", "bytes", "Everything on disk: tensors, header, configuration and tokenizer."),
    "resident_nbytes": lower("resident bytes", "bytes", "The tensors in memory while the model runs."),
    "load_seconds": lower("load", "s", "From disk to memory, in a process that has loaded such a file before."),
    "tokens_per_second": Measure(title="tokens per second", unit="tokens/s", better="higher"),
}


@dataclass(frozen=True)
class FileSettings(ModelSettings):
    """What a run of ``bench model`` does. ``bits``: of the whole model; ``windows``: of each domain; ``items``: of each
    zero-shot set, all for ``None``; ``tokens``: decoded for the clock."""

    # 70 and 60 MB of SmolLM2 are 4.163 and 3.568 bits.
    FULL: ClassVar[Mapping[str, Any]] = {
        "bits": (6.0, 5.5, 4.5, 4.163, 3.568, 3.0, 2.5), "calibration_windows": 16, "windows": 4, "length": 512, "items": None,
        "tokens": 32,
    }  # fmt: skip
    bits: tuple[float, ...] = (4.5, 3.0)
    calibration_windows: int = 4
    windows: int = 1
    length: int = 256
    items: int | None = 24
    tokens: int = 8


class FileBench(ModelBench[FileSettings]):
    """Every method on the whole of one language model."""

    task = "weights"
    unit = "bits/weight"
    loaded = ("tokenizer", "case", "reference")
    timed = True

    def __init__(self, settings: FileSettings):
        super().__init__(settings, FILE_METHODS)
        if self.source.kind != "causal":
            raise TensorNetError(f"{settings.model!r} is no causal language model; bench model judges what a model predicts")
        self._scratch = TemporaryDirectory(prefix="tensornet-files-")

    def measures(self) -> dict[str, Measure]:
        return MEASURES | suite_measures()

    def jobs(self) -> Iterator[Job]:
        """The dense model, then every method at every size."""
        yield Job(self.task, self.subject, "dense", self.dense, None, self.unit)
        for method in self.methods:
            for bits in sorted(self.settings.bits, reverse=True):
                yield self.job(self.subject, method, bits, self.row)

    @property
    def subject(self) -> str:
        """What rows are about."""
        return f"{self.settings.model}, whole file"

    def release(self) -> None:
        super().release()
        self._scratch.cleanup()

    def dense(self) -> dict[str, Any]:
        """The original, in fp32 in memory."""
        held = resident_nbytes(self.case.model)
        made = WholeFile(self.case.model, held, resident_nbytes=held, decode=partial(decode, self.case.model))
        return {"values": self._values(made), "seed": self.settings.seed, "note": "the original model in fp32"}

    def row(self, method: Method[FileCase, WholeFile], bits: float) -> dict[str, Any]:
        """One method at one size."""
        made = method.run(self.case, bits)
        taken = 8 * made.nbytes / self.case.weights
        if method.ours and taken > bits * (1 + 1e-6):
            raise TensorNetError(f"{method.name} takes {taken:.4g} bits per weight, asked for {bits:g}")
        require_fit("it", taken, SLACK * bits, "weight", bits)
        return {"values": self._values(made), "settings": made.settings, "note": made.note}

    def _values(self, made: WholeFile) -> dict[str, float]:
        values: dict[str, float] = {
            "bits_per_weight": 8 * made.nbytes / self.case.weights,
            "nbytes": float(made.nbytes),
        }
        for name in ("file_nbytes", "resident_nbytes", "load_seconds"):
            if (value := getattr(made, name)) is not None:
                values[name] = float(value)
        if made.decode is not None:
            prompt = self.suite.domains["prose"][:1, :_PROMPT]
            made.decode(prompt, 2)
            read = clock()
            began = read()
            made.decode(prompt, self.settings.tokens)
            values["tokens_per_second"] = self.settings.tokens / max(read() - began, 1e-9)
        return values | self.suite.measure(made.model, self.tokenizer, self.reference)

    @cached_property
    def case(self) -> FileCase:
        """The model with its calibration."""
        settings = self.settings
        windows = self.text.windows(self.tokenizer, "calibration", settings.length, settings.calibration_windows)
        case = FileCase(settings.model, self.source.load(), self.tokenizer, list(windows.split(4)), Path(self._scratch.name))
        _ = case.kept
        return case

    @cached_property
    def suite(self) -> Suite:
        """What every file is asked."""
        settings = self.settings
        domains = domain_windows(self.tokenizer, settings.length, settings.windows)
        return Suite(domains, **zero_shot_sets(settings.items))

    @cached_property
    def reference(self) -> dict[str, Reference]:
        """The original's answers."""
        return self.suite.reference(self.case.model)

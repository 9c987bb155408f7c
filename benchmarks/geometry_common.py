"""What the geometry benchmarks share: SmolLM2 with calibration, validation and held-out windows, and rows kept across runs."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import torch
from common import LENGTH, MODEL, RESULTS, write_result
from torch import Tensor

from tensornet_compress.evaluate import Reference, evaluate_language
from tensornet_compress.inputs import calibration_windows, heldout_windows, load_causal_lm, load_tokenizer

CALIBRATION, VALIDATION, HELDOUT = 16, 4, 8


@dataclass
class Language:
    """SmolLM2-135M in float32. Choices are made on ``validation``: windows of the calibration articles that no fit sees."""

    calibration: list[Tensor]
    validation: Tensor
    heldout: Tensor

    @classmethod
    def load(cls) -> Language:
        torch.set_num_threads(1)
        tokenizer = load_tokenizer(MODEL)
        windows = calibration_windows(tokenizer, LENGTH, CALIBRATION + VALIDATION)
        batches = list(windows[:CALIBRATION].split(4))
        return cls(batches, windows[CALIBRATION:], heldout_windows(tokenizer, LENGTH, HELDOUT))

    @staticmethod
    def model() -> Any:
        return load_causal_lm(MODEL, torch.float32)

    def references(self, heldout: bool = True) -> dict[str, Reference]:
        model = self.model()
        found = {"validation": Reference(model, self.validation)}
        return found | ({"heldout": Reference(model, self.heldout)} if heldout else {})


def qualities(model: Any, references: dict[str, Reference]) -> dict[str, float]:
    """KL and perplexity on each reference's windows."""
    row = {}
    for name, reference in references.items():
        quality = evaluate_language(model, reference.windows, reference)
        row |= {f"{name}_kl": quality.kl or 0.0, f"{name}_perplexity": quality.perplexity}
    return row


class Rows:
    """Rows of a result file, written as they come; rows already in the file are kept with ``resume``."""

    def __init__(self, name: str, settings: dict[str, Any], resume: bool):
        self.name, self.settings = name, settings
        stored = RESULTS / f"{name}.json"
        self.rows: list[dict[str, Any]] = json.loads(stored.read_text())["rows"] if resume and stored.exists() else []

    def has(self, **key: Any) -> bool:
        return any(all(row.get(field) == value for field, value in key.items()) for row in self.rows)

    def drop(self, **key: Any) -> None:
        """Forget rows that are about to be measured again."""
        self.rows = [row for row in self.rows if any(row.get(field) != value for field, value in key.items())]

    def add(self, **row: Any) -> None:
        self.rows.append(row)
        print({field: round(value, 4) if isinstance(value, float) else value for field, value in row.items()}, flush=True)
        write_result(self.name, {"settings": self.settings, "rows": self.rows})

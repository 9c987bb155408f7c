"""Where an iteration stands, in memory and in a safetensors file with a JSON log, the settings and a hash in its header."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tensornet_compress.errors import CheckpointError
from tensornet_compress.files.reading import read_tensors
from tensornet_compress.files.whole import write_tensors
from tensornet_compress.frozen import Frozen


class IsvtStep(Frozen):
    """One accepted step. ``objective`` is ``loss + multiplier * nbytes`` before (behind the corrections of this step, which are
    of full rank) and after, under this step's multiplier; ``rose`` tells that it did not fall."""

    loss: float
    multiplier: float
    step: float
    backtracks: int
    nbytes: int
    before: float
    objective: float
    rose: bool


class _Log(Frozen):
    """The state without its tensors."""

    steps: tuple[IsvtStep, ...]
    history: list[dict[str, int | None]]
    size: float
    best: float | None
    best_step: int
    best_ranks: dict[str, int | None]


@dataclass
class IsvtState:
    """The iterate, its ranks after each step, the step size, and the best iterate that met the budget."""

    weights: dict[str, Tensor]
    steps: list[IsvtStep] = field(default_factory=list)
    history: list[dict[str, int | None]] = field(default_factory=list)
    size: float = 1.0
    best: float = float("inf")
    best_step: int = -1
    best_weights: dict[str, Tensor] = field(default_factory=dict)
    best_ranks: dict[str, int | None] = field(default_factory=dict)

    @property
    def settled(self) -> int:
        """Steps at the end during which no rank changed."""
        return next((n for n, ranks in enumerate(reversed(self.history)) if ranks != self.history[-1]), len(self.history))

    def save(self, file: Path, settings: Mapping[str, Any]) -> None:
        """Write the state; ``settings`` are what it fits."""
        tensors = {f"current.{name}": weight for name, weight in self.weights.items()}
        tensors |= {f"best.{name}": weight for name, weight in self.best_weights.items()}
        log = {
            "steps": [step.model_dump() for step in self.steps],
            "history": self.history,
            "size": self.size,
            "best": None if self.best_step < 0 else self.best,
            "best_step": self.best_step,
            "best_ranks": self.best_ranks,
        }
        header = {"settings": json.dumps(settings, sort_keys=True), "log": json.dumps(log)}
        write_tensors(file, tensors, header)

    @classmethod
    def load(cls, file: Path, settings: Mapping[str, Any], dense: dict[str, Tensor]) -> IsvtState:
        """The state in a file; that of the dense weights when there is no such file.

        Raises:
            CheckpointError: the file is broken, or was written with other settings.
        """
        if not file.exists():
            return cls(dense)
        try:
            tensors, header = read_tensors(file)
        except CheckpointError as error:
            raise CheckpointError(f"{str(file)!r} is no whole state file: {error}; delete it to start anew") from error
        wanted = json.dumps(settings, sort_keys=True)
        if header.get("settings") != wanted:
            raise CheckpointError(
                f"{str(file)!r} was written with other settings ({header.get('settings')}), these are {wanted}; "
                "delete it to start anew"
            )
        try:
            log = _Log.from_json(header["log"])
            weights = {name: tensors[f"current.{name}"].view(dense[name].shape) for name in dense}
            best = {name: tensors[f"best.{name}"] for name in dense if f"best.{name}" in tensors}
        except (KeyError, RuntimeError, ValueError) as error:
            raise CheckpointError(f"{str(file)!r} is no state of these weights: {error}; delete it to start anew") from error
        told = log.model_dump(exclude={"steps", "best"})
        return cls(weights, list(log.steps), best=float("inf") if log.best is None else log.best, best_weights=best, **told)


def content_hash(content: Any) -> str:
    """BLAKE2 over the tensors and plain values of nested dicts and sequences."""
    digest = hashlib.blake2b(digest_size=16)

    def take(part: Any) -> None:
        if isinstance(part, Tensor):
            flat = part.detach().cpu().contiguous().flatten()
            digest.update(f"{part.dtype}{tuple(part.shape)}".encode())
            digest.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
        elif isinstance(part, Mapping):
            digest.update(f"{{{len(part)}".encode())
            for key in sorted(part):
                digest.update(repr(key).encode())
                take(part[key])
        elif isinstance(part, list | tuple):
            digest.update(f"[{len(part)}".encode())
            for item in part:
                take(item)
        else:
            digest.update(repr(part).encode())

    take(content)
    return digest.hexdigest()

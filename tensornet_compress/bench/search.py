"""``bench search``: bytes at equal error of a search, of the usual formats and of other tools, tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from pydantic import JsonValue
from torch import Tensor

from tensornet_compress.bench import methods as _registered  # noqa: F401
from tensornet_compress.bench.common_measures import ERROR, STORED
from tensornet_compress.bench.harness import Job
from tensornet_compress.bench.search_case import SEARCH_METHODS, SearchCase, SearchMethod
from tensornet_compress.bench.tensors import TENSORS, BenchTensor, find_tensor
from tensornet_compress.errors import TensorNetError
from tensornet_compress.report import Measure

MEASURES = {
    "nbytes": STORED,
    "ratio": Measure(title="bytes over fp32", better="lower", explanation="Stored bytes / 4 bytes for each entry."),
    "error": ERROR,
    "gain": Measure(title="gain of ordering", better="higher", explanation="Bytes without ordering / bytes with it."),
    "null_gain": Measure(
        title="gain on shuffled entries", explanation="What the same search wins on the same entries shuffled: luck."
    ),
}


@dataclass(frozen=True)
class SearchSettings:
    """What a run of ``bench search`` does. ``errors``: relative errors to keep (a tensor's own tolerance multiplies them);
    ``budget``: seconds that our search may take for one row."""

    tensors: tuple[str, ...] | None = None
    errors: tuple[float, ...] = (0.1,)
    methods: tuple[str, ...] | None = None
    budget: float = 20.0
    quick: bool = True
    seed: int = 0

    @classmethod
    def full(cls, **changed: Any) -> SearchSettings:
        """All tensors at two errors."""
        whole: dict[str, Any] = {"errors": (0.1, 0.3), "budget": 30.0, "quick": False}
        return cls(**whole | changed)

    def chosen(self) -> list[BenchTensor]:
        """The tensors: those asked for, else all, else those of quick runs."""
        if self.tensors is not None:
            return [find_tensor(name) for name in dict.fromkeys(self.tensors)]
        return [tensor for tensor in TENSORS if tensor.quick or not self.quick]

    def as_json(self) -> dict[str, JsonValue]:
        """For ``Result.settings``."""
        made: dict[str, Any] = asdict(self)
        made["methods"] = [method.name for method in SEARCH_METHODS.choose(self.methods)]
        made["tensors"] = [tensor.name for tensor in self.chosen()]
        return {name: list(value) if isinstance(value, tuple) else value for name, value in made.items()}


@dataclass
class SearchBench:
    """Every method on every tensor at every error."""

    settings: SearchSettings
    _loaded: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.settings.errors or min(self.settings.errors) <= 0 or max(self.settings.errors) >= 1:
            raise TensorNetError(f"errors must lie between 0 and 1, were given {list(self.settings.errors)}")
        self.methods: list[SearchMethod] = SEARCH_METHODS.choose(self.settings.methods)
        self.tensors = self.settings.chosen()

    def describe(self) -> dict[str, JsonValue]:
        """The settings as data."""
        return self.settings.as_json()

    def measures(self) -> dict[str, Measure]:
        """Of the values that rows have."""
        return MEASURES

    def prepare(self) -> None:
        """Nothing: a tensor that cannot be loaded skips its own rows."""

    def release(self) -> None:
        """Let go of what was loaded."""
        self._loaded.clear()

    def jobs(self) -> Iterator[Job]:
        """Tensor by tensor."""

        def job(tensor: BenchTensor, method: SearchMethod, error: float) -> Job:
            return Job(
                "search",
                tensor.title,
                method.name,
                lambda: self.row(tensor, method, error),
                error,
                "relative error",
                method.ours,
            )

        for tensor in self.tensors:
            for error in self.settings.errors:
                for method in self.methods:
                    yield job(tensor, method, round(error * tensor.tolerance, 6))

    def row(self, tensor: BenchTensor, method: SearchMethod, error: float) -> dict[str, Any]:
        """One method on one tensor."""
        torch.manual_seed(self.settings.seed)
        if tensor.name not in self._loaded:
            self._loaded = {tensor.name: tensor.load()}
        data = self._loaded[tensor.name]
        found = method.run(SearchCase(data, error, self.settings.budget, self.settings.seed))
        if found.error is not None and found.error > error * (1 + 1e-6):
            raise TensorNetError(f"{method.name} has error {found.error:.4g}, asked for {error:g}")
        values = {"nbytes": float(found.nbytes), "ratio": found.nbytes / (4 * data.numel())} | found.values
        values |= {} if found.error is None else {"error": found.error}
        return {
            "values": values,
            "seed": self.settings.seed,
            "settings": {"explanation": method.explanation, "shape": list(data.shape)} | found.settings,
            "note": found.note,
            "drawings": found.drawings,
            "spectra": found.spectra,
        }

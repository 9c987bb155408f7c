"""``bench search``: bytes at equal error of a search, of the usual formats and of other tools, tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from pydantic import JsonValue
from torch import Tensor

from tensornet_compress.bench import methods as _registered  # noqa: F401
from tensornet_compress.bench.harness import ERROR, STORED, Job, lower
from tensornet_compress.bench.registry import Method
from tensornet_compress.bench.run import Bench, Settings
from tensornet_compress.bench.search_case import SEARCH_METHODS, SearchCase, Stored
from tensornet_compress.bench.tensors import TENSORS, BenchTensor, find_tensor
from tensornet_compress.errors import TensorNetError
from tensornet_compress.report import Measure

MEASURES = {
    "nbytes": STORED,
    "ratio": lower("bytes over fp32", explanation="Stored bytes / 4 bytes for each entry."),
    "error": ERROR,
    "gain": Measure(title="gain of ordering", better="higher", explanation="Bytes without ordering / bytes with it."),
    "null_gain": Measure(
        title="gain on shuffled entries", explanation="What the same search wins on the same entries shuffled: luck."
    ),
}


@dataclass(frozen=True)
class SearchSettings(Settings):
    """What a run of ``bench search`` does. ``tensors``: names or files, by default all (those of quick runs in a quick one);
    ``errors``: relative errors to keep, by default those of the tensor; ``budget``: seconds that our search may take for one
    row."""

    FULL: ClassVar[Mapping[str, Any]] = {"budget": 30.0}
    tensors: tuple[str, ...] | None = None
    errors: tuple[float, ...] | None = None
    methods: tuple[str, ...] | None = None
    budget: float = 20.0


class SearchBench(Bench[SearchSettings]):
    """Every method on every tensor at every error. A tensor that cannot be loaded skips its own rows."""

    task = "search"
    unit = "relative error"

    def __init__(self, settings: SearchSettings):
        if settings.errors is not None and not all(0 < error < 1 for error in settings.errors or (0.0,)):
            raise TensorNetError(f"errors must lie between 0 and 1, were given {list(settings.errors)}")
        super().__init__(settings, SEARCH_METHODS.choose(settings.methods))
        names = settings.tensors
        chosen = None if names is None else [find_tensor(name) for name in dict.fromkeys(names)]
        self.tensors = [tensor for tensor in TENSORS if tensor.quick or not settings.quick] if chosen is None else chosen
        self._loaded: dict[str, Tensor] = {}

    def describe(self) -> dict[str, JsonValue]:
        return super().describe() | {"tensors": [tensor.name for tensor in self.tensors]}

    def measures(self) -> dict[str, Measure]:
        return MEASURES

    def release(self) -> None:
        self._loaded.clear()

    def jobs(self) -> Iterator[Job]:
        """Tensor by tensor."""
        for tensor in self.tensors:
            usual = tensor.errors[:1] if self.settings.quick else tensor.errors
            for error in usual if self.settings.errors is None else self.settings.errors:
                for method in self.methods:
                    yield self.job(tensor.title, method, error, partial(self.row, tensor))

    def row(self, tensor: BenchTensor, method: Method[SearchCase, Stored], error: float) -> dict[str, Any]:
        """One method on one tensor."""
        if tensor.name not in self._loaded:
            self._loaded = {tensor.name: tensor.load()}
        data = self._loaded[tensor.name]
        stored = method.run(SearchCase(data, self.settings.budget, self.settings.seed), error)
        if stored.error is not None and stored.error > error * (1 + 1e-6):
            raise TensorNetError(f"{method.name} has error {stored.error:.4g}, asked for {error:g}")
        values = {"nbytes": float(stored.nbytes), "ratio": stored.nbytes / (4 * data.numel())} | stored.values
        values |= {} if stored.error is None else {"error": stored.error}
        return {
            "values": values,
            "settings": {"shape": list(data.shape)} | stored.settings,
            "note": stored.note,
            "drawings": stored.drawings,
            "spectra": stored.spectra,
        }

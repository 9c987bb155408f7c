"""A metric kept in a file until it is needed, so that memory need not hold those of all layers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file, save_file

from tensornet_compress.metric.metric import KroneckerMetric


@dataclass(frozen=True)
class StoredMetric:
    """A Kronecker metric in a safetensors file."""

    file: Path
    rate: float | None

    @classmethod
    def write(cls, metric: KroneckerMetric, file: Path) -> StoredMetric:
        """Write the factors of a metric to ``file``; one side that is None is left out."""
        factors = {"rows": metric.rows, "columns": metric.columns}
        save_file({name: factor.cpu().contiguous() for name, factor in factors.items() if factor is not None}, file)
        return cls(file, metric.rate)

    def load(self) -> KroneckerMetric:
        """The metric, number for number."""
        factors = load_file(self.file)
        return KroneckerMetric(factors.get("rows"), factors.get("columns"), self.rate)

"""What a compression did: per layer and in all, as data, JSON and text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from tensornet_compress.compressing.budget import Budget
from tensornet_compress.compressing.sizes import Sizes
from tensornet_compress.frozen import Frozen
from tensornet_compress.nn import Skipped, Target
from tensornet_compress.tensor import TensorNetwork


class LayerReport(Frozen):
    """One compressed layer. ``error`` is the squared error in the metric relative to the weight's own squared norm."""

    name: str
    kind: str
    family: str
    network: str
    weights: int
    nbytes: int
    original_nbytes: int
    error: float
    sensitivity: float | None = None
    note: str = ""

    @classmethod
    def of(cls, sizes: Sizes, target: Target, network: TensorNetwork, error: float, **more: Any) -> LayerReport:
        """The report of a target that became a network; ``more``: the other fields."""
        return cls(
            name=target.name,
            kind=target.kind,
            network=network.spec.describe(),
            weights=sizes.weights[target.name],
            nbytes=network.nbytes + sizes.fixed[target.name],
            original_nbytes=sizes.originals[target.name],
            error=error,
            **more,
        )

    @property
    def bits_per_weight(self) -> float:
        """8 x stored bytes / weights."""
        return 8 * self.nbytes / self.weights


class StageReport(Frozen):
    """One stage of a compression: divergence (nats per token, or one minus the cosine) on batches that no stage saw, the same
    on the ``selection`` batches that stages choose by, seconds, and whether its result was kept."""

    name: str
    divergence: float
    selection: float
    seconds: float
    kept: bool = True


class CompressionReport(Frozen):
    """Result of ``compress``: layers, skipped layers with reasons, bytes and the time of each stage.

    ``divergences``: output divergence on calibration tokens after each allocation (the least one was kept). ``stages``: what
    ``compress_in_stages`` measured after each of its stages.

    ``source``: the hub id and the commit that the model came from, empty for a folder.

    ``nbytes`` are the stored bytes of all tensors of the model, ``targeted_nbytes`` those of the targeted modules.
    """

    budget: Budget
    allocator: str
    method: str
    metric: str = "input"
    nbytes: int
    original_nbytes: int
    targeted_nbytes: int
    targeted_original_nbytes: int
    targeted_weights: int
    allowed_nbytes: int
    layers: tuple[LayerReport, ...]
    skipped: tuple[dict[str, str | int], ...]
    seconds: dict[str, float]
    divergences: tuple[float, ...] = ()
    stages: tuple[StageReport, ...] = ()
    notes: tuple[str, ...] = ()
    source: str = ""

    @classmethod
    def of(
        cls, budget: Budget, sizes: Sizes, layers: Sequence[LayerReport], skipped: Sequence[Skipped], **more: Any
    ) -> CompressionReport:
        """The report of a model whose targets became networks; ``more``: the other fields."""
        targeted = sum(layer.nbytes for layer in layers)
        return cls(
            budget=budget,
            nbytes=sizes.others + targeted,
            original_nbytes=sizes.original,
            targeted_nbytes=targeted,
            targeted_original_nbytes=sizes.targeted_original,
            targeted_weights=sum(sizes.weights.values()),
            allowed_nbytes=sizes.allowed + sum(sizes.fixed.values()),
            layers=tuple(layers),
            skipped=tuple(asdict(skip) for skip in skipped),
            **more,
        )

    @property
    def bits_per_weight(self) -> float:
        """8 x stored bytes of the targeted modules / their weights."""
        return 8 * self.targeted_nbytes / self.targeted_weights

    @property
    def share(self) -> float:
        """Bytes of the original that were compressed / all bytes of the original."""
        return self.targeted_original_nbytes / self.original_nbytes

    @property
    def ratio(self) -> float:
        """Stored bytes of the whole model / original bytes."""
        return self.nbytes / self.original_nbytes

    def summary(self) -> dict[str, Any]:
        """Headline figures, JSON-ready."""
        families: dict[str, int] = {}
        for layer in self.layers:
            families[layer.family] = families.get(layer.family, 0) + 1
        return {
            "bits_per_weight": self.bits_per_weight,
            "ratio": self.ratio,
            "share": self.share,
            "nbytes": self.nbytes,
            "targeted_nbytes": self.targeted_nbytes,
            "allowed_nbytes": self.allowed_nbytes,
            "families": families,
            "divergences": list(self.divergences),
            "metric": self.metric,
            "stages": [stage.model_dump() for stage in self.stages],
            "seconds": self.seconds,
        }

    def __str__(self) -> str:
        lines = [
            f"{len(self.layers)} layers, {self.share:.1%} of the model, at {self.bits_per_weight:.3f} bits per weight "
            f"(budget: {self.budget}); "
            f"model {self.nbytes:,} of {self.original_nbytes:,} bytes, ratio {self.ratio:.4f}"
        ]
        counts = self.summary()["families"].items()
        families = ", ".join(f"{count} {'single matrices' if family == 'dense' else family}" for family, count in counts)
        lines.append(f"stored as: {families}; {len(self.skipped)} layers left alone")
        for stage in self.stages:
            dropped = "" if stage.kept else " (not kept)"
            measured = f"divergence {stage.divergence:.5g} on held-out batches ({stage.selection:.5g} on those to choose by)"
            lines.append(f"{stage.name}: {measured}, {stage.seconds:.0f} s{dropped}")
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)

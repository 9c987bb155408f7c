"""Sorted entries (EinSort, 2606.08565) as the number format of a core: an order with ties, and a network of the sorted values.

A core is cut in runs of consecutive entries: a row, a block of a row, or all entries. Each run is sorted and cut in K groups,
of the same sizes in all runs, and entries of a group share a number. The order is entropy-coded (``coding/tied_orders.py``),
and the numbers (runs | groups) are two cores of a small rank: of rank 1, one profile for all runs and a scale for each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from tensornet_compress.coding.tied_orders import MOST_GROUPS, decode_orders, encode_orders, most_order_nbytes
from tensornet_compress.errors import TensorNetError
from tensornet_compress.frozen import Frozen


class SortedFormat(Frozen):
    """Entries sorted in runs of ``run``, with ties; the sorted values have ``rank``.

    ``step``: groups are the entries that the mean sorted run, in deviations of a run, rounds to one multiple of it; 0 makes
    ``groups`` of equal sizes (but for one entry). ``groups`` and the ``stored`` bytes of the order follow from a core's
    numbers: a format tells those of the core that it is the format of. In memory the order is a byte an entry, its group.
    """

    kind: Literal["sorted"] = "sorted"
    run: int = Field(ge=1)
    rank: int = Field(default=1, ge=1)
    step: float = Field(default=0.0, ge=0)
    groups: int = Field(default=0, ge=0, le=MOST_GROUPS)
    stored: int = Field(default=0, ge=0)

    coded_part: ClassVar[str] = "_ties"
    resident_parts: ClassVar[tuple[str, ...]] = ("_group", "_scale", "_profile")

    @property
    def name(self) -> str:
        """Short name."""
        return f"sorted{self.groups or ''}g{self.run}"

    def parts(self, shape: tuple[int, ...]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shapes and dtypes of the stored parts of a core of ``shape``.

        Raises:
            TensorNetError: runs do not divide the core.
        """
        runs, rest = divmod(prod(shape), self.run)
        if rest:
            raise TensorNetError(f"runs of {self.run} entries do not divide a core of shape {shape}; choose a divisor")
        return {
            "_ties": ((self.stored,), torch.uint8),
            "_scale": ((runs, self.rank), torch.float16),
            "_profile": ((self.rank, self.groups), torch.float32),
        }

    def encode(self, core: Tensor) -> dict[str, Tensor]:
        """Sort, tie and fit; bytes and groups are known only afterwards (``of``)."""
        self.parts(tuple(core.shape))
        runs = SortedRuns(core.detach().reshape(-1, self.run))
        sizes = runs.sizes(self.step) if self.step else runs.equal(self.groups)
        scale, profile = runs.levels(sizes, self.rank)
        order = torch.from_numpy(encode_orders(runs.groups(sizes).cpu().numpy(), sizes)).to(core.device)
        return {"_ties": order, "_scale": scale, "_profile": profile}

    def of(self, parts: Mapping[str, Tensor]) -> SortedFormat:
        """The format of these stored parts."""
        return self.model_copy(update={"stored": parts["_ties"].numel(), "groups": parts["_profile"].shape[1]})

    def resident(self, parts: Mapping[str, Tensor], shape: tuple[int, ...]) -> dict[str, Tensor]:
        """Stored parts -> what a module keeps in memory beside the values: ``_group`` of every entry, uint8 (runs, run).

        Raises:
            CheckpointError: the bytes are damaged.
        """
        order = parts["_ties"]
        found = decode_orders(order.cpu().numpy(), prod(shape) // self.run, self.run, self.groups)
        return {"_group": torch.from_numpy(found).to(order.device)}

    def decode(self, parts: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Stored or resident parts -> core of ``shape`` in ``dtype``; differentiable in the values."""
        levels = parts["_scale"].float() @ parts["_profile"].float()
        return levels.gather(1, self._groups(parts, shape).long()).to(dtype).view(shape)

    def decode_rows(self, parts: Mapping[str, Tensor], shape: tuple[int, ...], rows: Tensor, dtype: torch.dtype) -> Tensor:
        """Slices ``rows`` (int64, (k,)) of the first axis, decoded: shape (k, *shape[1:])."""
        width = prod(shape[1:])
        group = self._groups(parts, shape).view(shape[0], width).index_select(0, rows).long()
        run = (rows[:, None] * width + torch.arange(width, device=rows.device)) // self.run
        values = (parts["_scale"].float()[run] * parts["_profile"].float().T[group]).sum(-1)
        return values.to(dtype).view(len(rows), *shape[1:])

    def _groups(self, parts: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor:
        return parts["_group"] if "_group" in parts else self.resident(parts, shape)["_group"]

    def most_nbytes(self, entries: int, sizes: Sequence[int]) -> int:
        """Bytes that a core of so many entries stays within whose groups have these sizes."""
        runs = entries // self.run
        return most_order_nbytes(runs, sizes) + 2 * runs * self.rank + 4 * self.rank * len(sizes)


@dataclass
class SortedRuns:
    """Runs (runs, run), sorted once; ``sizes`` below are the numbers of entries in each group, from the least values up."""

    runs: Tensor

    def __post_init__(self) -> None:
        self.ordered, self.order = self.runs.double().sort(dim=1, stable=True)

    @cached_property
    def mean_run(self) -> Tensor:
        """Mean of the sorted runs, each less its mean and over its deviation, float64 (run,)."""
        centred = self.ordered - self.ordered.mean(1, keepdim=True)
        return (centred / centred.square().mean(1, keepdim=True).sqrt().clamp_min(1e-300)).mean(0)

    def sizes(self, step: float) -> list[int]:
        """Sizes of groups as ``step`` makes them.

        Raises:
            TensorNetError: there are more groups than a byte tells apart.
        """
        counts: list[int] = (self.mean_run / step).round().unique_consecutive(return_counts=True)[1].tolist()
        if len(counts) > MOST_GROUPS:
            raise TensorNetError(f"a step of {step:.3g} makes {len(counts)} groups, at most {MOST_GROUPS} can be; enlarge it")
        return counts

    def few(self, step: float) -> bool:
        """Whether a step makes no more groups than a byte tells apart."""
        return len((self.mean_run / step).round().unique_consecutive()) <= MOST_GROUPS

    def equal(self, groups: int) -> list[int]:
        """Sizes of so many equal groups.

        Raises:
            TensorNetError: there are more groups than entries in a run, or none.
        """
        run = self.runs.shape[1]
        if not 1 <= groups <= min(run, MOST_GROUPS):
            raise TensorNetError(f"a run of {run} entries has 1 to {min(run, MOST_GROUPS)} groups, was given {groups}")
        return [run * (group + 1) // groups - run * group // groups for group in range(groups)]

    def groups(self, sizes: Sequence[int]) -> Tensor:
        """Group of every entry, uint8 (runs, run)."""
        return self._labels(sizes)[self.places]

    def levels(self, sizes: Sequence[int], rank: int) -> tuple[Tensor, Tensor]:
        """The values as two cores, fp16 (runs, rank) and fp32 (rank, groups), nearest to the sorted runs: from the leading
        components of group means. Scales reach 1, and are positive in the mean, which fixes the gauge."""
        counts = torch.tensor(sizes, device=self.runs.device)
        root = counts.double().sqrt()
        means = self._sums[:, torch.nn.functional.pad(counts.cumsum(0), (1, 0))].diff() / root
        axes = torch.linalg.eigh(means.T @ means)[1].flip(1)[:, :rank]
        axes = torch.nn.functional.pad(axes, (0, rank - axes.shape[1]))
        scale, profile = means @ axes, (axes / root[:, None]).T
        peak = scale.abs().amax(0).clamp_min(1e-300) * torch.where(scale.sum(0) < 0, -1.0, 1.0)
        return (scale / peak).half(), (profile * peak[:, None]).float()

    def rows(self, sizes: Sequence[int], rank: int, width: int, rows: slice = slice(None)) -> Tensor:
        """What decodes of a matrix of ``width`` columns, or of some of its rows, float32."""
        scale, profile = self.levels(sizes, rank)
        entries = torch.arange(self.runs.numel(), device=self.runs.device).view(-1, width)[rows]
        group = self._labels(sizes)[self.places.view(-1, width)[rows]].long()
        return (scale.float() @ profile)[entries // self.runs.shape[1], group]

    @cached_property
    def places(self) -> Tensor:
        """Where every entry lies in its sorted run, int64 (runs, run)."""
        return self.order.argsort(1)

    @cached_property
    def _sums(self) -> Tensor:
        """Sums of the first 0, 1, ... entries of the sorted runs, float64 (runs, run + 1)."""
        return torch.nn.functional.pad(self.ordered.cumsum(1), (1, 0))

    def _labels(self, sizes: Sequence[int]) -> Tensor:
        """Group of every place of a sorted run, uint8 (run,)."""
        counts = torch.tensor(sizes, device=self.runs.device)
        return torch.arange(len(sizes), dtype=torch.uint8, device=self.runs.device).repeat_interleave(counts)

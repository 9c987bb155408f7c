"""What calibration sums up over sequences, and keeping it on disk, so that a calibration that was killed goes on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Self

import torch
from safetensors.torch import load, save_file
from torch import Tensor

from tensornet_compress.calibrate import InputMoment
from tensornet_compress.errors import TensorNetError
from tensornet_compress.files.steps import Steps
from tensornet_compress.kv.profile.capture import Captured
from tensornet_compress.kv.profile.moments import RIDGE, QueryMoments, SideMoments, side_rows
from tensornet_compress.kv.profile.profile import SIDES
from tensornet_compress.kv.rope import Rotary
from tensornet_compress.metric.blocks import ridged

STATISTICS_EVERY = 5
"""Every so many sequences one is kept whole, for statistics of what the others teach."""
_MOST_JOINED_CHANNELS = 16384
_KEPT_EVERY = 8
_TOLD = ("heads", "widths", "seen", "felt", "longest")


class Sums:
    """What calibration sums up over sequences; ``kept``: rows of those that statistics come from."""

    def __init__(self, sinks: int):
        self.sinks, self.seen, self.felt, self.longest = sinks, 0, 0, 0
        self.kept: list[dict[str, Tensor]] = []

    def _begin(self, layers: Sequence[int], heads: list[int], widths: dict[str, int]) -> None:
        self.layers, self.heads, self.widths = layers, heads, widths
        units = sum(self.heads)
        self.moments = {side: SideMoments(units * width) for side, width in self.widths.items()}
        self.sensitivity = {side: InputMoment() for side in SIDES}
        self.queries = QueryMoments(units, self.widths["key"])

    def add(self, captured: Captured, gradients: Iterable[tuple[Tensor, Tensor]] = ()) -> None:
        """One sequence, and the gradients (units, tokens, width) of both sides for every label draw."""
        if not self.seen:
            widths = {side: _width(side, states) for side, states in zip(SIDES, (captured.keys, captured.values))}
            self._begin(captured.layers, [len(k) for k in captured.keys], widths)
        self.longest = max(self.longest, captured.keys[0].shape[1])
        if captured.queries:
            self.queries.add(captured.queries, captured.scaling, self.heads)
        if captured.felt:
            keys, values = (torch.cat([layer[side] for layer in captured.felt])[:, self.sinks :] for side in (0, 1))
            gradients = [(keys, values)]
        rows = side_rows(captured, self.sinks)
        # Scales and symbol statistics come from sequences the bases have not seen, or they would look too small.
        if self.seen % STATISTICS_EVERY == STATISTICS_EVERY - 1:
            self.kept.append({side: own.half() for side, own in rows.items()})
        else:
            for side in SIDES:
                self.moments[side].add(rows[side])
        for pair in gradients:
            for side, gradient in zip(SIDES, pair):
                self.sensitivity[side].add(gradient)
        self.seen += 1

    def metric(self, kind: str, rotary: Rotary | None) -> dict[str, Tensor]:
        """The metric of every unit, fp64 (units, width, width); divided by the mean curvature of both sides."""
        units = sum(self.heads)
        if kind == "euclidean":
            return {side: torch.eye(width, dtype=torch.float64).repeat(units, 1, 1) for side, width in self.widths.items()}
        if kind == "queries" and not self.queries.count:
            blocks = self._relative(units)
        elif kind == "queries":
            spread = self.moments["value"].covariance().diagonal().double().view(units, -1).sum(1)
            pair = self.queries.metric(spread, self.widths["value"], self.heads, rotary, self.longest)
            blocks = dict(zip(SIDES, pair))
        else:
            blocks = {side: ridged(self.sensitivity[side].mean, RIDGE) for side in SIDES}
        for side in SIDES:
            check_finite(f"{side} sensitivity", blocks[side])
        common = sum(float(b.diagonal(dim1=-2, dim2=-1).mean()) for b in blocks.values()) / len(blocks)
        return {side: block / common for side, block in blocks.items()}

    def _relative(self, units: int) -> dict[str, Tensor]:
        """What outputs feel, of every layer in parts of what they feel of all that its states vary."""
        blocks = {side: ridged(self.sensitivity[side].mean, RIDGE) for side in SIDES}
        moved = torch.zeros(units, dtype=torch.float64)
        for side, width in self.widths.items():
            own = self.moments[side].covariance().double().view(units, width, units, width)
            moved += (own.diagonal(dim1=0, dim2=2).permute(2, 0, 1) * blocks[side]).sum((1, 2))
        layers = torch.cat([part.sum().expand(len(part)) for part in moved.split(self.heads)]).clamp_min(1e-30)
        return {side: block / layers[:, None, None] for side, block in blocks.items()}

    def keep(self, steps: Steps, batches: int, generator: torch.Generator) -> None:
        """Record now and then what ``batches`` have told, and where random draws go on."""
        if not steps.lasting or batches % _KEPT_EVERY or self.queries.count:
            return
        tensors: dict[str, Tensor | None] = {"generator": generator.get_state()}
        for side in SIDES:
            tensors |= {f"{side}.total": self.moments[side].total, f"{side}.products": self.moments[side].products.sum}
            tensors |= {f"{side}.sensitivity": self.sensitivity[side].sum}
            tensors |= {f"{side}.kept{number}": rows[side] for number, rows in enumerate(self.kept)}
        held = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        told = {name: getattr(self, name) for name in _TOLD} | {"layers": list(self.layers), "batches": batches}
        told["counts"] = {side: [self.moments[side].count, self.sensitivity[side].count] for side in SIDES}
        before = sorted(steps.folder.glob("sums-*.safetensors"))
        file = steps.folder / f"sums-{batches}.safetensors"
        save_file(held, file)
        steps.finish("sums", told | {"kept": len(self.kept)}, [file])
        for old in before:
            if old != file:
                old.unlink(missing_ok=True)

    @classmethod
    def found(cls, steps: Steps, sinks: int, generator: torch.Generator) -> tuple[Self, int]:
        """What an earlier run recorded, and after how many batches."""
        sums, told = cls(sinks), steps.found("sums")
        if told is None:
            return sums, 0
        file = steps.folder / f"sums-{told['batches']}.safetensors"
        tensors = load(file.read_bytes())
        sums._begin(told["layers"], told["heads"], told["widths"])
        for name in ("seen", "felt", "longest"):
            setattr(sums, name, told[name])
        for side in SIDES:
            products, felt = told["counts"][side]
            sums.moments[side].total = tensors[f"{side}.total"]
            sums.moments[side].products = InputMoment(tensors.get(f"{side}.products"), products)
            sums.sensitivity[side] = InputMoment(tensors.get(f"{side}.sensitivity"), felt)
        sums.kept = [{side: tensors[f"{side}.kept{number}"] for side in SIDES} for number in range(told["kept"])]
        generator.set_state(tensors["generator"])
        return sums, int(told["batches"])


def _width(side: str, states: list[Tensor]) -> int:
    widths = {s.shape[-1] for s in states}
    if len(widths) > 1:
        raise TensorNetError(
            f"{side} heads have widths {sorted(widths)}; joint coding needs one width across full-attention layers"
        )
    units, width = sum(len(s) for s in states), widths.pop()
    if units * width > _MOST_JOINED_CHANNELS:
        raise TensorNetError(
            f"{units} {side} units of {width} channels make {units * width}; joint moments take at most {_MOST_JOINED_CHANNELS}"
        )
    return width


def check_finite(name: str, tensor: Tensor) -> None:
    if not torch.isfinite(tensor).all():
        raise TensorNetError(f"calibration gave NaN or infinity in {name}; check the model's dtype and the batches")

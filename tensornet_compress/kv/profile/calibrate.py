"""Calibration: one pass of moments, a few backward passes of sensitivity, then the tree."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tensornet_compress.bisection import least_kept
from tensornet_compress.calibrate import InputMoment
from tensornet_compress.coding.cache_quantiser import Statistics
from tensornet_compress.decompose.groups import consecutive_groups, search_groups
from tensornet_compress.errors import TensorNetError
from tensornet_compress.kv.live.codec import LiveBasis, live_bases, live_curve
from tensornet_compress.kv.profile.capture import Captured, Runner, Window, windows
from tensornet_compress.kv.profile.moments import RIDGE, QueryMoments, SideMoments, side_rows
from tensornet_compress.kv.profile.profile import SIDES, Profile, ProfileSpec, SideSpec
from tensornet_compress.kv.profile.tree import SideTree, build_tree
from tensornet_compress.kv.rope import Rotary
from tensornet_compress.metric.blocks import ridged, symmetric_roots, whiten
from tensornet_compress.threads import limited_threads

_STATISTICS_EVERY = 5
_STATISTICS_RATES = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0)
_MAX_JOINED_CHANNELS = 16384


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    metric: Literal["fisher", "queries", "euclidean"] = "fisher",
    sensitivity_windows: int = 32,
    draws: int = 2,
    group_size: int | None = None,
    joined: int = 200,
    search: bool = True,
    sinks: int = 4,
    window: int = 64,
    seed: int = 0,
) -> Profile:
    """Learn how to code a model's cache.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = dict(vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4)
    >>> model = LlamaForCausalLM(LlamaConfig(**sizes))
    >>> profile = calibrate(model, [torch.randint(50, (1, 96)) for _ in range(5)], sensitivity_windows=2, draws=1)
    >>> profile.spec.layers, profile.spec.heads
    ([0, 1], [4, 4])

    Args:
        model: a transformers causal language model, or one with an encoder; left as found.
        batches: int64 ids (batch, length), or mappings with ``input_ids`` and ``attention_mask``; for a model with an encoder
            mappings of what it reads, ``decoder_input_ids`` and perhaps ``decoder_attention_mask``. Use clearly more tokens
            than a token caches channels; windows of 1000 tokens and more also show what far context is worth.
        metric: ``fisher`` weighs errors of keys and values by the curvature of the KL divergence (backward passes over
            ``sensitivity_windows`` sequences, each with its natural continuation and a verbatim copy of a far span, ``draws``
            label draws each);
            ``queries`` weighs errors by what they do to attention outputs, from second moments of the queries; it needs no
            backward pass, but through single attention modules where queries do not meet the cached keys in
            ``scaled_dot_product_attention``; ``euclidean`` weighs all channels alike.
        group_size: (layer, head) units that share a basis; default a sixth of all units.
        joined: leading components of each group that the root joins (0: no root).
        search: look for groups by mutual information; else units in their own order.
        sinks, window: what the cache will keep exact, and calibration therefore leaves out.

    It runs on one thread, so that the profile does not depend on how many there are.

    Raises:
        TensorNetError: no batches, no full-attention layer, or layers whose heads differ in width.
    """
    # On several threads sums are rounded in another order, and saved caches open only with the very profile of their codes.
    with limited_threads(1), torch.inference_mode(False):
        return _calibrated(model, batches, metric, sensitivity_windows, draws, group_size, joined, search, sinks, window, seed)


def _calibrated(
    model: nn.Module,
    batches: Iterable[Any],
    metric: Literal["fisher", "queries", "euclidean"],
    sensitivity_windows: int,
    draws: int,
    group_size: int | None,
    joined: int,
    search: bool,
    sinks: int,
    window: int,
    seed: int,
) -> Profile:
    generator = torch.Generator().manual_seed(seed)
    felt, streamed = 0 if metric == "fisher" else sensitivity_windows, _Streamed(sinks)
    with Runner(model) as runner:
        for batch in windows(batches, runner.paired):
            if felt >= sensitivity_windows:
                for captured in runner.capture(batch, metric == "queries"):
                    streamed.add(captured)
                continue
            for row in batch.rows():
                streamed.add(*_felt(runner, row, sinks, window, draws, generator))
                felt += 1
        style, rotary = runner.style, runner.rotary()
    if not streamed.seen:
        raise TensorNetError("calibration was given no batches; pass an iterable of int64 ids (batch, length)")
    if not streamed.kept:
        raise TensorNetError(
            f"calibration was given {streamed.seen} sequences and needs at least {_STATISTICS_EVERY}: "
            "some measure what others teach"
        )
    blocks = streamed.metric(metric, rotary)
    trees: dict[str, SideTree] = {}
    live: dict[str, list[LiveBasis]] = {}
    grouping_bits: dict[str, dict[str, float]] = {}
    for side in SIDES:
        mean, covariance = streamed.moments[side].mean(), streamed.moments[side].covariance()
        _check_finite(f"{side} moments", covariance)
        roots = symmetric_roots(blocks[side])[0].float()
        size = group_size or max(1, -(-len(roots) // 6))
        groups, grouping_bits[side] = consecutive_groups(len(roots), size), {}
        if search:
            weighted = whiten(covariance, roots)
            groups, grouping_bits[side] = search_groups(weighted, _noise(weighted), roots.shape[-1], size)
        trees[side] = build_tree(covariance, mean, roots, groups, joined)
        live[side] = live_bases(covariance, mean, blocks[side], streamed.heads, rotary if side == "key" else None)
    scale, frequency, offset = _statistics(trees, streamed.kept)
    curve = live_curve(live, streamed.kept, sinks, streamed.heads, rotary)
    spec = ProfileSpec(
        layers=list(streamed.layers),
        heads=streamed.heads,
        rotary=style,
        metric=metric,
        key=SideSpec.of(trees["key"]),
        value=SideSpec.of(trees["value"]),
        calibration_tokens=streamed.moments["key"].count,
        grouping_bits=grouping_bits,
    )
    return Profile(spec, trees, scale, frequency, offset, live, curve)


class _Streamed:
    """What calibration sums up over sequences; ``kept``: rows of those that statistics come from."""

    def __init__(self, sinks: int):
        self.sinks, self.seen, self.longest = sinks, 0, 0
        self.kept: list[dict[str, Tensor]] = []

    def _begin(self, first: Captured) -> None:
        self.layers, self.heads = first.layers, [len(k) for k in first.keys]
        self.widths = {side: _width(side, states) for side, states in zip(SIDES, (first.keys, first.values))}
        units = sum(self.heads)
        self.moments = {side: SideMoments(units * width) for side, width in self.widths.items()}
        self.sensitivity = {side: InputMoment() for side in SIDES}
        self.queries = QueryMoments(units, self.widths["key"])

    def add(self, captured: Captured, gradients: Iterable[tuple[Tensor, Tensor]] = ()) -> None:
        """One sequence, and the gradients (units, tokens, width) of both sides for every label draw."""
        if not self.seen:
            self._begin(captured)
        self.longest = max(self.longest, captured.keys[0].shape[1])
        if captured.queries:
            self.queries.add(captured.queries, captured.scaling, self.heads)
        if captured.felt:
            keys, values = (torch.cat([layer[side] for layer in captured.felt])[:, self.sinks :] for side in (0, 1))
            gradients = [(keys, values)]
        rows = side_rows(captured, self.sinks)
        # Scales and symbol statistics come from sequences the bases have not seen, or they would look too small.
        if self.seen % _STATISTICS_EVERY == _STATISTICS_EVERY - 1:
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
            _check_finite(f"{side} sensitivity", blocks[side])
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


def _felt(
    runner: Runner, row: Window, sinks: int, window: int, draws: int, generator: torch.Generator
) -> tuple[Captured, Iterable[tuple[Tensor, Tensor]]]:
    """What one sequence caches, but for its end, and the gradients of what follows at the coded tokens."""
    sequence = row.ids
    ahead = max(1, min(128, sequence.shape[1] // 8))
    prefix = sequence[:, : sequence.shape[1] - ahead]
    ones = torch.ones_like(prefix)
    cache, positions = runner.prefill(prefix, ones, row.encoder)
    captured = next(iter(runner.captured(cache, positions, ones)))
    # A natural continuation and a verbatim copy of a far span: natural text alone hides what recall needs.
    edge = min(window, prefix.shape[1] // 4)
    latest = max(0, prefix.shape[1] - edge - ahead)
    start = int(torch.randint(min(sinks, latest), latest + 1, (1,), generator=generator))
    continuations = torch.cat([sequence[:, prefix.shape[1] :], prefix[:, start : start + ahead]])
    counted = slice(sinks, prefix.shape[1] - edge)
    pairs = runner.sensitivity(cache, positions, continuations, draws, generator, row.encoder)
    return captured, ((torch.cat(keys)[:, counted], torch.cat(values)[:, counted]) for keys, values in pairs)


def _width(side: str, states: list[Tensor]) -> int:
    widths = {s.shape[-1] for s in states}
    if len(widths) > 1:
        raise TensorNetError(
            f"{side} heads have widths {sorted(widths)}; joint coding needs one width across full-attention layers"
        )
    units, width = sum(len(s) for s in states), widths.pop()
    if units * width > _MAX_JOINED_CHANNELS:
        raise TensorNetError(
            f"{units} {side} units of {width} channels make {units * width}; joint moments take at most {_MAX_JOINED_CHANNELS}"
        )
    return width


def _check_finite(name: str, tensor: Tensor) -> None:
    if not torch.isfinite(tensor).all():
        raise TensorNetError(f"calibration gave NaN or infinity in {name}; check the model's dtype and the batches")


def _noise(weighted: Tensor) -> float:
    """The water level at two bits per channel of separate Gaussian channels: the noise that grouping is judged under."""
    variance = weighted.diagonal().clamp_min(1e-20).double()

    def fits(level: float) -> bool:
        return float((0.5 * (variance / level).clamp_min(1).log2()).mean()) <= 2.0

    return least_kept(fits, float(variance.min()) * 1e-6, float(variance.max()), steps=60)


def _statistics(trees: dict[str, SideTree], kept: list[dict[str, Tensor]]) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Scales of the coefficients of both sides, and symbol statistics (frequency, offset)."""
    coefficients = [{side: trees[side].analyse(rows[side].float()).half() for side in SIDES} for rows in kept]
    count = sum(len(rows["key"]) for rows in coefficients)
    scale: dict[str, Tensor] = {}
    for side in SIDES:
        total = torch.stack([rows[side].double().abs().sum(0) for rows in coefficients]).sum(0)
        scale[side] = (total / max(count, 1)).float().clamp_min(1e-12)
    median = torch.cat([scale[side] for side in SIDES]).log2().median()
    statistics = Statistics()
    for rate in _STATISTICS_RATES:
        step = float((median + 1.5 - rate).exp2())
        for rows in coefficients:
            for side in SIDES:
                statistics.count(rows[side].float(), scale[side], step)
    return scale, *statistics.finish()

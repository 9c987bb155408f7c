"""Calibration: one pass of moments, a few backward passes of sensitivity, then the tree."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tensornet_compress.coding.entropy import Statistics
from tensornet_compress.errors import TensorNetError
from tensornet_compress.kv.live.calibrate import live_bases, live_curve
from tensornet_compress.kv.live.codec import LiveBasis
from tensornet_compress.kv.profile.capture import Captured, Runner, Window, windows
from tensornet_compress.kv.profile.grouping import consecutive_groups, search_groups
from tensornet_compress.kv.profile.moments import SideMoments, SideSensitivity, side_rows
from tensornet_compress.kv.profile.profile import SIDES, Profile, ProfileSpec, check_finite, side_spec
from tensornet_compress.kv.profile.queries import QueryMoments
from tensornet_compress.kv.profile.tree import SideTree, build_tree, whiten

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

    Args:
        model: a transformers causal language model; left as found.
        batches: int64 ids (batch, length), or mappings with ``input_ids`` and ``attention_mask``. Use clearly more tokens
            than a token caches channels; windows of 1000 tokens and more also show what far context is worth.
        metric: ``fisher`` weighs errors of keys and values by the curvature of the KL divergence (backward passes over
            ``sensitivity_windows`` sequences, each with its natural continuation and a verbatim copy of a far span, ``draws``
            label draws each);
            ``queries`` weighs errors by what they do to attention outputs, from second moments of the queries; it needs no
            backward pass; ``euclidean`` weighs all channels alike.
        group_size: (layer, head) units that share a basis; default a sixth of all units.
        joined: leading components of each group that the root joins (0: no root).
        search: look for groups by mutual information; else units in their own order.
        sinks, window: what the cache will keep exact, and calibration therefore leaves out.

    Raises:
        TensorNetError: no batches, no full-attention layer, or layers whose heads differ in width.
    """
    moments: dict[str, SideMoments] = {}
    sensitivity: dict[str, SideSensitivity] = {}
    asked: QueryMoments | None = None
    longest = 0
    kept: list[dict[str, Tensor]] = []
    first: Captured | None = None
    generator = torch.Generator().manual_seed(seed)
    seen = 0
    with Runner(model) as runner:
        for batch in windows(batches):
            feels = metric == "fisher" and seen < sensitivity_windows
            passes = _passes(runner, batch, feels, metric == "queries", sinks, window, draws, generator)
            for captured, gradients in passes:
                if first is None:
                    first = captured
                    for side, states in (("key", captured.keys), ("value", captured.values)):
                        units, width = _units(side, states)
                        moments[side] = SideMoments(units * width)
                        sensitivity[side] = SideSensitivity(units, width)
                heads = [len(k) for k in captured.keys]
                longest = max(longest, captured.keys[0].shape[1])
                if metric == "queries":
                    asked = asked or QueryMoments(sum(heads), captured.keys[0].shape[-1])
                    asked.add(captured.queries, captured.scaling, heads)
                rows = side_rows(captured, sinks)
                # Scales and symbol statistics come from sequences the bases have not seen, or they would look too small.
                if seen % _STATISTICS_EVERY == _STATISTICS_EVERY - 1:
                    kept.append({side: r.half() for side, r in rows.items()})
                else:
                    for side in SIDES:
                        moments[side].add(rows[side])
                for pair in gradients:
                    for side, gradient in zip(SIDES, pair):
                        sensitivity[side].add(gradient)
                seen += 1
        style, rotary = runner.style, runner.rotary()
    if first is None:
        raise TensorNetError("calibration was given no batches; pass an iterable of int64 ids (batch, length)")
    if not kept:
        raise TensorNetError(
            f"calibration was given {seen} sequences and needs at least {_STATISTICS_EVERY}: some measure what others teach"
        )
    if asked is not None:
        spread = moments["value"].covariance().diagonal().double().view(len(asked.blocks), -1).sum(1)
        width, counts = first.values[0].shape[-1], [len(k) for k in first.keys]
        blocks = _on_one_scale(dict(zip(SIDES, asked.metric(spread, width, counts, rotary, longest))))
    else:
        blocks = _metric_blocks(metric, sensitivity, {side: moments[side].mean().numel() for side in SIDES}, first)
    roots = {side: _roots(block) for side, block in blocks.items()}
    live: dict[str, list[LiveBasis]] = {}
    trees: dict[str, SideTree] = {}
    found: dict[str, dict[str, float]] = {}
    for side in SIDES:
        covariance = check_finite(f"{side} moments", moments[side].covariance())
        units = len(roots[side])
        size = group_size or max(1, -(-units // 6))
        if search:
            weighted = whiten(covariance, roots[side].float())
            groups, found[side] = search_groups(weighted, _noise(weighted), roots[side].shape[-1], size)
        else:
            groups, found[side] = consecutive_groups(units, size), {}
        trees[side] = build_tree(covariance, moments[side].mean(), roots[side], groups, joined)
        live[side] = live_bases(
            covariance,
            moments[side].mean(),
            blocks[side],
            [len(k) for k in first.keys],
            rotary if side == "key" else None,
        )
    scale, frequency, offset = _statistics(trees, kept)
    curve = live_curve(live, kept, sinks, [len(k) for k in first.keys], rotary)
    spec = ProfileSpec(
        layers=list(first.layers),
        heads=[len(k) for k in first.keys],
        rotary=style,
        metric=metric,
        key=side_spec(trees["key"]),
        value=side_spec(trees["value"]),
        calibration_tokens=moments["key"].count,
        grouping_bits=found,
    )
    return Profile(spec, trees, scale, frequency, offset, live, curve)


def _passes(
    runner: Runner,
    batch: Window,
    feels: bool,
    listens: bool,
    sinks: int,
    window: int,
    draws: int,
    generator: torch.Generator,
) -> Iterator[tuple[Captured, Iterator[tuple[Tensor, Tensor]]]]:
    """Per sequence of a batch: its states, and the gradients (units, tokens, width) of both sides for every label draw."""
    if not feels:
        for captured in runner.capture(batch, listens):
            yield captured, iter(())
        return
    for ids, mask in zip(batch.ids, batch.mask):
        sequence = ids[mask.bool()][None]
        ahead = max(1, min(128, sequence.shape[1] // 8))
        prefix = sequence[:, : sequence.shape[1] - ahead]
        ones = torch.ones_like(prefix)
        cache, positions = runner.prefill(prefix, ones)
        captured = next(iter(runner.captured(cache, positions, ones)))
        # A natural continuation and a verbatim copy of a far span: natural text alone hides what recall needs.
        edge = min(window, prefix.shape[1] // 4)
        latest = max(0, prefix.shape[1] - edge - ahead)
        start = int(torch.randint(min(sinks, latest), latest + 1, (1,), generator=generator))
        continuations = torch.cat([sequence[:, prefix.shape[1] :], prefix[:, start : start + ahead]])
        counted = slice(sinks, prefix.shape[1] - edge)
        found = runner.sensitivity(cache, positions, continuations, draws, generator)
        yield captured, ((torch.cat(keys)[:, counted], torch.cat(values)[:, counted]) for keys, values in found)


def _units(side: str, states: list[Tensor]) -> tuple[int, int]:
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
    return units, width


def _metric_blocks(
    metric: str, sensitivity: dict[str, SideSensitivity], channels: dict[str, int], first: Captured
) -> dict[str, Tensor]:
    """The metric of every unit, fp64 (units, width, width), on one common scale for both sides."""
    if metric == "euclidean":
        return {
            side: torch.eye(states[0].shape[-1], dtype=torch.float64).repeat(channels[side] // states[0].shape[-1], 1, 1)
            for side, states in (("key", first.keys), ("value", first.values))
        }
    return _on_one_scale({side: sensitivity[side].metric() for side in SIDES})


def _on_one_scale(blocks: dict[str, Tensor]) -> dict[str, Tensor]:
    """Metrics divided by the mean curvature of both sides."""
    for side, found in blocks.items():
        check_finite(f"{side} sensitivity", found)
    common = sum(float(b.diagonal(dim1=-2, dim2=-1).mean()) for b in blocks.values()) / len(blocks)
    return {side: block / common for side, block in blocks.items()}


def _roots(blocks: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(blocks)
    return ((vectors * values.clamp_min(1e-12).sqrt()[:, None]) @ vectors.mT).float()


def _noise(weighted: Tensor) -> float:
    """The water level at two bits per channel of separate Gaussian channels: the noise that grouping is judged under."""
    variance = weighted.diagonal().clamp_min(1e-20).double()
    low, high = float(variance.min()) * 1e-6, float(variance.max())
    for _ in range(60):
        level = (low * high) ** 0.5
        rate = float((0.5 * (variance / level).clamp_min(1).log2()).mean())
        low, high = (level, high) if rate > 2.0 else (low, level)
    return high


def _statistics(trees: dict[str, SideTree], kept: list[dict[str, Tensor]]) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    total = {side: torch.zeros(trees[side].components, dtype=torch.float64) for side in SIDES}
    count = 0
    coefficients = [{side: trees[side].analyse(rows[side].float()).half() for side in SIDES} for rows in kept]
    for rows in coefficients:
        count += len(rows["key"])
        for side in SIDES:
            total[side] += rows[side].double().abs().sum(0)
    scale: dict[str, Tensor] = {side: (total[side] / max(count, 1)).float().clamp_min(1e-12) for side in SIDES}
    everything = torch.cat([scale[side] for side in SIDES]).log2()
    statistics = Statistics()
    for rate in _STATISTICS_RATES:
        step = float((everything.median() + 1.5 - rate).exp2())
        for rows in coefficients:
            for side in SIDES:
                statistics.count(rows[side].float(), scale[side], step)
    frequency, offset = statistics.finish()
    return scale, frequency, offset

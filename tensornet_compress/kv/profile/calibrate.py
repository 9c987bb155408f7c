"""Calibration: one pass of moments, a few backward passes of sensitivity, then the tree."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tensornet_compress.bisection import least_kept
from tensornet_compress.coding.cache_quantiser import Statistics
from tensornet_compress.decompose.groups import consecutive_groups, search_groups
from tensornet_compress.errors import TensorNetError
from tensornet_compress.files.steps import Steps
from tensornet_compress.kv.live.codec import LiveBasis, live_bases, live_curve
from tensornet_compress.kv.profile.capture import Captured, Runner, Window, windows
from tensornet_compress.kv.profile.profile import SIDES, Profile, ProfileSpec, SideSpec
from tensornet_compress.kv.profile.sums import STATISTICS_EVERY, Sums, check_finite
from tensornet_compress.kv.profile.tree import SideTree, build_tree
from tensornet_compress.kv.rope import Rotary
from tensornet_compress.metric.blocks import symmetric_roots, whiten
from tensornet_compress.threads import limited_threads

Metric = Literal["fisher", "queries", "euclidean"]
_STATISTICS_RATES = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0)


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    metric: Metric = "fisher",
    sensitivity_windows: int = 32,
    draws: int = 2,
    group_size: int | None = None,
    joined: int = 200,
    search: bool = True,
    sinks: int = 4,
    window: int = 64,
    seed: int = 0,
    steps: Steps | None = None,
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
        steps: where sums are kept, so that a calibration that was killed goes on.

    It runs on one thread, so that the profile does not depend on how many there are.

    Raises:
        TensorNetError: no batches, no full-attention layer, or layers whose heads differ in width.
    """
    # On several threads sums are rounded in another order, and saved caches open only with the very profile of their codes.
    with limited_threads(), torch.inference_mode(False):
        steps = Steps.nowhere() if steps is None else steps
        felt = 0 if metric != "fisher" else sensitivity_windows
        sums, style, rotary = _summed(model, batches, metric, felt, draws, sinks, window, seed, steps)
        return _profile(sums, style, rotary, metric, group_size, joined, search)


def _summed(
    model: nn.Module,
    batches: Iterable[Any],
    metric: Metric,
    sensitivity_windows: int,
    draws: int,
    sinks: int,
    window: int,
    seed: int,
    steps: Steps,
) -> tuple[Sums, Literal["half", "interleaved"] | None, Rotary | None]:
    """All that sequences tell, and how the model rotates keys."""
    generator = torch.Generator().manual_seed(seed)
    sums, done = Sums.found(steps, sinks, generator)
    with Runner(model) as runner:
        for number, batch in enumerate(windows(batches, runner.paired)):
            if number < done:
                continue
            if sums.felt >= sensitivity_windows:
                for captured in runner.capture(batch, metric == "queries"):
                    sums.add(captured)
            else:
                for row in batch.rows():
                    sums.add(*_felt(runner, row, sinks, window, draws, generator))
                    sums.felt += 1
            sums.keep(steps, number + 1, generator)
        style, rotary = runner.style, runner.rotary()
    if not sums.seen:
        raise TensorNetError("calibration was given no batches; pass an iterable of int64 ids (batch, length)")
    if not sums.kept:
        raise TensorNetError(
            f"calibration was given {sums.seen} sequences and needs at least {STATISTICS_EVERY}: some measure what others teach"
        )
    return sums, style, rotary


def _profile(
    streamed: Sums,
    style: Literal["half", "interleaved"] | None,
    rotary: Rotary | None,
    metric: Metric,
    group_size: int | None,
    joined: int,
    search: bool,
) -> Profile:
    blocks = streamed.metric(metric, rotary)
    trees: dict[str, SideTree] = {}
    live: dict[str, list[LiveBasis]] = {}
    grouping_bits: dict[str, dict[str, float]] = {}
    for side in SIDES:
        mean, covariance = streamed.moments[side].mean(), streamed.moments[side].covariance()
        check_finite(f"{side} moments", covariance)
        roots = symmetric_roots(blocks[side])[0].float()
        size = group_size or max(1, -(-len(roots) // 6))
        groups, grouping_bits[side] = consecutive_groups(len(roots), size), {}
        if search:
            weighted = whiten(covariance, roots)
            groups, grouping_bits[side] = search_groups(weighted, _noise(weighted), roots.shape[-1], size)
        trees[side] = build_tree(covariance, mean, roots, groups, joined)
        live[side] = live_bases(covariance, mean, blocks[side], streamed.heads, rotary if side == "key" else None)
    scale, frequency, offset = _statistics(trees, streamed.kept)
    curve = live_curve(live, streamed.kept, streamed.sinks, streamed.heads, rotary)
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

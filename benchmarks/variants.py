"""Variants of our methods, as a plug-in of ``tensornet-compress bench``; ``run_all.py`` has the whole commands:

    tensornet-compress bench weights --plugin benchmarks/variants.py --methods ours-dense,ours-propagated,ours-healed
    tensornet-compress bench weights --plugin benchmarks/variants.py --methods svd-llm,ours-bf16,ours-pivots --bits 12.8,9.6
    tensornet-compress bench kv --plugin benchmarks/variants.py --methods ours-live,ours-live-queries

Weights: layers are allocated (dense integers; or two cores in bf16, whose ranks are what is allocated, kept plainly or by
pivots), then fitted behind the compressed layers before them (propagated), blocks are trained on their outputs (refined), and
cores, scales and norms on those of the model (healed), all on the calibration batches. Caches: profiles calibrated in what
queries see of keys and outputs of values, or in no metric, in place of Fisher information.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

import tensornet_compress.kv as kv
from tensornet_compress.bench.cache_case import CACHE_METHODS, CacheCase, CacheCoder
from tensornet_compress.bench.registry import Method
from tensornet_compress.bench.weight_case import WEIGHT_METHODS, Compressed, WeightCase
from tensornet_compress.compressing import Budget, compress, survey_model
from tensornet_compress.nn.plan import PLAN_ATTRIBUTE
from tensornet_compress.options.forms import SIZE_SHARES
from tensornet_compress.train import BlockRefinement, Propagation, heal, propagate

KEEPS = (0.8, 0.6)
EPOCHS = 2
PLAIN = Propagation(correction=0.0)
PROPAGATED = Propagation()
REFINED = Propagation(refinement=BlockRefinement(epochs=EPOCHS))


def allocated(formats: tuple[str, ...], allocator: str, case: WeightCase, bits: float) -> Compressed:
    """Two cores a layer in floating point: only ranks are chosen."""
    key = ("survey", formats, allocator)
    if key not in case.memo:
        shares = tuple(sorted({*SIZE_SHARES, *KEEPS}))
        options: dict[str, Any] = {"targets": case.patterns, "method": "svd", "formats": list(formats), "shares": shares}
        options["relative"] = allocator == "energy"
        case.memo[key] = survey_model(case.model, case.batches, workers=1, **options)
    budget, survey = Budget(bits_per_weight=bits), case.memo[key]
    options = {"method": "svd", "allocator": allocator, "workers": 1}
    compress(case.model, budget, case.batches, targets=case.patterns, survey=survey, **options)
    return case.read_back("two cores", settings={"allocator": allocator})


def staged(base: str, settings: Propagation, healed: bool, case: WeightCase, bits: float) -> Compressed:
    """The layers of another method's plan, realised again by these stages."""
    teacher = copy.deepcopy(case.model) if healed else None
    families = {cell.name: cell.family for cell in WEIGHT_METHODS[base].run(case, bits).layers}
    plan = getattr(case.model, PLAN_ATTRIBUTE)
    case.put_back()
    reports = propagate(case.model, plan, case.batches, settings)
    errors = [report.fitted if report.refined is None else report.refined for report in reports]
    told: dict[str, Any] = {"propagation": settings.model_dump(), "blocks": errors}
    if healed:
        # Single windows: healing leaves the last tenth of its batches for choosing.
        batches = [one for batch in case.batches for one in (batch.split(1) if isinstance(batch, Tensor) else (batch,))]
        report = heal(case.model, batches, teacher=teacher, steps=EPOCHS * len(batches), every=max(1, len(batches) // 4))
        told["heal"] = report.model_dump(mode="json", exclude={"losses"})
    return case.read_back(families, settings=told)


for _name, _formats, _allocator in (
    ("ours-energy", ("bf16",), "energy"),
    ("ours-bf16", ("bf16",), "sensitivity"),
    ("ours-pivots", ("bf16", "bf16p"), "sensitivity"),
):
    WEIGHT_METHODS.add(Method(_name, partial(allocated, _formats, _allocator), f"ranks allocated by {_allocator}", ours=True))
for _name, _base, _settings, _healed in (
    ("ours-propagated-plain", "ours-dense", PLAIN, False),
    ("ours-propagated", "ours-dense", PROPAGATED, False),
    ("ours-refined", "ours-dense", REFINED, False),
    ("ours-healed", "ours-dense", PROPAGATED, True),
    ("ours-bf16-refined", "ours-bf16", REFINED, False),
    ("ours-bf16-healed", "ours-bf16", REFINED, True),
    ("ours-pivots-refined", "ours-pivots", REFINED, False),
):
    WEIGHT_METHODS.add(Method(_name, partial(staged, _base, _settings, _healed), f"{_base}, then further stages", ours=True))


def weighed(base: str, metric: Any, case: CacheCase, bits: float) -> CacheCoder:
    """Another cache method with a profile that was calibrated in another metric."""
    if metric not in case.memo:
        options = {"sensitivity_windows": case.sensitivity_windows, "draws": case.draws}
        case.memo[metric] = replace(case, memo={})
        case.memo[metric].profile = kv.calibrate(case.model, case.calibration.split(1), metric=metric, **options)
    return CACHE_METHODS[base].run(case.memo[metric], bits)


for _base in ("ours-storage", "ours-live"):
    for _metric in ("queries", "euclidean"):
        work = partial(weighed, _base, _metric)
        CACHE_METHODS.add(Method(f"{_base}-{_metric}", work, f"{_base}, its profile by {_metric}", ours=True))

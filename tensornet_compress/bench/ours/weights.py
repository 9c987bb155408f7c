"""``tnc.compress`` as a benchmark method."""

from __future__ import annotations

from functools import partial
from typing import Any

from tensornet_compress.bench.read_back import read_back
from tensornet_compress.bench.weight_case import WEIGHT_METHODS, Compressed, WeightCase, WeightMethod
from tensornet_compress.compressing import Budget, compress, survey_model
from tensornet_compress.nn import NetworkModule
from tensornet_compress.options.forms import SIZE_SHARES
from tensornet_compress.report.drawing_of import kinds_of

REFINE = 1
QUICK_SWEEPS, FULL_SWEEPS = 0, 1


def run(method: Any, refine: bool, case: WeightCase, bits: float) -> Compressed:
    """Survey once (all families), allocate for ``bits``, replace. One process, so that its processor time is known."""
    sweeps = QUICK_SWEEPS if case.quick else FULL_SWEEPS
    shares = SIZE_SHARES if case.quick else None
    if "survey" not in case.memo:
        case.memo["survey"] = survey_model(
            case.model, case.batches, targets=case.patterns, method="auto", sweeps=sweeps, workers=1, shares=shares
        )
    rounds = REFINE if refine and (method == "auto" or not case.quick) else 0
    report = compress(
        case.model,
        Budget(bits_per_weight=bits),
        case.batches,
        targets=case.patterns,
        method=method,
        refine=rounds,
        workers=1,
        survey=case.memo["survey"],
    )
    families = {layer.name: layer.family for layer in report.layers}
    cells, ledger, modules = read_back(case, families)
    settings = {"refine": rounds, "sweeps": sweeps, "metric": report.metric, "allocator": report.allocator}
    specs = {name: module.spec for name, module in modules.items() if isinstance(module, NetworkModule)}
    return Compressed(cells, ledger, "; ".join(report.notes), settings, kinds_of(specs))


WEIGHT_METHODS.add(
    WeightMethod(
        "ours", partial(run, "auto", True), ours=True, explanation="every family competes, bytes go where the KL falls"
    )
)
WEIGHT_METHODS.add(
    WeightMethod(
        "ours-dense", partial(run, "dense", True), ours=True, explanation="one core a layer: our integers and allocation"
    )
)
WEIGHT_METHODS.add(
    WeightMethod("ours-svd", partial(run, "svd", False), ours=True, explanation="two cores a layer in any number format")
)

"""``tnc.compress`` as a benchmark method."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from tensornet_compress.bench.details import drawings, part_of
from tensornet_compress.bench.weight_case import WEIGHT_METHODS, Compressed, WeightCase, WeightMethod
from tensornet_compress.budget import Budget
from tensornet_compress.compression import compress, survey_model
from tensornet_compress.nn import layer_weight
from tensornet_compress.nn.module import NetworkModule
from tensornet_compress.results import LayerCell

QUICK_REFINE, FULL_REFINE = 1, 2
QUICK_SWEEPS, FULL_SWEEPS = 0, 1


def run(method: Any, refine: bool, case: WeightCase, bits: float) -> Compressed:
    """Survey once (all families), allocate for ``bits``, replace. One process, so that its processor time is known."""
    sweeps = QUICK_SWEEPS if case.quick else FULL_SWEEPS
    if "survey" not in case.memo:
        case.memo["survey"] = survey_model(
            case.model, case.batches, targets=case.patterns, method="auto", sweeps=sweeps, workers=1
        )
    rounds = 0 if not refine else QUICK_REFINE if case.quick else FULL_REFINE
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
    cells: list[LayerCell] = []
    ledger: dict[str, int] = {}
    modules: dict[str, nn.Module] = {}
    for layer in report.layers:
        module = case.model.get_submodule(layer.name)
        target = next(target for target in case.targets if target.name == layer.name)
        modules[layer.name] = module
        original = layer_weight(case.original(target)).float()
        with torch.no_grad():
            error = float((_dense(module, original.shape) - original).norm() / original.norm().clamp_min(1e-30))
        for part, nbytes in parts(module).items():
            ledger[part] = ledger.get(part, 0) + nbytes
        cells.append(
            LayerCell(
                name=layer.name,
                kind=layer.kind,
                family=layer.family,
                formats=_formats(module),
                ranks=_ranks(module),
                bits_per_weight=layer.bits_per_weight,
                nbytes=layer.nbytes,
                error=error,
            )
        )
    settings = {"refine": rounds, "sweeps": sweeps, "metric": report.metric, "allocator": report.allocator}
    return Compressed(tuple(cells), ledger, "; ".join(report.notes), settings, drawings(modules))


def parts(module: nn.Module) -> dict[str, int]:
    """Stored bytes of a layer by part."""
    found: dict[str, int] = {}
    if isinstance(module, NetworkModule):
        network = module.network()
        for name, tensor in network.stored.items():
            found[part_of(name, network.spec)] = found.get(part_of(name, network.spec), 0) + tensor.nbytes
        if network.nbytes > sum(found.values()):
            found["orders"] = network.nbytes - sum(found.values())
    bias: Any = getattr(module, "bias", None)
    if bias is not None:
        found["biases"] = bias.numel() * bias.element_size()
    return found


def _dense(module: nn.Module, shape: torch.Size) -> torch.Tensor:
    assert isinstance(module, NetworkModule)
    return module.dense_weight(torch.float32).reshape(shape)


def _formats(module: nn.Module) -> str:
    assert isinstance(module, NetworkModule)
    return "/".join(dict.fromkeys(fmt.name for term in module.spec.terms for fmt in term.formats))


def _ranks(module: nn.Module) -> tuple[int, ...]:
    assert isinstance(module, NetworkModule)
    return tuple(rank for term in module.spec.terms for rank in term.ranks)


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

"""What the layers of a compressed model take, read from its modules."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from tensornet_compress.bench.details import part_of
from tensornet_compress.bench.weight_case import WeightCase
from tensornet_compress.nn import NetworkModule
from tensornet_compress.report import LayerCell


def read_back(
    case: WeightCase, family: str | Mapping[str, str]
) -> tuple[tuple[LayerCell, ...], dict[str, int], dict[str, nn.Module]]:
    """Cells, bytes by part and modules of a case's targets, which must all be networks. ``family``: one for all, or by name."""
    cells: list[LayerCell] = []
    ledger: dict[str, int] = {}
    modules: dict[str, nn.Module] = {}
    for target in case.targets:
        module = case.model.get_submodule(target.name)
        assert isinstance(module, NetworkModule)
        modules[target.name] = module
        original = case.matrix(target)
        with torch.no_grad():
            dense = module.dense_weight(torch.float32).reshape(original.shape)
            error = float((dense - original).norm() / original.norm().clamp_min(1e-30))
        held = parts(module)
        for part, nbytes in held.items():
            ledger[part] = ledger.get(part, 0) + nbytes
        cells.append(
            LayerCell(
                name=target.name,
                kind=target.kind,
                family=family if isinstance(family, str) else family[target.name],
                formats="/".join(dict.fromkeys(fmt.name for term in module.spec.terms for fmt in term.formats)),
                ranks=tuple(rank for term in module.spec.terms for rank in term.ranks),
                bits_per_weight=8 * sum(held.values()) / original.numel(),
                nbytes=sum(held.values()),
                error=error,
            )
        )
    return tuple(cells), ledger, modules


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

"""Bytes of a model and of what is targeted in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from tensornet_compress.compressing.budget import Budget
from tensornet_compress.errors import BudgetError
from tensornet_compress.nn import Target, identity, layer_weight


@dataclass
class Sizes:
    """Bytes of the model before compression, and what the budget leaves for the targeted layers; by layer the numbers of its
    weight, the bytes that it keeps whatever happens (its bias), and those that it had."""

    original: int
    others: int
    targeted_original: int
    allowed: int
    weights: dict[str, int]
    fixed: dict[str, int]
    originals: dict[str, int]

    @classmethod
    def of(cls, model: nn.Module, chosen: Sequence[Target], budget: Budget) -> Sizes:
        original = model_nbytes(model)
        weights, fixed, originals = {}, {}, {}
        for target in chosen:
            module = model.get_submodule(target.name)
            bias = getattr(module, "bias", None)
            weight = layer_weight(module)
            weights[target.name] = weight.numel()
            fixed[target.name] = 0 if bias is None else bias.numel() * bias.element_size()
            originals[target.name] = weight.numel() * weight.element_size() + fixed[target.name]
        targeted = sum(originals.values())
        others = original - targeted
        if budget.bits_per_weight is not None:
            allowed = int(budget.bits_per_weight * sum(weights.values()) / 8)
        else:
            total = budget.nbytes if budget.nbytes is not None else int((budget.ratio or 0) * original)
            allowed = total - others
            if allowed <= 0:
                raise BudgetError(
                    f"the budget of {total:,} bytes is used up by the {others:,} bytes that are not targeted; "
                    "raise it, target more layers, or load the model in a smaller dtype"
                )
        return cls(original, others, targeted, allowed - sum(fixed.values()), weights, fixed, originals)


def model_nbytes(model: nn.Module) -> int:
    """Bytes of all saved tensors of a model, shared ones counted once."""
    seen: set[tuple[Any, ...]] = set()
    total = 0
    for tensor in model.state_dict().values():
        key = identity(tensor)
        if key not in seen:
            seen.add(key)
            total += tensor.numel() * tensor.element_size()
    return total

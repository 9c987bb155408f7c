"""Modules that hold several matrices, or use theirs without calling a layer, rewritten as equal ones made of layers.

Fused experts become two layers an expert, so that statistics are those of the tokens that were routed to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tensornet_compress.nn.kinds import shell


class SplitModule(nn.Module):
    """Stands for a module whose matrices are now layers; tells of itself what the original did."""

    def __init__(self, original: nn.Module):
        super().__init__()
        self.__dict__["_original"] = shell(original)
        self.train(original.training)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "_original" not in self.__dict__ or name.startswith("__"):
                raise
            return getattr(self._original, name)

    def train(self, mode: bool = True) -> Any:
        """As in the base class; the original's dropout follows."""
        self._original.train(mode)
        return super().train(mode)

    def joined(self) -> nn.Module:
        """The module that was split, with what its layers hold now; they must be dense."""
        made = shell(self._original)
        for name, value in self.whole().items():
            made._parameters[name] = nn.Parameter(value)
        return made.train(self.training)

    def whole(self) -> dict[str, Tensor]:
        """The parameters of the module that was split."""
        raise NotImplementedError

    @staticmethod
    def probe(original: Any) -> list[tuple[Any, ...]]:
        """Inputs to compare with the original on."""
        raise NotImplementedError

    @property
    def watched(self) -> bool:
        """Whether somebody looks at the calls of the layers."""
        return any(part._forward_hooks or part._forward_pre_hooks for part in self.children())


def linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    """A layer of weight (out, in) in the memory of the original."""
    made = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    made.weight = nn.Parameter(weight.detach(), weight.requires_grad)
    if bias is not None:
        made.bias = nn.Parameter(bias.detach(), bias.requires_grad)
    return made


def noise(shape: Sequence[int], like: Tensor) -> Tensor:
    """Numbers to try a module on, in the dtype and on the device of its weight."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(like)


class SplitExperts(SplitModule):
    """Experts of transformers whose first layers are one tensor, and their second layers another; here they are
    ``0.gate_up_proj``, ``0.down_proj``, ``1.gate_up_proj`` and so on."""

    def __init__(self, original: Any):
        super().__init__(original)
        first = "gate_up_proj" if original.has_gate else "up_proj"
        held = dict(original.named_parameters(recurse=False))
        for expert in range(len(held["down_proj"])):
            part = nn.ModuleDict()
            for name in (first, "down_proj"):
                weight, bias = held[name][expert], held.get(f"{name}_bias")
                part[name] = linear(weight.T if original.is_transposed else weight, None if bias is None else bias[expert])
            self.add_module(str(expert), part)
        for name, module in original.named_children():
            self.add_module(name, module)
            self._original.add_module(name, module)

    def forward(self, *arguments: Any, **keywords: Any) -> Tensor:
        """States (tokens, width), experts (tokens, chosen) and their weights (tokens, chosen) -> (tokens, width)."""
        states, chosen, weights = (*arguments, *keywords.values())[:3]
        original, count = self._original, sum(name.isdecimal() for name in self._modules)
        total = torch.zeros_like(states)
        for expert in chosen.unique().tolist():
            if not 0 <= expert < count:  # a token without an expert
                continue
            part: Any = self._modules[str(expert)]
            tokens, places = torch.where(chosen == expert)
            if original.has_gate:
                inner = original._apply_gate(part.gate_up_proj(states[tokens]))
            else:
                inner = original.act_fn(part.up_proj(states[tokens]))
            outer = part.down_proj(inner)
            if original.has_post_expert_norm:
                outer = original.post_expert_norm(outer)
            total.index_add_(0, tokens, (outer * weights[tokens, places, None]).to(total.dtype))
        return total

    def joined(self) -> nn.Module:
        """As in the base class; other children stay."""
        made = super().joined()
        for name, module in self._modules.items():
            if not name.isdecimal():
                made.add_module(name, module)
        return made

    def whole(self) -> dict[str, Tensor]:
        """As in the base class."""
        parts: list[Any] = [part for name, part in self._modules.items() if name.isdecimal()]
        found = {}
        for name in parts[0]:
            weights = [part[name].weight.detach() for part in parts]
            found[name] = torch.stack([weight.T if self._original.is_transposed else weight for weight in weights])
            if parts[0][name].bias is not None:
                found[f"{name}_bias"] = torch.stack([part[name].bias.detach() for part in parts])
        return found

    @staticmethod
    def probe(original: Any) -> list[tuple[Any, ...]]:
        """Inputs to compare with the original on."""
        like = original.down_proj
        width, count = (like.shape[2] if original.is_transposed else like.shape[1]), len(like)
        states = noise((2 * count, width), like)
        chosen = torch.stack([torch.arange(2 * count) % count, (torch.arange(2 * count) * 3 + 1) % count], 1).to(like.device)
        return [(states, chosen, noise((2 * count, 2), like).abs())]

    @staticmethod
    def fits(module: Any) -> bool:
        """Whether a module is one of these."""
        needed = ("has_gate", "has_bias", "is_transposed", "_apply_gate", "has_post_expert_norm")
        down = module._parameters.get("down_proj")
        return down is not None and down.ndim == 3 and all(hasattr(module, name) for name in needed)


class SplitSorted(SplitModule):
    """Experts like those of Llama 4, which are given as many rows each, one expert's after another's, in tensors (experts, in,
    out); layers are named as in ``SplitExperts``."""

    def __init__(self, original: Any):
        super().__init__(original)
        for expert, weights in enumerate(zip(original.gate_up_proj, original.down_proj)):
            self.add_module(
                str(expert), nn.ModuleDict({n: linear(w.T) for n, w in zip(("gate_up_proj", "down_proj"), weights)})
            )
        self.add_module("act_fn", original.act_fn)
        self._original.add_module("act_fn", original.act_fn)

    def forward(self, states: Tensor) -> Tensor:
        """States (experts * rows, width) -> (experts * rows, width)."""
        parts: list[Any] = [part for name, part in self._modules.items() if name.isdecimal()]
        outer = []
        for part, own in zip(parts, states.chunk(len(parts))):
            gate, up = part.gate_up_proj(own).chunk(2, -1)
            outer.append(part.down_proj(up * self.act_fn(gate)))
        return torch.cat(outer)

    def joined(self) -> nn.Module:
        """As in the base class."""
        made = super().joined()
        made.add_module("act_fn", self.act_fn)
        return made

    def whole(self) -> dict[str, Tensor]:
        """As in the base class."""
        parts: list[Any] = [part for name, part in self._modules.items() if name.isdecimal()]
        return {name: torch.stack([part[name].weight.detach().T for part in parts]) for name in ("gate_up_proj", "down_proj")}

    @staticmethod
    def probe(original: Any) -> list[tuple[Any, ...]]:
        """Inputs to compare with the original on."""
        count, width, _ = original.gate_up_proj.shape
        return [(noise((3 * count, width), original.down_proj),)]

    @staticmethod
    def fits(module: Any) -> bool:
        """Whether a module may be one of these."""
        held = module._parameters
        return (
            set(held) == {"gate_up_proj", "down_proj"}
            and all(w.ndim == 3 for w in held.values())
            and "act_fn" in module._modules
        )


class SplitParallel(SplitModule):
    """Layers in one tensor ``weight`` (experts, out, in), each of which multiplies as many rows as it is told: JetMoE."""

    def __init__(self, original: Any):
        super().__init__(original)
        for expert, weight in enumerate(original.weight):
            self.add_module(str(expert), linear(weight))

    def forward(self, inputs: Tensor, expert_size: Sequence[int]) -> Tensor:
        """Rows (sum of ``expert_size``, in) -> (sum of ``expert_size``, out)."""
        parts = inputs.split(list(expert_size))
        return torch.cat([layer(part) for layer, part in zip(self.children(), parts, strict=True)])

    def whole(self) -> dict[str, Tensor]:
        """As in the base class."""
        layers: list[Any] = list(self.children())
        return {"weight": torch.stack([layer.weight.detach() for layer in layers])}

    @staticmethod
    def probe(original: Any) -> list[tuple[Any, ...]]:
        """Inputs to compare with the original on."""
        count, _, width = original.weight.shape
        return [(noise((2 * count, width), original.weight), [3, 1, *[2] * (count - 2)] if count > 1 else [2])]

    @staticmethod
    def fits(module: Any) -> bool:
        """Whether a module may be one of these."""
        weight = module._parameters.get("weight")
        return weight is not None and weight.ndim == 3 and set(module._parameters) == {"weight"} and not module._modules

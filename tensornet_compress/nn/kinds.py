"""The kinds of modules that networks stand for, and what a module of a kind makes of its weight."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
KINDS: tuple[tuple[type[nn.Module], str], ...] = (
    (nn.Linear, "linear"),
    (nn.Conv2d, "conv2d"),
    (nn.Embedding, "embedding"),
    (nn.Conv1d, "conv"),
    (nn.Conv3d, "conv"),
    (nn.ConvTranspose1d, "conv_transpose"),
    (nn.ConvTranspose2d, "conv_transpose"),
    (nn.ConvTranspose3d, "conv_transpose"),
)
CONVOLUTIONS = ("conv2d", "conv", "conv_transpose")
HOLDERS = "Linear, Conv1D, Embedding and convolutions"
"""What can hold a network, in words."""


def module_kind(module: nn.Module) -> str | None:
    """``linear``, ``conv1d`` (of transformers), ``conv2d``, ``conv`` (1-d and 3-d), ``conv_transpose``, ``embedding``, or None
    when the module cannot hold a network.

    A subclass is of the kind of its base when it computes the same; one of an embedding may multiply what it looks up with a
    number.
    """
    for base, kind in KINDS:
        if isinstance(module, base):
            same = type(module).forward is base.forward or _is_linear(module) or embedding_scale(module) is not None
            return kind if same else None
    if type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils":
        return "conv1d"
    return None


@torch.no_grad()
def _is_linear(module: nn.Module) -> bool:
    """Whether a subclass of ``nn.Linear`` with a forward of its own gives what ``nn.Linear`` would: tried on a small twin, so
    that the weight may be anywhere."""
    if not isinstance(module, nn.Linear) or set(module._parameters) != {"weight", "bias"} or module._buffers or module._modules:
        return False
    # Loading may go on under another default device.
    with torch.device("cpu"):
        return _computes_as_linear(module)


def _computes_as_linear(module: nn.Linear) -> bool:
    twin = shell(module)
    twin.in_features, twin.out_features = 2, 3
    twin.weight = nn.Parameter(torch.arange(6.0).cos().view(3, 2))
    twin.register_parameter("bias", None if module.bias is None else nn.Parameter(torch.arange(3.0).sin()))
    x = torch.arange(4.0).sin().view(1, 2, 2)
    try:
        given = type(module).forward(twin, x)
    except Exception:  # whatever a stranger's forward wants beside its input
        return False
    wanted = F.linear(x, twin.weight, twin.bias)
    return isinstance(given, Tensor) and given.shape == wanted.shape and torch.allclose(given, wanted, 1e-4, 1e-5)


def shell(module: nn.Module) -> Any:
    """A module of the same class, with the same attributes and copies of its buffers, but without parameters and parts."""
    made: Any = object.__new__(type(module))
    nn.Module.__init__(made)
    made.__dict__.update({name: value for name, value in module.__dict__.items() if name not in nn.Module().__dict__})
    made._buffers.update({name: None if held is None else held.clone() for name, held in module._buffers.items()})
    made._non_persistent_buffers_set = set(module._non_persistent_buffers_set)
    made._parameters.update(dict.fromkeys(module._parameters))
    return made.train(module.training)


@torch.no_grad()
def embedding_scale(module: nn.Module, dtype: torch.dtype | None = None) -> float | None:
    """The number that an embedding multiplies what it looks up with, 1 for most; None if it computes something else.

    A subclass is tried on a small table (of ``dtype``, else that of its own), so that the weight may be anywhere.
    """
    if not isinstance(module, nn.Embedding) or set(module._parameters) != {"weight"} or module._modules:
        return None
    if type(module).forward is nn.Embedding.forward:
        return 1.0
    if set(module._buffers) - module._non_persistent_buffers_set or any(b is not None and b.is_meta for b in module.buffers()):
        return None
    with torch.device("cpu"):
        return _found_scale(module, dtype or module.weight.dtype)


def _found_scale(module: nn.Embedding, dtype: torch.dtype) -> float | None:
    twin, ids = shell(module).cpu(), torch.arange(3)
    twin.num_embeddings, twin.embedding_dim, twin.padding_idx = 3, 2, None
    found = []
    for table in (torch.ones(3, 2), torch.arange(6.0).cos().view(3, 2)):
        twin.weight = nn.Parameter(table.to(dtype))
        try:
            found.append(type(module).forward(twin, ids))
        except Exception:  # whatever a stranger's forward wants beside its input
            return None
    if any(not isinstance(given, Tensor) or given.shape != (3, 2) for given in found):
        return None
    scale = float(found[0][0, 0])
    same = torch.equal(found[0], torch.full_like(found[0], scale)) and torch.equal(found[1], twin.weight * scale)
    return scale if same and scale else None


def turned(weight: Tensor, kind: str | None) -> Tensor:
    """A weight outputs first as a module of a kind keeps it, or the other way round: Conv1D and transposed convolutions keep
    inputs first, all others keep outputs first."""
    return weight.transpose(0, 1) if kind in ("conv1d", "conv_transpose") else weight


def loaded(weight: Tensor) -> Tensor:
    """A weight for which transformers draws no numbers while it loads a model: it may be what is stored, seen the same way."""
    weight._is_hf_initialized = True  # type: ignore[attr-defined]
    return weight


def layer_weight(module: nn.Module) -> Tensor:
    """The weight as the network sees it, outputs first: (out, in), (out, in, kernel...) or (count, width)."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return turned(weight.detach(), module_kind(module))


def identity(tensor: Tensor) -> tuple[Any, ...]:
    """What two tensors have in common exactly if they are the same numbers in the same memory, seen the same way."""
    if tensor.layout is not torch.strided:
        return (id(tensor),)
    address = tensor.data_ptr() or tensor.untyped_storage()._cdata
    return (address, tensor.dtype, tuple(tensor.shape), tensor.stride())

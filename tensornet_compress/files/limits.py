"""How large what a file describes may be, checked by arithmetic on its shapes before anything is allocated or searched."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import nn

from tensornet_compress.coding import CodedFormat, format_nbytes
from tensornet_compress.errors import CheckpointError
from tensornet_compress.tensor import NetworkSpec
from tensornet_compress.tensor.network import contraction_of

LONGEST_ORDER = 1 << 17
_ALWAYS = 1 << 28
_PER_BYTE = 1024
"""Numbers that a dense tensor, a core or an intermediate may have in any case, and for each byte that is stored."""
_FEW = 100
"""So many layers a configuration may name in any case: some name a layer from which something else would hold."""


def check_size(spec: NetworkSpec, where: str) -> None:
    """Refuse a network that stands for far more numbers than its stored bytes give reason to believe.

    Raises:
        CheckpointError: it is one; the message tells both sizes.
    """
    stored = 0
    sizes = {"the tensor": prod(spec.shape)}
    for number, term in enumerate(spec.terms):
        sizes[f"term {number} with its padding"] = prod(term.layout.dims)
        for core, fmt in enumerate(term.formats):
            shape = term.core_shape(core)
            sizes[f"core {core} of term {number}"] = prod(shape)
            stored += fmt.stored if isinstance(fmt, CodedFormat) else format_nbytes(fmt, shape)
    _refuse(sizes, stored, where)
    _refuse({f"contracting term {n}": contraction_of(t).largest_intermediate for n, t in enumerate(spec.terms)}, stored, where)


def _refuse(sizes: dict[str, int], stored: int, where: str) -> None:
    allowed = max(_ALWAYS, _PER_BYTE * stored)
    for name, numbers in sizes.items():
        if numbers > allowed:
            raise CheckpointError(
                f"{where} stores {stored:,} bytes and describes {numbers:,} numbers ({name}), more than the {allowed:,} "
                "that are believed; the file is damaged, or not meant to be read"
            )


def check_counts(config: Any, tensors: int) -> None:
    """Refuse a configuration with NaN, or with more layers than the ``tensors`` beside it.

    Raises:
        CheckpointError: it is one.
    """
    for part in (config, config.get_text_config()):
        for name, value in vars(part).items():
            if isinstance(value, float) and value != value:
                raise CheckpointError(f"its configuration has {name} = NaN; the file is damaged")
            if "layer" in name and isinstance(value, int) and not -1 <= value <= max(tensors, _FEW):
                raise CheckpointError(f"its configuration has {name} = {value:,}, the file beside it {tensors:,} tensors")


def check_config(config: Any, tensors: int, make: Any) -> None:
    """Refuse a configuration that asks for far more layers or memory than the ``tensors`` beside it need; ``make`` builds the
    model.

    Raises:
        CheckpointError: it does.
    """
    check_counts(config, tensors)
    with torch.device("meta"):
        model: nn.Module = make(config)
    if (nbytes := sum(buffer.nbytes for buffer in model.buffers())) > _ALWAYS:
        raise CheckpointError(f"its configuration asks for {nbytes:,} bytes of tables; the file is damaged")

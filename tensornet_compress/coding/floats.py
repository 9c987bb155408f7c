"""Plain floating point as the number format of a core."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from tensornet_compress.frozen import Frozen

FLOAT_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class FloatFormat(Frozen):
    """Plain floating point numbers."""

    kind: Literal["float"] = "float"
    dtype: Literal["fp32", "bf16", "fp16"] = "bf16"

    @property
    def name(self) -> str:
        """Short name."""
        return self.dtype

    def parts(self, shape: tuple[int, ...]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shapes and dtypes of the stored parts of a core of ``shape``."""
        return {"": (shape, FLOAT_DTYPES[self.dtype])}

    def encode(self, core: Tensor) -> dict[str, Tensor]:
        """Round to the format, never sharing memory with ``core``; what fp16 cannot hold becomes its largest number."""
        dtype = FLOAT_DTYPES[self.dtype]
        return {"": saturated(core, dtype).to(dtype, copy=True, memory_format=torch.contiguous_format)}

    def decode(self, parts: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Stored parts -> core of ``shape`` in ``dtype``."""
        return parts[""].to(dtype)


def saturated(numbers: Tensor, dtype: torch.dtype) -> Tensor:
    """Numbers beyond the range of a narrower ``dtype`` cut to its ends, so that no infinity is stored."""
    if dtype != torch.float16 or numbers.dtype == torch.float16:
        return numbers
    largest = torch.finfo(dtype).max
    return numbers.clamp(-largest, largest)

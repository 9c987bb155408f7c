"""Refusal of models that are broken already."""

from __future__ import annotations

from torch import nn

from tensornet_compress.errors import TensorNetError


def require_finite(model: nn.Module, told: str = "the model") -> None:
    """Refuse a model with weights that are no numbers, whose compression and answers would be none either.

    Raises:
        TensorNetError: a parameter holds NaN or infinity.
    """
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and parameter.numel() and not parameter.is_meta:
            numbers = parameter.detach() if parameter.dtype.itemsize > 1 else parameter.detach().float()
            # The extremes are NaN when any number is, and take one pass without a copy.
            if not all(bool(extreme.isfinite()) for extreme in numbers.aminmax()):
                raise TensorNetError(f"{told} holds NaN or infinity in {name!r}; get a whole copy of its weights")

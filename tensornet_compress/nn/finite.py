"""Refusal of models that are broken already."""

from __future__ import annotations

from torch import Tensor, nn

from tensornet_compress.errors import TensorNetError
from tensornet_compress.memory import release

# Smaller tensors are not worth the look at the table of mapped files.
_LARGE = 1 << 20


def require_finite(model: nn.Module, told: str = "the model") -> None:
    """Refuse a model with weights that are no numbers, whose compression and answers would be none either.

    Raises:
        TensorNetError: a parameter holds NaN or infinity.
    """
    for name, parameter in model.named_parameters():
        if not all_finite(parameter):
            raise TensorNetError(f"{told} holds NaN or infinity in {name!r}; get a whole copy of its weights")


def all_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinity; one without numbers (empty, or on the meta device) does not."""
    if not tensor.is_floating_point() or not tensor.numel() or tensor.is_meta:
        return True
    numbers = tensor.detach() if tensor.dtype.itemsize > 1 else tensor.detach().float()
    # The extremes are NaN when any number is, and take one pass without a copy.
    finite = all(bool(extreme.isfinite()) for extreme in numbers.aminmax())
    if tensor.nbytes >= _LARGE:
        release(tensor)
    return finite

"""Modules on another device for as long as they are at work there.

So a model that stays in its files, or in main memory, is calibrated on an accelerator that could not hold it as a whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from tensornet_compress.errors import TensorNetError


def usable_device(device: str | torch.device | None) -> torch.device | None:
    """A device by name; None stays None.

    Raises:
        TensorNetError: there is no such device here.
    """
    if device is None:
        return None
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise TensorNetError(f"device {str(device)!r} cannot be used here ({reason}); give another one, or none") from error


@contextmanager
def lent(modules: Iterable[nn.Module], device: torch.device | None) -> Iterator[None]:
    """Inside, these modules' own parameters and buffers lie on ``device`` (None: where they are); behind it, they are what they
    were, and what was written to them meanwhile is gone."""
    kept: list[tuple[dict[str, Tensor | None], str, Tensor]] = []
    copies: dict[Tensor, Tensor] = {}
    try:
        if device is not None:
            for owner in modules:
                for held in (owner._parameters, owner._buffers):
                    for name, tensor in held.items():
                        if tensor is None or tensor.device == device:
                            continue
                        kept.append((held, name, tensor))  # type: ignore[arg-type]
                        # One that several modules share is copied once.
                        if tensor not in copies:
                            moved = tensor.detach().to(device)
                            is_parameter = isinstance(tensor, nn.Parameter)
                            copies[tensor] = nn.Parameter(moved, tensor.requires_grad) if is_parameter else moved
                        held[name] = copies[tensor]  # type: ignore[assignment]
        yield
    finally:
        for held, name, tensor in kept:
            held[name] = tensor

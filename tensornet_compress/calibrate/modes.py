"""Evaluation mode and frozen parameters for a while, and every module's own mode and flags put back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the context; a model may hold modules of both modes (a frozen norm in a model that trains), and a
    module that takes another's place inside gets its mode."""
    training = {name: module for name, module in model.named_modules(remove_duplicate=False) if module.training}
    try:
        model.eval()
        yield
    finally:
        present = dict(model.named_modules(remove_duplicate=False)) if training else {}
        for name, module in training.items():
            module.training = True
            present.get(name, module).training = True


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and no parameter that asks for a gradient."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        with evaluating(model):
            yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)

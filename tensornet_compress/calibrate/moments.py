"""Second moments of layer inputs, streamed over calibration batches in one pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tensornet_compress.calibrate.batches import Batch, model_inputs
from tensornet_compress.calibrate.modes import evaluating
from tensornet_compress.errors import TensorNetError


class InputMoment:
    """Running sum of ``x x'`` (or ``z x'``) and count of the vectors ``x``; float64 sums, float32 products."""

    def __init__(self) -> None:
        self.sum: Tensor | None = None
        self.count = 0

    def add(self, vectors: Tensor, others: Tensor | None = None) -> None:
        """Add (tokens, n) vectors; with ``others`` (tokens, k) the products are ``vectors' others``, shape (n, k)."""
        vectors = vectors.float()
        others = vectors if others is None else others.float()
        # Under autocast the product would be rounded to half precision, and no longer be positive definite.
        with torch.autocast(vectors.device.type, enabled=False):
            product = (vectors.T @ others).double()
        self.sum = product if self.sum is None else self.sum.add_(product)
        self.count += len(vectors)

    @property
    def mean(self) -> Tensor:
        """``E[x x']``, float64 (n, n)."""
        if self.sum is None:
            raise TensorNetError("a layer received no input during calibration; give batches that reach it, or ignore it")
        return self.sum / self.count


def has_input_moment(module: nn.Module) -> bool:
    """Whether the module multiplies its weight with vectors of its input: linear layers, and convolutions in one group."""
    if isinstance(module, nn.Conv2d):
        return module.groups == 1 and not isinstance(module.padding, str)
    return not isinstance(module, nn.Embedding)


def input_vectors(module: nn.Module, given: Tensor) -> Tensor:
    """The vectors (..., n) that a module's weight, seen as (out, n), is multiplied with; patches for a convolution."""
    if isinstance(module, nn.Conv2d):
        kernel, dilation = module.kernel_size, module.dilation
        padding: Any = module.padding
        return nn.functional.unfold(given, kernel, dilation, padding, module.stride).transpose(1, 2)
    return given


def collect_input_moments(
    model: nn.Module,
    batches: Iterable[Batch],
    names: Iterable[str],
    advance: Callable[[], None] = lambda: None,
) -> dict[str, InputMoment]:
    """Input second moments of the named modules (see ``has_input_moment``); linear layers fed one tensor share one moment.

    Padding marked by ``attention_mask`` is left out. The model's mode and hooks are left as found.
    """
    collector = _Collector()
    modules = dict(model.named_modules())
    handles = [modules[name].register_forward_pre_hook(collector.hook(name), with_kwargs=True) for name in names]
    device = next(model.parameters()).device
    try:
        with evaluating(model), torch.no_grad():
            for batch in batches:
                inputs = model_inputs(batch, device)
                collector.begin(inputs.get("attention_mask"))
                model(**inputs)
                advance()
    finally:
        for handle in handles:
            handle.remove()
    if not collector.batches:
        raise TensorNetError("calibration was given no batches")
    return collector.moments


class _Collector:
    def __init__(self) -> None:
        self.moments: dict[str, InputMoment] = {}
        self.batches = 0
        self._mask: Tensor | None = None
        self._added: tuple[Tensor, int | None, InputMoment] | None = None

    def begin(self, mask: Tensor | None) -> None:
        self.batches += 1
        self._mask = mask
        self._added = None

    def hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def add(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            given: Tensor = arguments[0] if arguments else next(iter(keywords.values()))
            if isinstance(module, nn.Conv2d):
                self.moments.setdefault(name, InputMoment()).add(input_vectors(module, given).flatten(0, 1))
                return
            if self._added is not None and self._unchanged(given) and self.moments.get(name, self._added[2]) is self._added[2]:
                self.moments[name] = self._added[2]
                return
            moment = self.moments.setdefault(name, InputMoment())
            moment.add(self._kept(given))
            self._added = (given, version_of(given), moment)

        return add

    def _unchanged(self, given: Tensor) -> bool:
        """Whether the tensor was added last, and not changed in place since."""
        assert self._added is not None
        tensor, version, _ = self._added
        return given is tensor and version is not None and version_of(given) == version

    def _kept(self, given: Tensor) -> Tensor:
        if self._mask is not None and self._mask.shape == given.shape[:-1]:
            return given[self._mask.bool()]
        return given.reshape(-1, given.shape[-1])


def weight_users(model: nn.Module, names: Sequence[str]) -> list[str]:
    """Those of the named modules that multiply their weight with input vectors, each under its first name only."""
    first_names: dict[nn.Module, str] = {}
    for name in names:
        module = model.get_submodule(name)
        if has_input_moment(module):
            first_names.setdefault(module, name)
    return list(first_names.values())


def version_of(tensor: Tensor) -> int | None:
    """How often a tensor was changed in place; None for tensors of inference mode, which do not count it."""
    return None if tensor.is_inference() else tensor._version


def require_unchanged(given: Tensor, version: int | None, name: str, instead: str) -> None:
    """Refuse an input that the model changed in place after a layer used it and before its gradient came back.

    Raises:
        TensorNetError: naming the layer, and what to choose ``instead``.
    """
    if version_of(given) != version:
        raise TensorNetError(
            f"the input of {name!r}, of shape {tuple(given.shape)}, is changed in place after that layer used it (as in "
            f"x += layer(x)), so that its gradient comes too late; choose {instead}, or write x = x + layer(x)"
        )

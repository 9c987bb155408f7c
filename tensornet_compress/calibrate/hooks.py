"""Looking into a model while it runs: its mode, what its layers are given, and the gradients of what they give."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils.hooks import RemovableHandle

from tensornet_compress.errors import TensorNetError

# What happens with the gradient of a call's output; None if nothing does.
Backward = Callable[[Tensor], None] | None


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the context; a model may hold modules of both modes (a frozen norm in a model that trains), and a
    module that takes another's place inside gets its mode. Encoders of torch keep padded batches as they are, so that what
    layers are given is one tensor. States that modules keep from a call (RecurrentGemma) do not keep its graph afterwards, with
    which a model cannot be copied."""
    held = [(module, dict(vars(module))) for module in model.modules()]
    nesting = [part for part in model.modules() if isinstance(part, nn.TransformerEncoder) and part.use_nested_tensor]
    training = {name: module for name, module in model.named_modules(remove_duplicate=False) if module.training}
    try:
        model.eval()
        for part in nesting:
            part.use_nested_tensor = False
        yield
    finally:
        for module, before in held:
            graphs = [name for name, value in vars(module).items() if isinstance(value, Tensor) and value.grad_fn is not None]
            for name in graphs:
                vars(module)[name] = before.get(name)
        for part in nesting:
            part.use_nested_tensor = True
        present = dict(model.named_modules(remove_duplicate=False)) if training else {}
        for name, module in training.items():
            module.training = True
            present.get(name, module).training = True


@contextmanager
def frozen(model: nn.Module, trained: Iterable[nn.Parameter] = ()) -> Iterator[None]:
    """Evaluation mode, and no parameter but the ``trained`` ones asks for a gradient."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        for parameter in trained:
            parameter.requires_grad_(True)
        with evaluating(model):
            yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def autocast(device: torch.device, precision: torch.dtype | None) -> AbstractContextManager[Any]:
    """Matrix products in a dtype; None leaves them as they are."""
    return nullcontext() if precision is None else torch.autocast(device.type, dtype=precision)


@contextmanager
def hooked(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Removes hooks at the end of the context."""
    registered = list(handles)
    try:
        yield
    finally:
        for handle in registered:
            handle.remove()


def first_argument(arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> Tensor:
    """What a layer was called with, by position or by keyword."""
    given: Tensor = arguments[0] if arguments else next(iter(keywords.values()))
    return given


def before_call(module: nn.Module, see: Callable[[Tensor], None]) -> RemovableHandle:
    """A hook that shows a module's input to ``see`` before each call."""
    return module.register_forward_pre_hook(
        lambda _module, arguments, keywords: see(first_argument(arguments, keywords)), with_kwargs=True
    )


def calls_and_gradients(
    layers: Mapping[str, Sequence[nn.Module]], see: Callable[[str, nn.Module, Tensor, Tensor], Backward]
) -> list[RemovableHandle]:
    """Hooks that call ``see(name, module, input, output)`` at every call of the modules of a layer, and what that gives back
    with the gradient of the call's output.

    Parameters and inputs need not ask for gradients: the first layer on the way starts the graph.
    """

    def hook(name: str) -> Callable[..., Tensor | None]:
        def called(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Tensor) -> Tensor | None:
            backward = see(name, module, first_argument(arguments, keywords), output)
            if backward is None:
                return None
            # Copied, so that the model may change it in place.
            started = output if output.requires_grad else output.detach().requires_grad_().clone()
            started.register_hook(backward)
            return started

        return called

    return [
        module.register_forward_hook(hook(name), with_kwargs=True) for name, modules in layers.items() for module in modules
    ]


def has_input_vectors(module: nn.Module) -> bool:
    """Whether the module multiplies its weight with vectors of its input: linear layers, and convolutions in one group."""
    if isinstance(module, _ConvNd):
        return module.groups == 1 and not module.transposed
    return not isinstance(module, nn.Embedding)


def input_vectors(module: nn.Module, given: Tensor) -> Tensor:
    """The vectors (examples, tokens, n) that a module's weight, seen as (out, n), is multiplied with; patches for a
    convolution."""
    if not isinstance(module, _ConvNd):
        return by_example(given)
    dims = len(module.kernel_size)
    patches = nn.functional.pad(batched(module, given), module._reversed_padding_repeated_twice)
    for axis, (kernel, dilation, stride) in enumerate(zip(module.kernel_size, module.dilation, module.stride), start=2):
        patches = patches.unfold(axis, (kernel - 1) * dilation + 1, stride)[..., ::dilation]
    # (batch, in, positions..., kernel...) -> (batch, positions, in x kernel)
    return patches.flatten(2, dims + 1).movedim(2, 1).flatten(2)


def batched(module: nn.Module, states: Tensor) -> Tensor:
    """What a convolution is given or gives, (batch, channels, ...), where the batch may be left out."""
    return states[None] if states.ndim == len(module.kernel_size) + 1 else states  # type: ignore[arg-type]


def output_vectors(module: nn.Module, states: Tensor) -> Tensor:
    """What a module gives, or its gradient, channels last: (batch, positions, channels) of a convolution."""
    return batched(module, states).flatten(2).transpose(1, 2) if isinstance(module, _ConvNd) else states


def by_example(vectors: Tensor) -> Tensor:
    """(examples, ..., n) -> (examples, tokens, n)."""
    if vectors.ndim < 3:
        vectors = vectors.reshape(-1, 1, vectors.shape[-1])
    return vectors.flatten(1, -2)


def weight_users(model: nn.Module, names: Iterable[str]) -> list[nn.Module]:
    """Those of the named modules that multiply their weight with input vectors, each once."""
    modules = dict.fromkeys(map(model.get_submodule, names))
    return [module for module in modules if has_input_vectors(module)]


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

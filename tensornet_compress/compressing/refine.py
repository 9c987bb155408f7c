"""Training stored numbers: full-precision copies for a while, rounded back to what is stored at the end; and the numbers of one
compressed block, so that its output follows the dense model's."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tensornet_compress.calibrate import BlockRunner
from tensornet_compress.errors import TensorNetError
from tensornet_compress.frozen import Frozen
from tensornet_compress.nn import NetworkModule


@contextmanager
def master_parameters(modules: Iterable[nn.Module]) -> Iterator[list[nn.Parameter]]:
    """Float cores, scales and offsets of the networks among ``modules``, and vectors (norms, biases) of all of them, as
    trainable parameters in float32 at least.

    Networks decode these parts to the dtype that they work in; every other module sees its vectors rounded to their own
    dtype, so that the model computes in the dtypes that it has outside the context.

    All other parameters of the modules are frozen inside the context. At the end each trained parameter is rounded to its own
    dtype in its own storage, so that modules that share it go on sharing it, and ``requires_grad`` flags are put back.

    Raises:
        TensorNetError: there is nothing to train.
    """
    owners: dict[int, tuple[nn.Parameter, list[tuple[nn.Module, str]]]] = {}
    flags: list[tuple[nn.Parameter, bool]] = []
    held: list[tuple[nn.Module, dict[str, nn.Parameter | None]]] = []
    for module in dict.fromkeys(modules):
        held.append((module, dict(module._parameters)))
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if _is_trainable(module, parameter):
                owners.setdefault(id(parameter), (parameter, []))[1].append((module, name))
            else:
                flags.append((parameter, parameter.requires_grad))
    if not owners:
        raise TensorNetError("nothing to train: no network, norm or bias among the given modules")
    masters: list[nn.Parameter] = []
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        for parameter, places in owners.values():
            master = nn.Parameter(parameter.detach().to(torch.promote_types(parameter.dtype, torch.float32), copy=True))
            masters.append(master)
            for module, name in places:
                module._parameters[name] = master
                if not isinstance(module, NetworkModule) and parameter.dtype != master.dtype:
                    parametrize.register_parametrization(module, name, _Rounded(parameter.dtype), unsafe=True)
        yield masters
    finally:
        for (parameter, places), master in zip(owners.values(), masters):
            with torch.no_grad():
                parameter.copy_(_within(master, parameter.dtype))
            for module, name in places:
                if parametrize.is_parametrized(module, name):
                    parametrize.remove_parametrizations(module, name, leave_parametrized=False)
        for module, before in held:
            # All of them, because a parametrisation moves its parameter to the end.
            module._parameters.clear()
            module._parameters.update(before)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def _is_trainable(module: nn.Module, parameter: Tensor) -> bool:
    return parameter.is_floating_point() and (isinstance(module, NetworkModule) or parameter.ndim == 1)


class _Rounded(nn.Module):
    """A master as its module sees it: in the dtype that is stored."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype

    def forward(self, master: Tensor) -> Tensor:
        return _within(master, self.dtype).to(self.dtype)


def _within(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Values within the range of ``dtype``: an infinity must never be stored."""
    largest = torch.finfo(dtype).max
    return values.clamp(-largest, largest)


def relative_groups(parameters: Iterable[nn.Parameter], rate: float) -> list[dict[str, object]]:
    """Optimiser groups whose learning rate is ``rate`` times the root mean square of each parameter: cores, scales and norms
    differ in size by orders of magnitude, and Adam's steps do not."""
    return [{"params": [p], "lr": rate * max(float(p.detach().square().mean().sqrt()), 1e-12)} for p in parameters]


class BlockRefinement(Frozen):
    """Adam on a block's cores, scales, norms and biases: ``epochs`` passes over the calibration batches at ``rate`` times
    each parameter's own size, falling to zero along a cosine."""

    epochs: int = Field(default=2, ge=1)
    rate: float = Field(default=3e-3, gt=0)


def refine_block(
    runner: BlockRunner,
    number: int,
    inputs: Sequence[Tensor],
    targets: Sequence[Tensor],
    fitted: float,
    settings: BlockRefinement,
) -> float:
    """Train block ``number`` on ``inputs`` (what the compressed prefix gives) towards ``targets``; the relative error after.

    ``fitted`` is the error before; a block that training did not improve gets its parameters back.
    """
    block = runner.blocks[number][1]
    with master_parameters(block.modules()) as parameters, torch.enable_grad():
        optimiser = torch.optim.Adam(relative_groups(parameters, settings.rate))
        steps = settings.epochs * len(inputs)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
        before = [parameter.detach().clone() for parameter in parameters]
        for _ in range(settings.epochs):
            for batch, (state, target) in enumerate(zip(inputs, targets)):
                optimiser.zero_grad(set_to_none=True)
                token_errors(runner, batch, runner.run(number, batch, state), target).mean().backward()
                optimiser.step()
                schedule.step()
        refined = relative_error(runner, runner.outputs(number, inputs), targets)
        if not refined < fitted:
            with torch.no_grad():
                for parameter, value in zip(parameters, before):
                    parameter.copy_(value)
    return min(refined, fitted)


def token_errors(runner: BlockRunner, batch: int, output: Tensor, target: Tensor) -> Tensor:
    """Squared error of each token's state relative to its own squared length (tokens,): a massive activation counts as one
    token."""
    output, target = runner.kept(batch, output).float(), runner.kept(batch, target).float()
    return (output - target).square().sum(-1) / target.square().sum(-1).clamp_min(1e-12)


def relative_error(runner: BlockRunner, outputs: Sequence[Tensor], targets: Sequence[Tensor]) -> float:
    """Mean of ``token_errors`` over all batches."""
    errors = [token_errors(runner, batch, *pair) for batch, pair in enumerate(zip(outputs, targets))]
    return float(torch.cat(errors).mean())

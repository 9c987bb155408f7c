"""Training the numbers of one compressed block so that its output follows the dense model's."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

from tensornet_compress.calibrate import BlockRunner
from tensornet_compress.frozen import Frozen
from tensornet_compress.train.masters import master_parameters, relative_groups


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
        refined = _measure(runner, number, inputs, targets)
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


def _measure(runner: BlockRunner, number: int, inputs: Sequence[Tensor], targets: Sequence[Tensor]) -> float:
    with torch.no_grad():
        return relative_error(runner, [runner.run(number, i, state) for i, state in enumerate(inputs)], targets)

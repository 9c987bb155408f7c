"""GPTQ (2210.17323) as its authors run it, written anew as a baseline.

Faithful to the reference code: the Hessian is the second moment of the inputs that the compressed prefix produces, damped by
1 % of its mean diagonal; dead inputs are zeroed; columns are rounded in order (or by falling diagonal, ``act_order``), each
error is spread over the columns left; a group's grid is fitted when its first column is reached, to the weights as the error
feedback has left them (``static_groups``: beforehand). Blocks are taken in sequence, and inside a block either all layers on
one pass (the reference's default) or in order of execution (``true_sequential``).

The grids are those of ``IntFormat`` (minimum to maximum with an integer zero point ``z`` or an offset ``o``), so that GPTQ and
ours store the same parts at the same cost. ``mse`` searches clipping ranges as the reference's option of that name does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tensornet_compress.bench.peers.weights.rtn import format_for
from tensornet_compress.bench.read_back import read_back
from tensornet_compress.bench.weight_case import WEIGHT_METHODS, Compressed, WeightCase, WeightMethod
from tensornet_compress.calibrate import Batch, BlockRunner
from tensornet_compress.calibrate.blocks import Hook
from tensornet_compress.coding import IntFormat, parse_format
from tensornet_compress.decompose import realise
from tensornet_compress.nn import NetworkModule, Target, find_targets, layer_weight, replace_module
from tensornet_compress.tensor import NetworkSpec, TensorNetwork


@dataclass(frozen=True)
class GPTQ:
    """Settings of the baseline; the defaults are the reference's, with its recommended options for small groups."""

    fmt: str = "int4g64z"
    damping: float = 0.01
    act_order: bool = True
    static_groups: bool = True
    mse: bool = False
    true_sequential: bool = True
    sequential: bool = True
    skip_first: int = 0


def gptq_codes(weight: Tensor, hessian: Tensor, fmt: IntFormat, settings: GPTQ) -> dict[str, Tensor]:
    """Stored parts of ``weight`` (rows, run) rounded by GPTQ on the second moment ``hessian`` (run, run)."""
    rows, run = weight.shape
    width = fmt.width(run)
    work = weight.double().clone()
    hessian = hessian.double().clone()
    dead = hessian.diagonal() == 0
    hessian[dead, dead] = 1
    work[:, dead] = 0
    order = torch.arange(run)
    if settings.act_order:
        order = hessian.diagonal().argsort(descending=True, stable=True)
    hessian = hessian[order][:, order]
    hessian += settings.damping * hessian.diagonal().mean() * torch.eye(run, dtype=hessian.dtype)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    upper = torch.linalg.cholesky(inverse, upper=True).float()
    importance = torch.ones(run) if settings.mse else None
    groups = -(-run // width)
    scale, zero = torch.empty(rows, groups), torch.empty(rows, groups)
    static = settings.static_groups or settings.act_order
    if static:
        scale, zero = fmt.fit_grid(work.float(), importance)
    left = work[:, order].float()
    codes = torch.empty(rows, run)
    for start in range(0, run, width):
        end = min(start + width, run)
        if not static:
            group = start // width
            part = None if importance is None else importance[start:end]
            fitted = IntFormat.model_validate(fmt.model_dump() | {"group": 0}).fit_grid(left[:, start:end], part)
            scale[:, group], zero[:, group] = fitted[0][:, 0], fitted[1][:, 0]
        errors = torch.empty(rows, end - start)
        for column in range(start, end):
            group = int(order[column]) // width
            step, offset = scale[:, group], zero[:, group]
            code = ((left[:, column] - offset) / step).round_().clamp_(0, fmt.levels)
            codes[:, order[column]] = code
            error = (left[:, column] - (code * step + offset)) / upper[column, column]
            left[:, column + 1 : end].addr_(error, upper[column, column + 1 : end], alpha=-1)
            errors[:, column - start] = error
        left[:, end:].addmm_(errors, upper[start:end, end:], alpha=-1)
    return fmt.assemble(codes.to(torch.uint8), scale, zero)


def gptq_network(weight: Tensor, hessian: Tensor, settings: GPTQ) -> TensorNetwork:
    """A one-core network of a (rows, run) weight."""
    fmt = parse_format(settings.fmt)
    assert isinstance(fmt, IntFormat)
    dtype = str(weight.dtype).removeprefix("torch.")
    spec = NetworkSpec.dense(tuple(weight.shape), fmt, dtype)
    return TensorNetwork(spec, {f"core0{part}": value for part, value in gptq_codes(weight, hessian, fmt, settings).items()})


def quantise_model(
    model: nn.Module,
    batches: Sequence[Batch],
    settings: GPTQ,
    precision: torch.dtype | None = None,
    advance: Callable[[], None] = lambda: None,
    targets: Sequence[Target] | None = None,
) -> int:
    """GPTQ on every targeted layer of the blocks of ``model`` (all linear layers by default), in place; stored bytes of these
    layers, biases included."""
    chosen = {target.name: target for target in (find_targets(model)[0] if targets is None else targets)}
    runner = BlockRunner(model, batches, list(chosen), precision)
    states = list(runner.states)
    total = 0
    with torch.no_grad():
        for number, (prefix, block) in enumerate(runner.blocks):
            inside = [name.removeprefix(f"{prefix}.") for name in chosen if name.startswith(f"{prefix}.")]
            groups = runner.groups(number, inside) if inside else []
            exact = [runner.run(number, batch, state) for batch, state in enumerate(states)] if not settings.sequential else []
            if groups and (not settings.true_sequential or not settings.sequential):
                moments = _moments(runner, number, states, [group[0] for group in groups], settings)
            for group in groups:
                if settings.true_sequential and settings.sequential:
                    moments = _moments(runner, number, states, [group[0]], settings)
                for name in group:
                    module = block.get_submodule(name)
                    network = gptq_network(layer_weight(module).contiguous(), moments[group[0]], settings)
                    bias: Any = getattr(module, "bias", None)
                    total += network.nbytes + (0 if bias is None else bias.numel() * bias.element_size())
                    replace_module(model, f"{prefix}.{name}", network)
            states = exact or [runner.run(number, batch, state) for batch, state in enumerate(states)]
            advance()
    return total


def _moments(
    runner: BlockRunner, number: int, states: Sequence[Tensor], names: Sequence[str], settings: GPTQ
) -> dict[str, Tensor]:
    """Second moments of the inputs of some modules of a block, in one pass."""
    sums: dict[str, Tensor] = {}
    counts = dict.fromkeys(names, 0)

    for batch, state in enumerate(states):

        def note(name: str, batch: int = batch) -> Hook:
            def hook(given: Tensor) -> None:
                vectors = runner.kept(batch, given[:, settings.skip_first :] if settings.skip_first else given).float()
                # Under autocast the product would be rounded to bfloat16, and no longer be positive definite.
                with torch.autocast(vectors.device.type, enabled=False):
                    product = (vectors.T @ vectors).double()
                sums[name] = sums[name] + product if name in sums else product
                counts[name] += len(vectors)

            return hook

        runner.run_until(number, batch, state, {name: note(name) for name in names}, names[-1])
    return {name: total / counts[name] for name, total in sums.items()}


def compress(case: WeightCase, bits: float) -> Compressed:
    """GPTQ on a case's layers, on the fullest grid that the bits allow.

    Raises:
        Unavailable: no grid is that coarse.
    """
    shortest = min(case.matrix(target).shape[1] for target in case.targets)
    settings = GPTQ(format_for(bits, shortest), mse=True)
    quantise_model(case.model, case.batches, settings, targets=case.targets)
    left = _round_outside_blocks(case, settings.fmt)
    cells, ledger, _ = read_back(case, "integers")
    note = f"outside the blocks, and so rounded to nearest: {', '.join(left)}" if left else ""
    return Compressed(cells, ledger, note, asdict(settings))


def _round_outside_blocks(case: WeightCase, fmt: str) -> list[str]:
    """Layers that no block holds, as an encoder's pooler: the reference leaves them alone, here they take the same bytes."""
    names = [t.name for t in case.targets if not isinstance(case.model.get_submodule(t.name), NetworkModule)]
    for name in names:
        weight = layer_weight(case.model.get_submodule(name)).contiguous()
        replace_module(case.model, name, realise(weight, NetworkSpec.dense(tuple(weight.shape), parse_format(fmt))))
    return names


WEIGHT_METHODS.add(
    WeightMethod(
        "gptq",
        compress,
        explanation="GPTQ as its reference runs it: act order, static groups, sequential blocks, clipping by mse",
    )
)

"""GPTQ (2210.17323) as its authors run it, written anew as a baseline.

Faithful to the reference code with the options that it recommends for small groups: the Hessian is the second moment of the
inputs that the compressed prefix produces, damped by 1 % of its mean diagonal; dead inputs are zeroed; columns are rounded by
falling diagonal, each error is spread over the columns left; the grids of all groups are fitted beforehand, with clipping
ranges searched by squared error. Blocks are taken in sequence, and layers inside a block in order of execution.

The grids are those of ``IntFormat`` (minimum to maximum with an integer zero point ``z`` or an offset ``o``), so that GPTQ and
ours store the same parts at the same cost.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tensornet_compress.bench.peers.integers import format_for
from tensornet_compress.bench.registry import Method
from tensornet_compress.bench.weight_case import WEIGHT_METHODS, Compressed, WeightCase
from tensornet_compress.bisection import least_kept
from tensornet_compress.calibrate import BlockRunner
from tensornet_compress.coding import CodedFormat, IntFormat, NumberFormat, parse_format
from tensornet_compress.decompose import realise
from tensornet_compress.decompose.one_step import Canceller
from tensornet_compress.nn import NetworkModule, layer_weight, replace_module
from tensornet_compress.tensor import NetworkSpec, TensorNetwork

DAMPING = 0.01


def gptq_codes(weight: Tensor, hessian: Tensor, fmt: IntFormat) -> dict[str, Tensor]:
    """Stored parts of ``weight`` (rows, run) rounded by GPTQ on the second moment ``hessian`` (run, run)."""
    rows, run = weight.shape
    width = fmt.width(run)
    work, hessian = weight.double().clone(), hessian.double().clone()
    dead = hessian.diagonal() == 0
    hessian[dead, dead] = 1
    work[:, dead] = 0
    order = hessian.diagonal().argsort(descending=True, stable=True)
    hessian = hessian[order][:, order]
    hessian += DAMPING * hessian.diagonal().mean() * torch.eye(run, dtype=hessian.dtype)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    upper = torch.linalg.cholesky(inverse, upper=True).float()
    scale, zero = fmt.fit_grid(work.float(), torch.ones(run))
    left = work[:, order].float()
    codes = torch.empty(rows, run)
    for start in range(0, run, width):
        end = min(start + width, run)
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


def quantise_blocks(case: WeightCase, rounded: Callable[[Tensor, Tensor], TensorNetwork]) -> None:
    """Round every target in the blocks of the case's model, in place: ``rounded(weight, second moment of its inputs)``."""
    runner = BlockRunner(case.model, case.batches, [target.name for target in case.targets])
    states = list(runner.states)
    with torch.no_grad():
        for number, (prefix, block) in enumerate(runner.blocks):
            inside = [t.name.removeprefix(f"{prefix}.") for t in case.targets if t.name.startswith(f"{prefix}.")]
            for group in runner.groups(number, inside) if inside else []:
                moment = _second_moment(runner, number, states, group[0])
                for name in group:
                    weight = layer_weight(block.get_submodule(name)).contiguous()
                    replace_module(case.model, f"{prefix}.{name}", rounded(weight, moment))
            states = [runner.run(number, batch, state) for batch, state in enumerate(states)]


def _second_moment(runner: BlockRunner, number: int, states: Sequence[Tensor], name: str) -> Tensor:
    """Of the inputs of a module of a block, in one pass."""
    total: Any = 0
    count = 0
    for batch, state in enumerate(states):

        def hook(given: Tensor, batch: int = batch) -> None:
            nonlocal total, count
            vectors = runner.kept(batch, given).float()
            total = total + (vectors.T @ vectors).double()
            count += len(vectors)

        runner.run_until(number, batch, state, {name: hook}, name)
    moment: Tensor = total / count
    return moment


def _network(weight: Tensor, fmt: NumberFormat, parts: Mapping[str, Tensor]) -> TensorNetwork:
    spec = NetworkSpec.dense(tuple(weight.shape), fmt, str(weight.dtype).removeprefix("torch."))
    return TensorNetwork(spec, {f"core0{part}": value for part, value in parts.items()})


def entropy_coded(weight: Tensor, moment: Tensor, bits: float) -> TensorNetwork:
    """GPTQ's codes on an even grid, one step for the whole layer, written by our entropy coder: at most ``bits`` per weight."""
    canceller = Canceller.of(moment, weight.shape[1], DAMPING)
    canceller = replace(canceller, deviations=torch.ones_like(canceller.deviations))

    def parts(step: float) -> dict[str, Tensor]:
        return CodedFormat(step=step).assemble(canceller.codes(weight.float(), None, step, slope=0.0))

    def fits(step: float) -> bool:
        return 8 * parts(step)["_coded"].numel() <= bits * weight.numel()

    spread = float(weight.float().std())
    step = least_kept(fits, spread * 2.0**-12, spread * 2.0**5, steps=14)
    made = parts(step)
    return _network(weight, CodedFormat(step=step).of(made), made)


def compress_entropy_coded(case: WeightCase, bits: float) -> Compressed:
    """GPTQ with an entropy coder in the place of packed integers, every layer at the same bits per weight."""
    quantise_blocks(case, lambda weight, moment: entropy_coded(weight, moment, bits))
    left = [t.name for t in case.targets if not isinstance(case.model.get_submodule(t.name), NetworkModule)]
    for outside in left:
        weight = layer_weight(case.model.get_submodule(outside)).contiguous()
        replace_module(case.model, outside, entropy_coded(weight, torch.eye(weight.shape[1]), bits))
    return case.read_back("integers", settings={"damping": DAMPING})


def compress(case: WeightCase, bits: float) -> Compressed:
    """GPTQ on a case's layers, on the fullest grid that the bits allow. Raises ``Unavailable`` where none is that coarse."""
    shortest = min(case.matrix(target).shape[1] for target in case.targets)
    name = format_for(bits, shortest)
    fmt = parse_format(name)
    assert isinstance(fmt, IntFormat)
    quantise_blocks(case, lambda weight, moment: _network(weight, fmt, gptq_codes(weight, moment, fmt)))
    # Layers that no block holds, as an encoder's pooler: the reference leaves them alone, here they take the same bytes.
    left = [t.name for t in case.targets if not isinstance(case.model.get_submodule(t.name), NetworkModule)]
    for outside in left:
        weight = layer_weight(case.model.get_submodule(outside)).contiguous()
        replace_module(case.model, outside, realise(weight, NetworkSpec.dense(tuple(weight.shape), fmt)))
    note = f"outside the blocks, and so rounded to nearest: {', '.join(left)}" if left else ""
    return case.read_back("integers", note=note, settings={"fmt": name, "damping": DAMPING})


WEIGHT_METHODS.add(
    Method("gptq", compress, "GPTQ as its reference runs it: act order, static groups, sequential blocks, clipping by mse")
)
WEIGHT_METHODS.add(
    Method("gptq-entropy", compress_entropy_coded, "GPTQ's codes on one even grid a layer, entropy-coded: the fair control")
)

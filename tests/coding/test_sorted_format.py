"""Sorted entries as the format of a core: prices of orders, what is lost, what is kept in memory, damage."""

from __future__ import annotations

from math import lgamma, log

import numpy as np
import pytest
import torch

import tensornet_compress as tnc
from tensornet_compress.coding import CodedFormat, SortedFormat
from tensornet_compress.coding.sorted_format import SortedRuns
from tensornet_compress.coding.tied_orders import decode_orders, encode_orders, most_order_nbytes
from tensornet_compress.errors import CheckpointError, TensorNetError
from tensornet_compress.tensor import NetworkSpec, TensorNetwork


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def stored(tensor: torch.Tensor, fmt: SortedFormat | CodedFormat) -> TensorNetwork:
    return tnc.realise(tensor, NetworkSpec.dense(tuple(tensor.shape), fmt))


def noise_ratio(tensor: torch.Tensor, network: TensorNetwork) -> float:
    """Signal to noise in dB."""
    return float(10 * (tensor.square().sum() / (tensor - network.to_dense()).square().sum()).log10())


def orders(runs: int, sizes: list[int], seed: int = 0) -> np.ndarray:
    labels = np.repeat(np.arange(len(sizes)), sizes).astype(np.uint8)
    generator = np.random.default_rng(seed)
    return np.stack([generator.permutation(labels) for _ in range(runs)])


@pytest.mark.parametrize(
    "sizes", [[7], [1, 1], [1] * 16, [1] * 256, [3, 500, 2], [512] * 8, [1, 4095], [40_000, 3, 60_000]], ids=str
)
@pytest.mark.parametrize("runs", [1, 50])
def test_an_order_comes_back_at_the_price_of_what_it_tells(runs: int, sizes: list[int]) -> None:
    groups = orders(runs, sizes)
    data = encode_orders(groups, sizes)
    assert np.array_equal(decode_orders(data, runs, sum(sizes), len(sizes)), groups)
    told = runs * (lgamma(sum(sizes) + 1) - sum(lgamma(size + 1) for size in sizes)) / log(2) / 8
    side = 4 * len(sizes) + 8
    assert told - 8 <= len(data) - side <= 1.01 * told + 8 + runs
    assert len(data) <= most_order_nbytes(runs, sizes)


@pytest.mark.parametrize(
    ("fmt", "bits"),
    [
        (SortedFormat(run=8, groups=8), 1.91),  # log2(n!) / n of a whole sort
        (SortedFormat(run=16, groups=16), 2.77),
        (SortedFormat(run=64, groups=64), 4.62),
        (SortedFormat(run=16, groups=4), 1.62),
        (SortedFormat(run=4096, groups=8), 3.0),
    ],
)
def test_prices_of_orders(fmt: SortedFormat, bits: float) -> None:
    network = stored(normal(16, 4096), fmt)
    order = network.stored["core0_ties"].numel() - 4 * fmt.groups - 8
    assert 8 * order / (16 * 4096) == pytest.approx(bits, abs=0.01)
    assert network.nbytes == network.spec.nbytes == sum(part.nbytes for part in network.stored.values())


@pytest.mark.parametrize("shape", [(12, 40), (12, 5, 8), (480,)])
@pytest.mark.parametrize("run", [8, 40, 480])
@pytest.mark.parametrize("rank", [1, 3])
def test_memory_and_looked_up_rows_decode_like_the_file(shape: tuple[int, ...], run: int, rank: int) -> None:
    core = normal(*shape)
    fmt = SortedFormat(run=run, rank=rank, step=0.3)
    parts = fmt.encode(core)
    fmt = fmt.of(parts)
    assert {name: (tuple(part.shape), part.dtype) for name, part in parts.items()} == fmt.parts(shape)
    whole = fmt.decode(parts, shape, torch.float32)
    resident = fmt.resident(parts, shape) | {name: parts[name] for name in ("_scale", "_profile")}
    assert torch.equal(fmt.decode(resident, shape, torch.float32), whole)
    rows = torch.tensor([3, 3, 0, shape[0] - 1])
    assert torch.allclose(fmt.decode_rows(resident, shape, rows, torch.float32), whole[rows], atol=1e-6)
    sizes = SortedRuns(core.reshape(-1, run)).sizes(0.3)
    assert torch.allclose(SortedRuns(core.reshape(-1, run)).rows(sizes, rank, run).view(shape), whole)


def test_rows_that_share_their_values_are_exact_and_small() -> None:
    profile, generator = normal(200).mul(10).round(), torch.Generator().manual_seed(1)
    matrix = torch.stack([scale * profile[torch.randperm(200, generator=generator)] for scale in (1, 2, 4)])
    network = stored(matrix, SortedFormat(run=200, step=1e-3))
    assert torch.allclose(network.to_dense(), matrix, rtol=1e-3)
    assert network.spec.terms[0].formats[0].groups == len(profile.unique())


def test_uniform_numbers_are_sorted_to_rank_two() -> None:
    matrix = torch.rand(64, 200, generator=torch.Generator().manual_seed(0))
    one, two = (stored(matrix, SortedFormat(run=200, rank=rank, groups=200)) for rank in (1, 2))
    assert noise_ratio(matrix, two) > 30 > noise_ratio(matrix, one)


@pytest.mark.parametrize("step", [0.3, 0.6])
def test_groups_of_even_steps_tend_to_entropy_coded_rounding_and_beat_equal_groups(step: float) -> None:
    matrix = normal(64, 4096)
    tied = stored(matrix, SortedFormat(run=4096, step=step))
    coded = stored(matrix, CodedFormat(step=step))
    # 6.02 dB are a bit; rounding there takes the step to the next eighth of an octave.
    bits = [8 * network.nbytes / matrix.numel() - noise_ratio(matrix, network) / 6.02 for network in (tied, coded)]
    assert bits[0] == pytest.approx(bits[1], abs=0.06)
    groups = max(g for g in range(2, 60) if 8 * stored(matrix, SortedFormat(run=4096, groups=g)).nbytes <= 8 * tied.nbytes)
    assert noise_ratio(matrix, stored(matrix, SortedFormat(run=4096, groups=groups))) < noise_ratio(matrix, tied) - 2


def test_large_zero_and_constant_numbers() -> None:
    huge = normal(8, 64) * 1e14
    assert noise_ratio(huge, stored(huge, SortedFormat(run=512, step=0.2))) > 20
    for constant in (torch.zeros(8, 64), torch.full((8, 64), 3.0)):
        network = stored(constant, SortedFormat(run=64, step=0.5))
        assert torch.allclose(network.to_dense(), constant)
        assert network.spec.terms[0].formats[0].groups == 1


@pytest.mark.parametrize(
    ("fmt", "message"),
    [
        (SortedFormat(run=5, step=0.5), "runs of 5 entries do not divide"),
        (SortedFormat(run=16), "has 1 to 16 groups, was given 0"),
        (SortedFormat(run=16, groups=17), "has 1 to 16 groups, was given 17"),
        (SortedFormat(run=4096, step=1e-4), "at most 256 can be"),
    ],
)
def test_bad_options_are_named(fmt: SortedFormat, message: str) -> None:
    with pytest.raises(TensorNetError, match=message):
        fmt.encode(normal(16, 256))


def test_damage_is_an_error() -> None:
    sizes = [20, 60, 20]
    data = encode_orders(orders(40, sizes), sizes)
    generator = np.random.default_rng(1)
    for cut in (0, 10, 19, len(data) - 4):
        with pytest.raises(CheckpointError):
            decode_orders(data[:cut], 40, 100, 3)
    with pytest.raises(CheckpointError):
        decode_orders(np.concatenate([data, np.zeros(4, np.uint8)]), 40, 100, 3)
    for _ in range(200):
        damaged = data.copy()
        damaged[generator.integers(len(data))] ^= 1 << generator.integers(8)
        with pytest.raises(CheckpointError):
            decode_orders(damaged, 40, 100, 3)

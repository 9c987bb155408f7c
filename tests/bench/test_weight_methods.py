"""Every weight method on a tiny model: it fits its bytes, counts them all, and leaves the model as it was."""

from __future__ import annotations

from math import ceil

import pytest
import torch

from tensornet_compress.bench import methods  # noqa: F401
from tensornet_compress.bench.peer_packages import Unavailable
from tensornet_compress.bench.peers.integers import format_for, grid_for
from tensornet_compress.bench.peers.tensor_formats import chain_ranks, digits, numbers
from tensornet_compress.bench.registry import Method
from tensornet_compress.bench.weight_case import SLACK, WEIGHT_METHODS, Approximation, Compressed, WeightCase
from tests.models import batches, tiny_bert, tiny_gpt2, tiny_llama

BITS = 6.0
BLOCK = ["model.layers.1.*"]


@pytest.fixture(scope="module")
def case() -> WeightCase:
    made = WeightCase(tiny_llama(), batches(), list(BLOCK))
    _ = made.kept, made.targets
    return made


@pytest.mark.parametrize("method", list(WEIGHT_METHODS), ids=lambda method: method.name)
def test_a_method_fits_its_bytes_and_is_undone(method: Method[WeightCase, Compressed], case: WeightCase) -> None:
    before = {name: parameter.clone() for name, parameter in case.model.named_parameters()}
    try:
        made = method.run(case, BITS)
    except Unavailable as reason:
        pytest.skip(str(reason))
    finally:
        compressed = {target.name: type(case.model.get_submodule(target.name)) for target in case.targets}
        case.put_back()
    assert {cell.name for cell in made.layers} == set(compressed) == {target.name for target in case.targets}
    total = sum(cell.nbytes for cell in made.layers)
    assert total == sum(made.ledger.values())
    assert 8 * total / case.weights <= BITS * (1 if method.ours else SLACK)
    assert all(cell.error is not None and cell.error < 1.01 for cell in made.layers)
    after = dict(case.model.named_parameters())
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def approximation(case: WeightCase, name: str, bits: float) -> tuple[Approximation, torch.Tensor]:
    """One layer through a peer's own function, found by compressing the case and reading the first layer."""
    from tensornet_compress.bench.peers import integers, low_rank, tensor_formats

    peers = {
        "rtn": integers.round_weight,
        "hqq": integers.hqq,
        "quanto": integers.quanto,
        "svd": lambda *given: low_rank.truncate("euclidean", "bf16", *given),
        "svd-int8": lambda *given: low_rank.truncate("euclidean", "int8g64", *given),
        "tt": lambda *given: tensor_formats.decompose(False, *given),
        "ttm": lambda *given: tensor_formats.decompose(True, *given),
        "cp": lambda *given: tensor_formats.factorise("CP", *given),
        "block-tt": lambda *given: tensor_formats.factorise("BlockTT", *given),
    }
    target = next(target for target in case.targets if target.name.endswith("gate_proj"))
    matrix = case.matrix(target)
    try:
        return peers[name](case, target, matrix, int(bits * matrix.numel() / 8)), matrix
    except Unavailable as reason:
        pytest.skip(str(reason))


def test_bytes_of_integers_are_codes_scales_and_zero_points(case: WeightCase) -> None:
    found, matrix = approximation(case, "rtn", 4.5 + 0.5)  # rows of 32: groups of 32 at 4 bits, 5 bits in all
    rows, columns = matrix.shape
    assert found.formats == "int4g32o"
    assert found.parts == {"codes": rows * columns // 2, "scales": 2 * rows, "zero points": 2 * rows}


def test_bytes_of_hqq_are_codes_scales_and_zero_points(case: WeightCase) -> None:
    found, matrix = approximation(case, "hqq", 5.0)
    groups = matrix.numel() // 32
    assert found.formats == "hqq int4 g32"
    assert found.parts == {"codes": matrix.numel() // 2, "scales": 2 * groups, "zero points": 2 * groups}


def test_bytes_of_quanto_are_codes_scales_and_shifts(case: WeightCase) -> None:
    found, matrix = approximation(case, "quanto", 5.0)
    groups = matrix.numel() // 32
    assert found.formats == "quanto qint4 g32"
    assert found.parts == {"codes": matrix.numel() // 2, "scales": 2 * groups, "zero points": 2 * groups}
    whole, matrix = approximation(case, "quanto", 8.5)
    assert whole.parts == {"codes": matrix.numel(), "scales": 2 * len(matrix)}


@pytest.mark.parametrize(("name", "per_number"), [("svd", 2.0), ("svd-int8", 1.0)])
def test_bytes_of_two_factors(case: WeightCase, name: str, per_number: float) -> None:
    found, matrix = approximation(case, name, BITS)
    (rank,) = found.ranks
    rows, columns = matrix.shape
    scales = 0 if name == "svd" else 2 * (ceil(rows * rank / 64) + ceil(rank * columns / 64))
    assert found.parts == {"factors": int(per_number * rank * (rows + columns)) + scales}
    assert int(torch.linalg.matrix_rank(found.matrix)) == rank


@pytest.mark.parametrize("name", ["tt", "ttm", "block-tt"])
def test_bytes_of_trains_are_two_for_each_number_of_their_cores(case: WeightCase, name: str) -> None:
    found, matrix = approximation(case, name, BITS)
    rows, columns = (digits(size) for size in matrix.shape)
    dims = (*rows, *columns) if name == "tt" else tuple(a * b for a, b in zip(rows, columns))
    assert found.parts["factors"] == 2 * numbers(dims, (1, *found.ranks, 1)) <= int(BITS * matrix.numel() / 8)


@pytest.mark.parametrize("name", ["tt", "ttm"])
def test_trains_of_full_rank_are_the_weight_itself(case: WeightCase, name: str) -> None:
    found, matrix = approximation(case, name, 200.0)
    assert torch.allclose(found.matrix, matrix, atol=0.02 * float(matrix.abs().max()))
    dims = (*digits(matrix.shape[0]), *digits(matrix.shape[1]))
    assert name != "tt" or found.ranks == chain_ranks(dims, 10**6)[1:-1]


def test_bytes_of_cp_are_two_for_each_number_of_weights_and_factors(case: WeightCase) -> None:
    found, matrix = approximation(case, "cp", BITS)
    (rank,) = found.ranks
    sides = sum(sum(digits(size, 2)) for size in matrix.shape)
    assert found.parts == {"factors": 2 * rank * (1 + sides)}


def test_grids_take_most_bits_first_and_say_when_none_fits() -> None:
    codes = {bits: float(bits) for bits in range(2, 9)}
    assert [grid_for(bits, codes) for bits in (8.0, 6.0, 4.5, 3.5, 3.0, 2.5)] == [
        (8, 128), (5, 32), (4, 64), (3, 64), (2, 32), (2, 64)
    ]  # fmt: skip
    with pytest.raises(Unavailable, match=r"takes 2\.25 bits per weight, asked for 1\.5"):
        grid_for(1.5, codes)


def test_gptq_rounds_what_lies_outside_the_blocks_and_says_so() -> None:
    case = WeightCase(tiny_bert(), batches())
    _ = case.kept
    made = WEIGHT_METHODS["gptq"].run(case, BITS)
    case.put_back()
    assert {cell.name for cell in made.layers} == {target.name for target in case.targets} >= {"pooler.dense"}
    assert made.note.endswith("rounded to nearest: pooler.dense")


@pytest.mark.parametrize("name", ["rtn", "gptq", "ours-dense"])
def test_what_was_left_alone_is_the_same_before_and_after(name: str) -> None:
    fresh, used = (WeightCase(tiny_bert(), batches()) for _ in range(2))
    _ = fresh.kept, used.kept, used.targets
    WEIGHT_METHODS[name].run(used, BITS)
    assert (
        used.other_nbytes
        == fresh.other_nbytes
        == sum(p.numel() * 4 for n, p in fresh.model.named_parameters() if "embeddings" in n or "LayerNorm" in n)
    )


def test_whole_rows_make_room_for_one_more_bit() -> None:
    assert [format_for(bits, 576) for bits in (6.0, 4.5, 3.0)] == ["int6g0z", "int4g64o", "int3g0z"]
    assert format_for(6.0, 64) == "int5g32o"


def test_transposed_layers_and_biases_are_handled() -> None:
    case = WeightCase(tiny_gpt2(), batches(), ["transformer.h.0.mlp.c_fc"])
    _ = case.kept
    ids = batches(1)[0]
    exact = case.model(ids).logits
    made = WEIGHT_METHODS["rtn"].run(case, 8.0)
    near = case.model(ids).logits
    case.put_back()
    assert made.ledger["biases"] == 4 * 128
    assert 0 < float((near - exact).norm() / exact.norm()) < 0.02
    assert torch.equal(case.model(ids).logits, exact)


@pytest.mark.parametrize("name", ["svd", "svd-llm-int8", "tensorly-tt", "tensorly-ttm"])
def test_a_rank_that_takes_too_much_is_not_taken(name: str, case: WeightCase) -> None:
    with pytest.raises(Unavailable, match=r"rank 1 takes [\d.]+ bits per weight, asked for 0\.0[1-9]"):
        WEIGHT_METHODS[name].run(case, 0.1)
    case.put_back()

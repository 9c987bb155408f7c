"""The search on tensors whose best network is known, and on those that have none."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tensornet_compress as tnc
from tensornet_compress.errors import TensorNetError
from tensornet_compress.metric import KroneckerMetric, input_second_moment
from tensornet_compress.searching import SpectrumStore
from tensornet_compress.searching.limits import Deadline
from tensornet_compress.searching.seriation import seriations


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (2, 0, 3, 1), (3, 2, 1, 0), (0, 2, 1, 3)])
def test_an_identity_is_found_from_any_order_of_its_modes(order):
    tensor = torch.eye(64).reshape(8, 8, 8, 8).permute(order).contiguous()
    result = tnc.search(tensor, max_error=1e-6, orderings=("mode",))
    assert result.best.nbytes <= 256 * 4
    assert result.error <= 1e-6
    assert torch.allclose(result.best.to_dense(), tensor, atol=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_hidden_pairs_are_found_exactly(seed):
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.randn(5, 5, generator=generator) for _ in range(3)]
    order = torch.randperm(6, generator=generator).tolist()
    tensor = torch.einsum("ab,cd,ef->abcdef", *parts).permute(order).contiguous()
    result = tnc.search(tensor, max_error=1e-5, formats=("fp32",))
    pairs = {frozenset(order[p] // 2 for p in legs) for legs in _axes_of_cores(result.best.spec)}
    assert pairs == {frozenset({0}), frozenset({1}), frozenset({2})}
    assert result.best.nbytes == 3 * 25 * 4


def _axes_of_cores(spec):
    term = spec.terms[0]
    return [[term.layout.position_axes[p] for p in legs] for legs in term.topology.legs]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("limit", [{"max_error": 0.1}, {"max_bytes": 1500}])
def test_noise_gets_no_ordering(seed, limit):
    tensor = torch.randn(48, 40, generator=torch.Generator().manual_seed(seed))
    result = tnc.search(tensor, **limit)
    assert not result.choice.ordered
    assert result.null is not None
    assert result.choice.family == "dense"
    assert "no structure" in result.reason or "not accepted" in result.reason


def test_a_scrambled_field_costs_little_more_than_the_field():
    x, y = torch.linspace(0, 1, 128)[:, None], torch.linspace(0, 1, 96)[None]
    field = torch.sin(6 * x * y * 3 + 2 * x) + torch.exp(-20 * ((x - 0.4) ** 2 + (y - 0.6) ** 2))
    generator = torch.Generator().manual_seed(0)
    rows, columns = torch.randperm(128, generator=generator), torch.randperm(96, generator=generator)
    plain = tnc.search(field, max_error=0.01, null=False)
    scrambled = tnc.search(field[rows][:, columns], max_error=0.01)
    assert scrambled.error <= 0.01
    assert scrambled.choice.ordered
    assert scrambled.gain > scrambled.null.gain
    orders = scrambled.best.spec.terms[0].layout.order_nbytes
    assert orders > 0
    assert scrambled.best.nbytes - orders <= 1.2 * plain.best.nbytes


@pytest.mark.parametrize("share", [0.1, 0.3])
def test_a_partly_scrambled_kronecker_sum_is_put_right(share):
    generator = torch.Generator().manual_seed(4)
    plain = sum(torch.kron(torch.randn(16, 16, generator=generator), torch.randn(8, 8, generator=generator)) for _ in range(8))
    orders = []
    for _ in range(2):
        order, some = torch.arange(128), torch.randperm(128, generator=generator)[: int(share * 128)]
        order[some] = order[some[torch.randperm(len(some), generator=generator)]]
        orders.append(order)
    result = tnc.search(plain[orders[0]][:, orders[1]], max_error=1e-5, null=False)
    fibres = {order.axis: torch.tensor(order.permutation) for order in result.best.spec.terms[0].layout.fibre_orders}
    assert all(torch.equal(orders[axis][fibres[axis]], torch.arange(128)) for axis in (0, 1))
    assert result.best.nbytes <= 8 * (16 * 16 + 8 * 8) * 4 + 2 * 90


@settings(max_examples=15, deadline=None)
@given(
    shape=st.lists(st.integers(1, 13), min_size=1, max_size=4),
    seed=st.integers(0, 99),
    limit=st.sampled_from([0.5, 0.1, 1e-3, 0.0]),
)
def test_any_shape_keeps_its_limit(shape, seed, limit):
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    result = tnc.search(tensor, max_error=limit, time_budget=5, null=False)
    dense = result.best.to_dense()
    assert dense.shape == tensor.shape
    assert float((dense - tensor).norm() / tensor.norm().clamp_min(1e-30)) <= limit + 1e-6
    assert result.best.nbytes <= result.unordered.nbytes
    assert sum(t.numel() * t.element_size() for t in result.best.stored_tensors().values()) == result.best.nbytes


def test_equal_input_and_seed_give_equal_results():
    tensor = torch.randn(24, 36, generator=torch.Generator().manual_seed(1)).cumsum(0).cumsum(1)
    first, second = (tnc.search(tensor, max_error=0.02, time_budget=600, null=False) for _ in range(2))
    assert first.best.spec == second.best.spec
    assert all(torch.equal(a, b) for a, b in zip(first.best.stored_tensors().values(), second.best.stored_tensors().values()))


def test_a_metric_decides_what_is_kept():
    generator = torch.Generator().manual_seed(2)
    tensor = torch.randn(32, 24, generator=generator)
    weights = torch.full((24,), 1e-4)
    weights[:2] = 1.0
    result = tnc.search(tensor, max_bytes=500, metric=input_second_moment(torch.diag(weights)), null=False)
    kept = (result.best.to_dense() - tensor)[:, :2].norm() / tensor[:, :2].norm()
    assert kept < 0.2


def test_the_front_is_sorted_and_the_text_says_what_happened():
    tensor = torch.randn(16, 16, generator=torch.Generator().manual_seed(3))
    result = tnc.search(tensor, max_error=0.05, null=False)
    front = result.pareto
    assert [f.nbytes for f in front] == sorted(f.nbytes for f in front)
    assert [f.error for f in front] == sorted((f.error for f in front), reverse=True)
    assert result.reason in str(result)
    assert len(result.plot().axes) == 3
    assert len(result.history) >= len(result.found)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(dtype):
    tensor = torch.eye(16, dtype=dtype)
    result = tnc.search(tensor, max_error=1e-3)
    assert result.best.to_dense().dtype == dtype
    assert torch.allclose(result.best.to_dense().double(), tensor.double(), atol=1e-2)


@pytest.mark.parametrize(
    ("tensor", "options", "message"),
    [
        (torch.ones(3, 3), {}, "exactly one of max_error and max_bytes"),
        (torch.ones(3, 3), {"max_error": 0.1, "max_bytes": 5}, "exactly one"),
        (torch.ones(3, 3), {"max_error": -1.0}, "was given -1.0"),
        (torch.ones(3, 3), {"max_bytes": 0}, "at least 1"),
        (torch.full((3, 3), float("nan")), {"max_error": 0.1}, "NaN"),
        (torch.ones(0, 3), {"max_error": 0.1}, "empty"),
        (torch.ones(3, 3, dtype=torch.int64), {"max_error": 0.1}, "int64"),
        (torch.tensor(1.0), {"max_error": 0.1}, "without axes"),
        (torch.ones(3, 3), {"max_error": 0.1, "topologies": ("ring",)}, "unknown topologies"),
        (torch.ones(3, 3), {"max_error": 0.1, "time_budget": 0}, "time_budget"),
        (torch.randn(30, 30), {"max_bytes": 3}, "no form keeps at most 3 bytes"),
    ],
)
def test_bad_input_is_named(tensor, options, message):
    with pytest.raises(TensorNetError, match=message):
        tnc.search(tensor, **options)


def test_a_store_predicts_what_svd_drops_and_computes_each_cut_once():
    tensor = torch.randn(3, 4, 5, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    store = SpectrumStore(tensor)
    expected = torch.linalg.svdvals(tensor.permute(1, 3, 0, 2).reshape(8, 15))
    assert torch.allclose(store.spectrum({1, 3}), expected)
    assert torch.equal(store.spectrum({0, 2}), store.spectrum({1, 3}))
    assert len(store) == 1
    assert store.rank({1, 3}, float(expected[5:].square().sum()) + 1e-9) == 5


def test_a_sketched_spectrum_drops_what_is_left_exactly(monkeypatch):
    import tensornet_compress.searching.store as room

    monkeypatch.setattr(room, "LARGEST_SIDE", 20)
    monkeypatch.setattr(room, "_SKETCH", 12)
    generator = torch.Generator().manual_seed(0)
    tensor = torch.randn(40, 6, generator=generator) @ torch.randn(6, 50, generator=generator)
    store = SpectrumStore(tensor)
    exact = torch.linalg.svdvals(tensor.double())
    assert torch.allclose(store.spectrum({0})[:6], exact[:6], rtol=1e-4)
    assert float(store.tails({0})[0]) == pytest.approx(float(tensor.double().square().sum()), rel=1e-6)


def test_a_hidden_permutation_is_found():
    order = torch.randperm(48, generator=torch.Generator().manual_seed(0))
    result = tnc.search(torch.eye(48)[order], max_error=1e-3, null=False)
    assert result.choice.ordered
    assert result.best.nbytes <= 200
    assert torch.allclose(result.best.to_dense(), torch.eye(48)[order], atol=1e-3)


@pytest.mark.parametrize(
    ("tensor", "most"), [(torch.zeros(64, 64), 100), (torch.ones(61, 61), 126), (torch.full((30, 7), 3.7), 60)]
)
def test_what_is_constant_costs_next_to_nothing(tensor, most):
    result = tnc.search(tensor, max_error=1e-2, null=False)
    assert result.best.nbytes <= most
    assert float((result.best.to_dense() - tensor).norm()) <= 1e-2 * float(tensor.norm())


@pytest.mark.parametrize(
    ("tensor", "options", "message"),
    [
        ([[1.0]], {"max_error": 0.1}, "was given list"),
        (torch.ones(2, 2), {"max_error": "a"}, "must be a number, was given 'a'"),
        (torch.ones(2, 2), {"max_bytes": 10.5}, "must be an integer, was given 10.5"),
        (torch.ones(2, 2), {"max_error": 0.1, "formats": ()}, "formats is empty"),
        (torch.ones(2, 2), {"max_error": 0.1, "formats": "bf16"}, "list of names, was given the string 'bf16'"),
        (torch.randn(8, 8, dtype=torch.float64), {"max_error": 0.0, "null": False}, "the best reached"),
        (torch.randn(8, 8).to(torch.float8_e4m3fn), {"max_error": 0.1}, "was given torch.float8_e4m3fn"),
        (torch.eye(8).to_sparse(), {"max_error": 0.1}, "dense tensor with data"),
        (torch.ones(2, 2, device="meta"), {"max_error": 0.1}, "on meta"),
        (torch.ones((1,) * 53), {"max_error": 0.1}, "at most 52 axes, was given 53"),
        (torch.eye(8), {"max_error": 0.1, "formats": [1]}, "formats takes names such as 'int4g64z', was given 1"),
        (torch.eye(8), {"max_error": 0.1, "orderings": None}, "orderings takes a list of names, was given None"),
        (torch.eye(8), {"max_error": 0.1, "seed": 1.5}, "seed must be a whole number, was given 1.5"),
        (torch.eye(8), {"max_error": 0.1, "time_budget": "5"}, "positive number of seconds, was given '5'"),
        (torch.eye(8), {"max_error": 0.1, "metric": "input"}, "takes a KroneckerMetric, was given 'input'"),
        (torch.ones(8, 6), {"max_error": 0.1, "metric": input_second_moment(torch.eye(8))}, "columns are of 8.* has 6 columns"),
        (torch.ones(8, 6), {"max_error": 0.1, "metric": KroneckerMetric(columns=-torch.eye(6))}, "positive definite metric"),
        (torch.ones(8, 6), {"max_error": 0.1, "metric": KroneckerMetric(columns=torch.zeros(6))}, "positive definite metric"),
    ],
)
def test_wrong_kinds_of_arguments_are_named(tensor, options, message):
    with pytest.raises(TensorNetError, match=message):
        tnc.search(tensor, **options)


def test_entry_sorts_compete_only_when_asked_for():
    tensor = torch.randn(48, 64, generator=torch.Generator().manual_seed(0))
    assert tnc.search(tensor, max_error=0.3, null=False).entry_sort is None
    result = tnc.search(tensor, max_error=0.3, orderings=("mode", "entry"))
    assert result.entry_sort is not None
    assert result.entry_sort.error <= 0.3
    assert result.entry_sort.nbytes == sum(part.nbytes for part in result.entry_sort.network.stored_tensors().values())
    assert result.entry_sort.describe() in str(result)
    assert "entry sort" in result.reason
    assert result.best.to_dense().shape == tensor.shape


@pytest.mark.parametrize("limit", [{"max_error": 1e-3}, {"max_bytes": 2800}], ids=str)
def test_rows_that_share_their_values_are_found_and_kept_in_a_file(limit, tmp_path):
    generator = torch.Generator().manual_seed(0)
    profile = torch.randn(120, generator=generator).mul(3).round()
    tensor = torch.stack([scale * profile[torch.randperm(120, generator=generator)] for scale in range(1, 49)])
    result = tnc.search(tensor, orderings=("entry",), **limit)
    assert result.choice is result.entry_sort
    assert result.error <= 1e-3
    assert "gains more than on shuffled entries" in result.reason
    tnc.save_network(result.best, tmp_path / "sorted.safetensors")
    assert torch.equal(tnc.load_network(tmp_path / "sorted.safetensors").to_dense(), result.best.to_dense())


def test_an_entry_sort_that_wins_on_any_entries_is_not_called_a_gain():
    tensor = torch.randn(64, 64, generator=torch.Generator().manual_seed(1)).sign()
    tensor = tensor * torch.rand(64, 64, generator=torch.Generator().manual_seed(2)).add(1)
    result = tnc.search(tensor, max_bytes=3000, orderings=("entry",), topologies=("svd",), formats=("fp16",))
    assert result.entry_sort is not None
    assert result.null is not None
    assert result.null.entry_gain > 1
    assert "no more than on shuffled entries" in result.reason


def test_no_entry_sort_keeps_a_limit_that_is_too_tight():
    tensor = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    result = tnc.search(tensor, max_error=1e-5, orderings=("entry",), null=False)
    assert result.entry_sort is None
    assert "no entry sort that was tried keeps the limit" in result.reason


@pytest.mark.parametrize("family", ["svd", "tt", "tree"])
def test_no_family_alone_finds_a_smaller_network(family):
    generator = torch.Generator().manual_seed(5)
    tensor = torch.randn(48, 64, generator=generator).cumsum(0).cumsum(1) + torch.randn(48, 64, generator=generator)
    whole = tnc.search(tensor, max_error=0.05, null=False, time_budget=600)
    alone = tnc.search(tensor, max_error=0.05, null=False, topologies=(family,), orderings=(), time_budget=600)
    assert whole.best.nbytes <= alone.best.nbytes


def test_a_large_side_is_glanced_at_before_it_is_computed(monkeypatch):
    import tensornet_compress.searching.store as room

    monkeypatch.setattr(room, "EXACT_SIDE", 20)
    generator = torch.Generator().manual_seed(0)
    tensor = torch.randn(40, 6, generator=generator) @ torch.randn(6, 50, generator=generator)
    store = SpectrumStore(tensor)
    assert store.captured({0}) == pytest.approx(1.0, abs=1e-4)
    assert len(store) == 0


def test_fibres_without_neighbours_are_not_seriated():
    generator = torch.Generator().manual_seed(0)
    assert seriations(torch.randn(64, 400, generator=generator), 0) == {}
    smooth = torch.sin(torch.linspace(0, 3, 64)[:, None] * torch.linspace(1, 4, 400))
    assert seriations(smooth[torch.randperm(64, generator=generator)], 0)


def test_shuffled_fibres_of_a_field_in_three_dimensions_are_put_back() -> None:
    axes = [torch.linspace(0, 1, size) for size in (16, 32, 32)]
    t, x, y = axes[0][:, None, None], axes[1][:, None], axes[2]
    field = sum(torch.sin(7 * (x - 0.3 * k) + 5 * t) * torch.cos(6 * y + k * t) / (1 + (x - y).abs()) for k in range(3))
    shuffled = field
    for axis, size in enumerate(field.shape):
        order = torch.randperm(size, generator=torch.Generator().manual_seed(axis))
        shuffled = shuffled.index_select(axis, order)
    plain = tnc.search(field, max_error=0.002, null=False)
    result = tnc.search(shuffled.contiguous(), max_error=0.002)
    orders = result.best.spec.terms[0].layout.order_nbytes
    assert 0 < orders < 150
    assert result.choice.ordered
    assert result.best.nbytes - orders < 1.1 * plain.best.nbytes
    assert result.best.nbytes < 0.8 * result.unordered.nbytes


def vectors(*sizes: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=generator) for size in sizes]


@pytest.mark.parametrize("max_bytes", [33, 36, 45, 60])
def test_a_product_of_vectors_fits_into_few_bytes(max_bytes: int) -> None:
    tensor = torch.einsum("i,j,k->ijk", *vectors(16, 16, 16))
    result = tnc.search(tensor, max_bytes=max_bytes)
    assert result.best.nbytes <= max_bytes
    assert result.error < 0.2
    assert result.error == pytest.approx(float((result.best.to_dense() - tensor).norm() / tensor.norm()), rel=1e-4)


@pytest.mark.parametrize(("sizes", "max_error", "native"), [((60, 50, 40), 0.05, 122), ((60, 50, 40), 0.2, 84)])
def test_what_native_order_gives_is_no_ordering(sizes: tuple[int, ...], max_error: float, native: int) -> None:
    """``native``: bytes of the train over the whole axes in the coarsest integers that keep the error."""
    result = tnc.search(torch.einsum("i,j,k->ijk", *vectors(*sizes)), max_error=max_error)
    assert result.best.nbytes <= native
    assert result.gain == 1.0
    assert not result.choice.ordered


@pytest.mark.parametrize("small", [2.2e-7, 1.1e-6])
def test_what_is_smaller_than_single_precision_resolves_is_kept_where_the_limit_asks(small: float) -> None:
    a, b, c, d = (vector.double() for vector in vectors(60, 90, 60, 90))
    tensor = torch.outer(a, b) + small * torch.outer(c, d)
    result = tnc.search(tensor, max_error=1e-7, null=False)
    assert result.best.nbytes <= 2 * 4 * (60 + 90)
    assert result.error <= 1e-7


def test_seriation_stops_with_the_time() -> None:
    x = torch.linspace(0, 1, 60)[:, None]
    shuffled = torch.sin(5 * x * torch.linspace(1, 2, 30))[torch.randperm(60, generator=torch.Generator().manual_seed(0))]
    found = seriations(shuffled, 0, Deadline(0.0))
    assert all(sorted(order.permutation) == list(range(60)) for order in found.values())


@pytest.mark.parametrize(("first", "second"), [((9, 9), (25, 25)), ((6, 35), (35, 6)), ((12, 10), (14, 15))])
def test_exact_kronecker_products_of_any_sizes_take_what_their_factors_do(first, second):
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(shape, generator=generator) for shape in (first, second))
    result = tnc.search(torch.kron(a, b), max_error=1e-3, null=False, formats=("fp32",))
    assert result.best.spec.terms[0].numbers == a.numel() + b.numel()


def test_a_byte_limit_that_no_dense_form_keeps_is_searched():
    tensor = torch.randn(16, 16, 16, generator=torch.Generator().manual_seed(0))
    result = tnc.search(tensor, max_bytes=300, topologies=("cut",), null=False)
    assert result.best.nbytes <= 300
    assert result.error < 1


def test_numbers_beyond_half_precision_are_sorted_too():
    tensor = torch.randn(32, 32, generator=torch.Generator().manual_seed(0)) * 1e14
    result = tnc.search(tensor, max_bytes=800, orderings=("entry",), null=False)
    assert result.choice is result.entry_sort
    assert result.error < 0.1


def test_an_error_below_single_precision_is_kept_by_the_dense_tensor_alone():
    result = tnc.search(torch.eye(16), max_error=0, null=False)
    assert result.error == 0
    assert "no networks are tried" in result.reason


def test_bytes_do_not_depend_on_the_number_of_threads():
    before = torch.get_num_threads()
    tensor = torch.outer(torch.linspace(0, 1, 48), torch.linspace(1, 2, 40)).sin()
    tensor = tensor + 0.01 * torch.randn(48, 40, generator=torch.Generator().manual_seed(0))
    found = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(tnc.search(tensor, max_error=0.02, null=False, time_budget=600).best)
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(before)
    assert found[0].spec == found[1].spec
    assert torch.equal(found[0].to_dense(), found[1].to_dense())


@pytest.mark.parametrize("shape", [(24, 24, 24), (32, 48), (100,), (2,)])
@pytest.mark.parametrize("limit", [{"max_error": 0.1}, {"max_bytes": 64}, {"max_error": 0.0}])
def test_zeros_take_one_rank_and_are_called_so(shape: tuple[int, ...], limit: dict[str, float]) -> None:
    result = tnc.search(torch.zeros(shape), **limit)
    assert "every entry is zero" in result.reason
    assert result.error == 0.0
    assert torch.equal(result.best.to_dense(), torch.zeros(shape))
    assert len(result.best.spec.terms[0].topology.legs) <= len(shape)
    assert result.best.nbytes <= 64
    assert len(result.found) < 60


def test_what_ordering_gains_is_told_of_the_same_formats():
    """Without order the identity is best kept as entropy-coded integers, which compete however small the best of all is."""
    hidden = torch.eye(64).reshape(8, 8, 8, 8).permute(3, 0, 1, 2).contiguous()
    result = tnc.search(hidden, max_error=1e-6, null=False)
    alone = tnc.search(hidden, max_error=1e-6, null=False, orderings=())
    assert result.choice.ordered
    assert result.unordered.nbytes == alone.best.nbytes
    assert result.gain == pytest.approx(alone.best.nbytes / result.best.nbytes)

"""Predicted candidates: the fewest ranks that keep a limit, and networks that are drawn in two ways."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tensornet_compress as tnc
from tensornet_compress.bench.fields import heat_field
from tensornet_compress.coding import parse_format
from tensornet_compress.decompose import bond_spectra, ranks_for_error, tails
from tensornet_compress.options.offered import SEARCH_CORE_FORMATS
from tensornet_compress.searching import SpectrumStore
from tensornet_compress.searching.candidates import Candidate, Shape, predicted
from tensornet_compress.searching.limits import Limit, View
from tensornet_compress.tensor import Layout, Tensorization, TermSpec, Topology

FP32 = parse_format("fp32")


def drawn(tensor: torch.Tensor, topology: Topology) -> Candidate:
    shape = Shape("tree", Tensorization.native(tuple(tensor.shape)), topology)
    found = predicted(shape, View(SpectrumStore(tensor), Limit(1e-4)), FP32)
    assert found is not None
    return found


@given(st.integers(0, 99), st.floats(1e-3, 0.9))
def test_the_sum_that_is_dropped_keeps_the_limit(seed: int, error: float) -> None:
    tensor = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    topology = Topology.train(3)
    spectra = bond_spectra(tensor, topology)
    allowed = error**2 * float(tensor.square().sum())
    ranks = ranks_for_error(spectra, allowed, Layout.native((3, 4, 5)), topology)
    dropped = [tails(spectrum) for spectrum in spectra]
    assert sum(float(drop[rank]) for drop, rank in zip(dropped, ranks)) <= allowed
    for bond, rank in enumerate(ranks):
        lower = [*ranks[:bond], rank - 1, *ranks[bond + 1 :]]
        assert rank == 1 or sum(float(drop[r]) for drop, r in zip(dropped, lower)) > allowed


def test_exact_ranks_are_found_at_once() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(6, 2, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    tensor = torch.einsum("aib,bjc,ckd->aijkd", first, second, first)
    topology = Topology.train([(0, 1), (2,), (3, 4)])
    ranks = ranks_for_error(bond_spectra(tensor, topology), 1e-9, Layout.native(tuple(tensor.shape)), topology)
    assert ranks == (6, 6)


@given(st.permutations(range(4)), st.booleans())
def test_cores_have_one_size_in_native_order_and_in_that_of_the_cores(order: list[int], chain: bool) -> None:
    topology = Topology.train([tuple(order[:2]), (order[2],), (order[3],)]) if chain else Topology.balanced_tree(order)
    shape = Shape("tree", Tensorization(shape=(6, 35), radices=((2, 3), (5, 7))), topology)
    ranks = tuple(range(2, 2 + len(topology.edges)))
    formats = (FP32,) * len(topology.legs)
    plain = TermSpec(layout=shape.plain, topology=topology, ranks=ranks, formats=formats)
    layout, placed = shape.laid_out()
    ordered = TermSpec(layout=layout, topology=placed, ranks=ranks, formats=formats)
    cores = range(len(topology.legs))
    assert [plain.core_shape(core) for core in cores] == [ordered.core_shape(core) for core in cores]


def test_chains_of_rank_one_in_any_order_have_one_signature() -> None:
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(4, 4, generator=generator, dtype=torch.float64) for _ in range(3)]
    tensor = torch.einsum("ab,cd,ef->abcdef", *parts)
    one, other = (
        drawn(tensor, Topology(legs=((0, 1), (2, 3), (4, 5)), edges=edges)) for edges in (((0, 1), (1, 2)), ((0, 1), (0, 2)))
    )
    assert one.signature() == other.signature()
    assert one.nbytes == other.nbytes == 4 * 48
    assert drawn(tensor, Topology.train([(0, 2), (1, 3), (4, 5)])).signature() != one.signature()


def test_what_is_measured_once_is_not_measured_again() -> None:
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(6, 6, generator=generator) for _ in range(3)]
    tensor = torch.einsum("ab,cd,ef->acebdf", *parts)
    result = tnc.search(tensor, max_error=1e-4, formats=("fp32",), topologies=("tree",), null=False)
    assert [found.network.nbytes for found in result.found].count(4 * 108) == 1
    assert result.best.nbytes == 4 * 108


@given(st.integers(0, 999), st.floats(1e-3, 0.5), st.floats(1.0, 4.0), st.sampled_from(["fp32", "int8g64", "int4g64z"]))
def test_a_candidate_at_its_least_stays_with_more_slack(seed: int, error: float, slack: float, name: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.randn(4, 6, 2, generator=generator, dtype=torch.float64) for _ in range(2)]
    noise = 10.0 ** float(torch.empty(()).uniform_(-4, 0, generator=generator))
    tensor = torch.einsum("aib,cjb->aicj", *parts) + noise * torch.randn(4, 6, 4, 6, generator=generator, dtype=torch.float64)
    view = View(SpectrumStore(tensor), Limit(error))
    shape = Shape("tree", Tensorization.native((4, 6, 4, 6)), Topology.balanced_tree(range(4)))
    candidate = predicted(shape, view, parse_format(name))
    if candidate is not None and candidate.at_its_least(view, slack):
        again = predicted(candidate.shape, view, parse_format(name), slack)
        assert again is not None
        assert again.key() == candidate.key()
        assert (again.nbytes, again.error) == (candidate.nbytes, candidate.error)


def test_structure_that_is_exact_is_at_its_least_and_noise_is_not() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(8, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    exact, noise = a @ b.T, torch.randn(8, 8, generator=generator, dtype=torch.float64)
    for tensor, error, expected in ((exact, 1e-3, True), (noise, 0.3, False)):
        view = View(SpectrumStore(tensor), Limit(error))
        candidate = predicted(Shape("svd", Tensorization.native((8, 8)), Topology.two_cores(2, (0,))), view, FP32)
        if candidate is not None:
            assert candidate.at_its_least(view, 4.0) is expected


@given(st.permutations(range(4)), st.integers(1, 3), st.sampled_from(["fp32", "bf16", "int4g64z", "int8g64"]))
def test_bytes_that_are_predicted_are_those_of_the_term(order: list[int], seed: int, name: str) -> None:
    tensor = torch.randn(4, 5, 6, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    shape = Shape("tree", Tensorization.native((4, 5, 6, 3)), Topology.balanced_tree(order))
    candidate = predicted(shape, View(SpectrumStore(tensor), Limit(0.7)), parse_format(name))
    if candidate is not None:
        assert candidate.nbytes == candidate.term.nbytes


def test_entropy_coded_cores_take_least_on_smooth_fields():
    field = heat_field(24)
    result, stepped = (
        tnc.search(field, max_error=0.01, formats=formats, null=False) for formats in (None, SEARCH_CORE_FORMATS)
    )
    assert {fmt.name for term in result.best.spec.terms for fmt in term.formats} == {"ec"}
    assert result.error <= 0.01
    assert result.best.nbytes < 0.8 * stepped.best.nbytes
    again = tnc.realise(field, result.best.spec)
    assert all(torch.equal(again.stored[name], part) for name, part in result.best.stored.items())


@pytest.mark.parametrize("most", [2500, 6000])
def test_entropy_coded_cores_keep_a_number_of_bytes(most):
    field = heat_field(24)
    result = tnc.search(field, max_bytes=most, null=False)
    assert 0.9 * most < result.best.nbytes <= most
    assert result.error < tnc.search(field, max_bytes=most, formats=SEARCH_CORE_FORMATS, null=False).error


def test_entropy_coded_integers_alone_are_refused():
    with pytest.raises(tnc.TensorNetError, match="'ec'"):
        tnc.search(torch.randn(8, 8), max_error=0.1, formats=["ec"])

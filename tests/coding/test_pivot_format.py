"""Cores with the identity among their rows: bytes, round trips, and refusals."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tensornet_compress.coding import PivotFormat, format_nbytes, parse_format
from tensornet_compress.errors import TensorNetError
from tensornet_compress.tensor import Layout, NetworkSpec, TensorNetwork, TermSpec, Topology
from tests.generators import SEEDS, random_tensor

NAMES = {"fp32p": torch.float32, "bf16p": torch.bfloat16, "fp16p": torch.float16}


@st.composite
def pivoted_cores(draw):
    """A core (rows, rank) with the identity at random rows, and where these are."""
    rows = draw(st.integers(2, 40))
    rank = draw(st.integers(1, rows - 1))
    pivots = sorted(draw(st.permutations(range(rows)))[:rank])
    core = random_tensor((rows, rank), draw(SEEDS), torch.float32)
    core[pivots] = torch.eye(rank)
    return core, pivots


@given(pivoted_cores(), st.sampled_from(sorted(NAMES)))
def test_stored_parts_are_what_is_charged_and_come_back(case, name):
    core, pivots = case
    fmt, (rows, rank) = parse_format(name), core.shape
    parts = fmt.encode(core)
    assert {key: (tuple(part.shape), part.dtype) for key, part in parts.items()} == fmt.parts(tuple(core.shape))
    nbytes = (rows - rank) * rank * fmt.base.parts(())[""][1].itemsize + -(-rows // 8)
    assert format_nbytes(fmt, (rows, rank)) == nbytes == sum(part.numel() * part.element_size() for part in parts.values())
    decoded = fmt.decode(parts, (rows, rank), torch.float32)
    assert torch.equal(decoded, core.to(NAMES[name]).float())
    wanted = torch.tensor([0, rows - 1, pivots[0]])
    assert torch.equal(fmt.decode_rows(parts, (rows, rank), wanted, torch.float32), decoded[wanted])
    fmt.check(parts, (rows, rank))


@given(pivoted_cores())
def test_other_unit_rows_do_not_confuse_the_pivots(case):
    """Unit rows beside the identity are coefficients like any other."""
    core, pivots = case
    others = [row for row in range(len(core)) if row not in pivots]
    core[others] = torch.eye(core.shape[1])[torch.tensor(others) % core.shape[1]]
    fmt = PivotFormat(dtype="fp32")
    assert torch.equal(fmt.decode(fmt.encode(core), tuple(core.shape), torch.float32), core)


@given(st.integers(2, 60), st.integers(2, 60), st.data())
def test_two_cores_by_pivots_are_always_smaller_than_the_matrix(rows, columns, data):
    """Numbers are ``r (m + n) - r^2``; two plain cores exceed the matrix from about half the full rank on."""
    rank = data.draw(st.integers(1, min(rows, columns) - 1))
    term = TermSpec(
        layout=Layout.native((rows, columns)),
        topology=Topology.two_cores(2, (0,)),
        ranks=(rank,),
        formats=(PivotFormat(), PivotFormat().base),
    )
    spec = NetworkSpec(shape=(rows, columns), terms=(term,))
    assert term.numbers == rank * (rows + columns) - rank**2 < rows * columns
    assert spec.nbytes == 2 * term.numbers + -(-rows // 8)
    assert NetworkSpec.from_json(spec.to_json()) == spec


@pytest.mark.parametrize(
    ("core", "message"),
    [
        (torch.ones(4, 2), "identity"),
        (torch.tensor([[0.0, 1.0], [1.0, 0.0], [3.0, 4.0]]), "identity"),
        (torch.eye(3), "more rows"),
        (torch.ones(3), "more rows"),
    ],
)
def test_cores_without_the_identity_are_refused(core, message):
    with pytest.raises(TensorNetError, match=message):
        PivotFormat().encode(core)


def damaged_network(bits):
    formats = (PivotFormat(dtype="fp32"), PivotFormat(dtype="fp32").base)
    term = TermSpec(layout=Layout.native((5, 4)), topology=Topology.two_cores(2, (0,)), ranks=(2,), formats=formats)
    spec = NetworkSpec(shape=(5, 4), terms=(term,))
    stored = {"core0": torch.ones(3, 2), "core0_pivots": torch.tensor([bits], dtype=torch.uint8), "core1": torch.ones(2, 4)}
    return TensorNetwork(spec, stored)


@pytest.mark.parametrize("bits", [0b00001, 0b00111, 0b100010, 0b1000110])
def test_marks_that_are_not_the_pivots_are_refused(bits):
    assert damaged_network(0b10001).to_dense().shape == (5, 4)
    with pytest.raises(TensorNetError, match="marks"):
        damaged_network(bits)


def test_specs_that_cannot_have_pivots_are_refused():
    parts = {"layout": Layout.native((3, 4)).to_json(), "topology": Topology.two_cores(2, (0,)).to_json(), "ranks": "[3]"}
    parts["formats"] = '[{"kind": "pivot"}, {"kind": "float"}]'
    with pytest.raises(TensorNetError, match="more rows"):
        TermSpec.from_json("{" + ", ".join(f'"{name}": {value}' for name, value in parts.items()) + "}")

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tensornet_compress.coding import FloatFormat, parse_format
from tensornet_compress.errors import TensorNetError
from tensornet_compress.tensor import Layout, NetworkSpec, TermSpec, Topology, expected_tensors
from tests.generators import FP32, specs


@given(specs())
def test_json_goes_both_ways(spec):
    assert NetworkSpec.from_json(spec.to_json()) == spec
    assert NetworkSpec.from_json(spec.to_json(indent=2)) == spec


@given(specs())
def test_bytes_are_those_of_the_expected_tensors(spec):
    tensors = expected_tensors(spec)
    total = 0
    for shape, dtype in tensors.values():
        count = 1
        for size in shape:
            count *= size
        total += count * dtype.itemsize
    assert spec.nbytes == total
    assert spec.nbytes == sum(sum(term.core_nbytes) + term.layout.order_nbytes for term in spec.terms)


@given(specs())
def test_names_are_flat_and_unique_per_term(spec):
    assert all("." not in name for name in expected_tensors(spec))
    assert spec.describe()
    assert spec.is_dense == (len(spec.terms) == 1 and not spec.terms[0].topology.edges)


def train_spec() -> NetworkSpec:
    layout = Layout.of(((2, 3), (4,)))
    term = TermSpec(layout=layout, topology=Topology.train(3), ranks=(2, 3), formats=(FP32,) * 3)
    return NetworkSpec(shape=(6, 4), terms=(term,))


def test_core_shapes_and_counts_by_hand():
    term = train_spec().terms[0]
    assert [term.core_shape(core) for core in range(3)] == [(2, 2), (2, 3, 3), (3, 4)]
    assert term.numbers == 4 + 18 + 12
    assert term.nbytes == 4 * term.numbers
    assert term.model_copy(update={"formats": (FloatFormat(dtype="bf16"),) * 3}).nbytes == 2 * term.numbers


def edited(**changes) -> str:
    data = json.loads(train_spec().to_json())
    return json.dumps(data | changes)


def edited_term(**changes) -> str:
    data = json.loads(train_spec().to_json())
    data["terms"][0] |= changes
    return json.dumps(data)


@pytest.mark.parametrize(
    ("text", "field"),
    [
        (edited(version=2), "version"),
        (edited(surprise=1), "surprise"),
        (edited_term(surprise=1), "surprise"),
        (edited(dtype="int8"), "dtype"),
        (edited(shape=[6]), "shape"),
        (edited(terms=[]), "term"),
        (edited_term(ranks=[2]), "ranks"),
        (edited_term(ranks=[0, 2]), "ranks"),
        (edited_term(ranks=["two", 2]), "ranks"),
        (edited_term(formats=[]), "formats"),
        (edited_term(formats=[{"kind": "int", "bits": 1}] * 3), "bits"),
        (edited_term(formats=[{"kind": "other"}] * 3), "formats"),
        (edited_term(topology={"legs": [[0], [1], [2]], "edges": [[0, 1]]}), "tree"),
        (edited_term(topology={"legs": [[0, 1]], "edges": []}), "legs"),
        (edited_term(layout={"mode_order": [0, 1, 2]}), "tensorization"),
        ("{", ""),
        ("[]", ""),
        ("null", ""),
        ("", ""),
    ],
)
def test_damaged_or_unknown_json_is_refused_and_the_message_names_the_place(text, field):
    with pytest.raises(TensorNetError, match=f"not a valid NetworkSpec: .*{field}"):
        NetworkSpec.from_json(text)


def test_dense_specs_are_one_core():
    spec = NetworkSpec.dense((4, 6), parse_format("int4g64"), "bfloat16")
    assert spec.is_dense
    assert spec.nbytes == 12 + 2
    assert spec.dtype == "bfloat16"
    assert NetworkSpec.dense((4, 6)).nbytes == 48


@given(st.sampled_from(["shape", "ranks", "formats"]))
def test_specs_do_not_change(field):
    with pytest.raises(ValueError, match="frozen"):
        setattr(train_spec() if field == "shape" else train_spec().terms[0], field, ())

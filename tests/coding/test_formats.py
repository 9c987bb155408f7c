from math import prod

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tensornet_compress.coding import FloatFormat, IntFormat, format_nbytes, parse_format
from tensornet_compress.coding.bits import pack_bits, unpack_bits
from tensornet_compress.coding.floats import FLOAT_DTYPES
from tensornet_compress.coding.packed_integers import grouped_view
from tensornet_compress.errors import TensorNetError
from tests.generators import FORMATS, INT_FORMATS, SEEDS, random_tensor

SHAPES = st.lists(st.integers(1, 9), min_size=1, max_size=3).map(tuple) | st.sampled_from([(3, 70), (2, 64), (5, 2, 33)])


def step_of_stored_scale(fmt: IntFormat) -> float:
    """Relative rounding of the scales themselves."""
    return torch.finfo(FLOAT_DTYPES[fmt.scale_dtype]).eps


@given(FORMATS, SHAPES, SEEDS)
def test_stored_parts_are_exactly_what_is_charged(fmt, shape, seed):
    core = random_tensor(shape, seed, torch.float32)
    parts = fmt.encode(core)
    assert {name: (tuple(part.shape), part.dtype) for name, part in parts.items()} == fmt.parts(shape)
    assert sum(part.numel() * part.element_size() for part in parts.values()) == format_nbytes(fmt, shape)


@given(FORMATS, SHAPES)
def test_decoding_gives_the_shape_and_dtype_asked_for(fmt, shape):
    parts = fmt.encode(random_tensor(shape, 0, torch.float32))
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        decoded = fmt.decode(parts, shape, dtype)
        assert decoded.shape == shape
        assert decoded.dtype == dtype


@given(INT_FORMATS, SHAPES, SEEDS, st.sampled_from([0.1, 1.0, 100.0]))
def test_integers_are_within_half_a_step_of_the_group_range(fmt, shape, seed, size):
    core = size * random_tensor(shape, seed, torch.float32)
    decoded = fmt.decode(fmt.encode(core), shape, torch.float64)
    rows, run = grouped_view(shape, fmt.group)
    width = fmt.group or run
    error = (core.double() - decoded).reshape(rows, run)
    matrix = core.reshape(rows, run).double()
    slack = 2.0**fmt.bits * step_of_stored_scale(fmt)
    for start in range(0, run, width):
        group = matrix[:, start : start + width]
        low, high = group.amin(1), group.amax(1)
        if fmt.zero == "none":
            step = torch.maximum(-low / 2 ** (fmt.bits - 1), high / (2 ** (fmt.bits - 1) - 1))
        else:
            span = high.clamp_min(0) - low.clamp_max(0) if fmt.zero == "int" else high - low
            step = span / fmt.levels
        # An integer zero point may move the grid by half a step, so that the ends are cut by as much.
        share = 1.0 if fmt.zero == "int" else 0.5
        offset = low.abs() * step_of_stored_scale(fmt) if fmt.zero == "float" else 0.0
        bound = step * (share + slack) + offset + 2e-4
        assert (error[:, start : start + width].abs().amax(1) <= bound).all()


@given(st.sampled_from(["fp32", "bf16", "fp16"]), SEEDS)
def test_floats_are_within_half_a_unit_in_the_last_place(name, seed):
    core = random_tensor((4, 9), seed, torch.float32)
    fmt = parse_format(name)
    error = (fmt.decode(fmt.encode(core), (4, 9), torch.float32) - core).abs()
    half_unit = 0.0 if name == "fp32" else torch.finfo(FLOAT_DTYPES[name]).eps / 2
    assert (error <= half_unit * core.abs() + 1e-7 * (half_unit > 0)).all()


@given(SEEDS, st.integers(1, 3))
def test_a_four_bit_grid_with_offsets_is_restored_exactly(seed, groups):
    """Weights that come from Q4_1 files: code x scale + minimum in groups of 32, scale and minimum in half precision."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (6, groups, 32), generator=generator).float()
    codes[..., 0], codes[..., 1] = 0, 15
    scale = torch.rand(6, groups, 1, generator=generator).half().float() + 0.01
    scale = scale.half().float()
    minimum = (-8 * scale * torch.rand(6, groups, 1, generator=generator)).half().float()
    weight = (codes * scale + minimum).reshape(6, groups * 32)
    fmt = parse_format("int4g32o")
    assert torch.equal(fmt.decode(fmt.encode(weight), tuple(weight.shape), torch.float32), weight)


@given(INT_FORMATS, st.sampled_from([(3, 64), (2, 5)]))
def test_encoding_what_was_decoded_changes_nothing_more(fmt, shape):
    if fmt.zero == "int":
        # The range of decoded numbers need not reach the ends of an integer-zero grid.
        return
    core = random_tensor(shape, 3, torch.float32)
    once = fmt.decode(fmt.encode(core), shape, torch.float32)
    again = fmt.decode(fmt.encode(once), shape, torch.float32)
    step = (once.amax() - once.amin()) / max(fmt.levels - 1, 1)
    assert (once - again).abs().max() <= step


@given(INT_FORMATS)
def test_zero_cores_stay_zero(fmt):
    zeros = torch.zeros(4, 70)
    assert fmt.decode(fmt.encode(zeros), (4, 70), torch.float32).abs().max() <= 1e-3
    if fmt.zero != "none":
        assert torch.equal(fmt.decode(fmt.encode(zeros), (4, 70), torch.float32), zeros)


@given(INT_FORMATS, SEEDS)
def test_grids_fitted_to_importance_are_no_worse_in_the_weighted_error(fmt, seed):
    core = random_tensor((4, 64), seed, torch.float32)
    importance = random_tensor((64,), seed + 1, torch.float32).exp()
    assert grouped_view((4, 64), fmt.group) == (4, 64)

    def weighted_error(scale, zero):
        parts = fmt.assemble(fmt.quantise(core, scale, zero), scale, zero)
        return float(((fmt.decode(parts, (4, 64), torch.float64) - core).square() * importance).sum())

    assert weighted_error(*fmt.fit_grid(core, importance)) <= weighted_error(*fmt.fit_grid(core)) * (1 + 1e-5)


@given(INT_FORMATS, st.sampled_from([(7, 64), (5, 8), (4, 3), (6, 70), (6, 4, 8)]), st.data())
def test_decoding_rows_equals_decoding_all(fmt, shape, data):
    parts = fmt.encode(random_tensor(shape, 5, torch.float32))
    rows = torch.tensor(data.draw(st.lists(st.integers(0, shape[0] - 1), min_size=1, max_size=6)))
    picked = fmt.decode_rows(parts, shape, rows, torch.float32)
    assert torch.equal(picked, fmt.decode(parts, shape, torch.float32)[rows])


@given(FORMATS)
def test_formats_are_plain_data(fmt):
    assert type(fmt).from_json(fmt.to_json()) == fmt
    if isinstance(fmt, FloatFormat) or fmt.scale_dtype == "fp16":
        assert parse_format(fmt.name) == fmt


def test_names_say_what_they_mean():
    assert parse_format("int4g32o") == IntFormat(bits=4, group=32, zero="float")
    assert parse_format("int3g64z") == IntFormat(bits=3, group=64, zero="int")
    assert parse_format("int8g0") == IntFormat(bits=8, group=0, zero="none")
    assert parse_format("bf16") == FloatFormat(dtype="bf16")


@pytest.mark.parametrize("name", ["int1g64", "int9g64", "int4", "fp8", "INT4g64", "int4g64x", "", "int4g-1"])
def test_unknown_names_are_refused_with_the_grammar(name):
    with pytest.raises(TensorNetError, match="use fp32, bf16, fp16 or int"):
        parse_format(name)


@pytest.mark.parametrize(
    ("name", "shape", "nbytes"),
    [
        ("fp32", (3, 5), 60),
        ("bf16", (3, 5), 30),
        ("int4g64", (2, 128), 128 + 8),
        ("int4g64z", (2, 128), 128 + 8 + 2),
        ("int4g64o", (2, 128), 128 + 8 + 8),
        ("int3g64", (2, 65), 49 + 8),
        ("int2g64z", (2, 3), 2 + 2 + 1),
        ("int8g0", (4, 10), 40 + 8),
    ],
)
def test_bytes_by_hand(name, shape, nbytes):
    assert format_nbytes(parse_format(name), shape) == nbytes


@given(st.lists(st.integers(1, 9), max_size=3).map(tuple), st.sampled_from([0, 4, 8]))
def test_the_grouped_view_holds_every_number_once(shape, group):
    rows, run = grouped_view(shape, group)
    assert rows * run == prod(shape)


def test_encoding_does_not_alias_the_given_core():
    for name in ("fp32", "bf16", "int8g0"):
        fmt = parse_format(name)
        core = torch.ones(2, 3, dtype=FLOAT_DTYPES.get(name, torch.float32))
        parts = fmt.encode(core)
        core.zero_()
        assert torch.allclose(fmt.decode(parts, (2, 3), torch.float32), torch.ones(2, 3), atol=0.01)


@pytest.mark.parametrize("zero", ["none", "int", "float"])
@pytest.mark.parametrize(("size", "scale"), [(1e-3, "fp16"), (1e3, "fp16"), (1e-7, "bf16"), (1e9, "bf16"), (1e-7, "fp32")])
def test_small_and_large_numbers_keep_their_digits(zero, size, scale):
    fmt = IntFormat(bits=8, group=16, zero=zero, scale_dtype=scale)
    core = size * random_tensor((4, 16), 1, torch.float32)
    decoded = fmt.decode(fmt.encode(core), (4, 16), torch.float32)
    assert float((decoded - core).norm() / core.norm()) < 0.02


@given(FORMATS, st.sampled_from([1e-10, 1e-6, 1e5, 1e8]))
def test_numbers_beyond_half_precision_never_become_infinite_or_worse_than_zero(fmt, size):
    core = size * random_tensor((4, 64), 1, torch.float32)
    decoded = fmt.decode(fmt.encode(core), (4, 64), torch.float32)
    assert torch.isfinite(decoded).all()
    assert float((decoded - core).norm()) <= 1.1 * float(core.norm())


@pytest.mark.parametrize("name", ["int4g8z", "int3g8o", "int8g8"])
def test_numbers_do_not_depend_on_whether_scales_are_trained(name):
    fmt, core = parse_format(name), random_tensor((6, 20))
    parts = fmt.encode(core)
    stored = {part: value.clone() for part, value in parts.items()}
    plain = fmt.decode(parts, (6, 20), torch.float32)
    scale = parts["_scale"].float().requires_grad_()
    trained = fmt.decode(parts | {"_scale": scale}, (6, 20), torch.float32)
    assert torch.equal(trained, plain)
    assert all(torch.equal(parts[part], value) for part, value in stored.items())
    trained.square().sum().backward()
    assert scale.grad is not None
    step = 1e-3 * torch.ones_like(scale).double()
    double = {part: value.double() if value.is_floating_point() else value for part, value in parts.items()}
    higher, lower = (
        fmt.decode(double | {"_scale": scale.detach().double() + sign * step}, (6, 20), torch.float64).square().sum()
        for sign in (1, -1)
    )
    assert float(scale.grad.sum()) == pytest.approx(float((higher - lower) / 2e-3), rel=1e-3)


@given(st.integers(1, 8), st.integers(1, 300), SEEDS)
def test_packed_slices_of_larger_buffers_are_read(bits, count, seed):
    values = torch.randint(0, 1 << bits, (count,), generator=torch.Generator().manual_seed(seed))
    buffer = torch.cat([torch.zeros(3, dtype=torch.uint8), pack_bits(values, bits), torch.ones(5, dtype=torch.uint8)])
    assert torch.equal(unpack_bits(buffer[3:-5], bits, count).long(), values)

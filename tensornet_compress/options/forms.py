"""What a layer may become: options with exact bytes and predicted error, from statistics computed once per layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod

from tensornet_compress.coding import FloatFormat, IntFormat, NumberFormat, PivotFormat, parse_format
from tensornet_compress.decompose import bond_spectra, feasible_ranks, ranks_for_bytes, tails
from tensornet_compress.errors import TensorNetError
from tensornet_compress.options.layer import FAMILIES, Family, LayerStatistics, Option
from tensornet_compress.options.residual import residual_options
from tensornet_compress.options.two_cores import matrix_options
from tensornet_compress.tensor import Layout, Topology, choose_radices

DENSE_FORMATS = (
    "int2g0o",
    "int2g256o",
    "int2g128o",
    "int2g64z",
    "int3g0o",
    "int3g256z",
    "int3g128z",
    "int3g64z",
    "int4g128z",
    "int4g64z",
    "int4g32o",
    "int5g64z",
    "int6g64z",
    "int7g64z",
    "int8g0",
    "int8g128",
    "int8g64",
    "bf16",
    "fp32",
)
CORE_FORMATS = ("int4g64z", "int8g64", "bf16", "bf16p")
# Stored bytes of the network options, as shares of what the dense weight takes in bf16.
SIZE_SHARES = tuple(round(0.1 * 1.16**step, 4) for step in range(17))
# A layout that was searched may fit its tensor far better than networks usually do.
_SMALL_SHARES = (0.0125, 0.025, 0.05)
_NATIVE_PARTS = 2


def layer_options(
    statistics: LayerStatistics,
    families: Sequence[Family],
    formats: Sequence[str] | None = None,
    shares: Sequence[float] = SIZE_SHARES,
    layout: tuple[Layout, Topology] | None = None,
) -> list[Option]:
    """All options of a layer (see ``pareto`` for those worth choosing).

    ``formats`` restricts the number formats of every family. Dense floating point is always an option; dense integers only
    in the family ``dense``. ``layout``: found by a search; the family ``searched`` has no options without it.

    Raises:
        TensorNetError: a format or family that does not exist.
    """
    unknown = [family for family in families if family not in FAMILIES]
    if unknown:
        raise TensorNetError(f"unknown families {unknown}; choose from {FAMILIES}")
    options = list(_dense_options(statistics, formats, integers="dense" in families))
    core_formats = [parse_format(name) for name in formats or CORE_FORMATS]
    plain_formats = [fmt for fmt in core_formats if not isinstance(fmt, PivotFormat)]
    if "svd" in families:
        options += matrix_options(statistics, core_formats, shares)
    if "residual" in families:
        options += residual_options(statistics, formats)
    for family in families:
        placed = layout if family == "searched" else native_layout(tuple(statistics.weight.shape), family)
        if placed is not None:
            sizes = (*_SMALL_SHARES, *shares[::2]) if family == "searched" else shares[::2]
            options += _tree_options(statistics, family, placed, plain_formats, sizes)
    return options


def pareto(options: Sequence[Option]) -> list[Option]:
    """Options not beaten in both bytes and error, by ascending bytes."""
    front: list[Option] = []
    for option in sorted(options, key=lambda o: (o.nbytes, o.error, FAMILIES.index(o.family))):
        if not front or option.error < front[-1].error:
            front.append(option)
    return front


def _dense_options(statistics: LayerStatistics, formats: Sequence[str] | None, integers: bool) -> Iterator[Option]:
    shape = tuple(statistics.weight.shape)
    layout, topology = Layout.native(shape), Topology.one_core(len(shape))
    for name in dict.fromkeys(name.removesuffix("p") for name in formats or DENSE_FORMATS):
        fmt = parse_format(name)
        if isinstance(fmt, IntFormat) and not integers:
            continue
        if isinstance(fmt, FloatFormat) and _itemsize(fmt) > statistics.weight.element_size():
            continue
        spec = statistics.spec(layout, topology, (), (fmt,))
        yield Option("dense", spec, spec.nbytes, _dense_error(statistics, fmt))


def _itemsize(fmt: FloatFormat) -> int:
    return 4 if fmt.dtype == "fp32" else 2


def _dense_error(statistics: LayerStatistics, fmt: NumberFormat) -> float:
    """Predicted where error feedback will be used, else measured after rounding to nearest, which is cheap."""
    matrix, feedback = statistics.matrix, statistics.feedback
    if feedback is not None and isinstance(fmt, IntFormat) and feedback.applies(statistics.weight, fmt):
        return float(feedback.predicted_error(matrix, fmt) @ statistics.row_prices)
    shape = tuple(statistics.weight.shape)
    rounded = fmt.decode(fmt.encode(statistics.weight.float()), shape, matrix.dtype)
    return statistics.metric.norm2(matrix - rounded.reshape(matrix.shape))


def native_layout(shape: tuple[int, ...], family: Family) -> tuple[Layout, Topology] | None:
    """The unsearched layout and topology of a tensor format: digits in native order; None where it makes no sense, and for
    other families.

    ``tt``: a train over row digits then column digits; ``ttm``: a train of (row digit, column digit) pairs; ``tree``: the
    balanced binary tree over the digits of ``tt``.
    """
    if family not in ("tt", "ttm", "tree"):
        return None
    if len(shape) != 2:
        if family == "ttm":
            return None
        layout = Layout.native(shape)
    else:
        layout = Layout.of(tuple(choose_radices(size, _NATIVE_PARTS) for size in shape), shape=shape)
    count = len(layout.dims)
    if family == "ttm":
        rows, columns = layout.axis_positions(0), layout.axis_positions(1)
        if len(rows) != len(columns) or len(rows) < 2:
            return None
        return layout, Topology.train(list(zip(rows, columns)))
    return layout, Topology.train(count) if family == "tt" else Topology.balanced_tree(range(count))


def _tree_options(
    statistics: LayerStatistics,
    family: Family,
    placed: tuple[Layout, Topology],
    formats: Sequence[NumberFormat],
    shares: Sequence[float],
) -> Iterator[Option]:
    """Trains and trees; the error is predicted from the tails of the unfoldings at the metric's mean price."""
    shape = tuple(statistics.weight.shape)
    layout, topology = placed
    spectra = bond_spectra(layout.apply(statistics.weight.float()), topology)
    dropped = [tails(spectrum) for spectrum in spectra]
    for fmt in formats:
        seen: set[tuple[int, ...]] = set()
        for share in shares:
            try:
                ranks = ranks_for_bytes(spectra, int(share * 2 * prod(shape)), layout, topology, fmt)
            except TensorNetError:
                continue
            ranks = tuple(feasible_ranks(ranks, layout, topology))
            if ranks in seen:
                continue
            seen.add(ranks)
            truncated = float(sum(float(drop[rank]) for drop, rank in zip(dropped, ranks)))
            spec = statistics.spec(layout, topology, ranks, (fmt,) * len(topology.legs))
            rounded = _relative_step(fmt) * float(statistics.matrix.double().square().sum()) * len(topology.legs)
            yield Option(family, spec, spec.nbytes, (truncated + rounded) * statistics.mean_price)


def _relative_step(fmt: NumberFormat) -> float:
    """Squared rounding error relative to the squared numbers, for normal numbers in groups of 64."""
    return (5.0 / fmt.levels) ** 2 / 12 if isinstance(fmt, IntFormat) else 2.0**-17

"""What a layer may become: options with exact bytes and predicted error, from statistics computed once per layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import inf, prod

from tensornet_compress.coding import FloatFormat, IntFormat, NamedFormat, PivotFormat, parse_format
from tensornet_compress.coding.floats import FLOAT_DTYPES
from tensornet_compress.decompose import bond_spectra, feasible_ranks, ranks_for_bytes, ranks_nbytes, tails
from tensornet_compress.errors import TensorNetError
from tensornet_compress.options.layer import LayerStatistics, Option
from tensornet_compress.options.offered import CORE_FORMATS, DENSE_FORMATS, FAMILIES, Family, native_layout, peak_of, reaching
from tensornet_compress.options.rounding import dense_error, rounding_error
from tensornet_compress.options.sorted_entries import sorted_options
from tensornet_compress.options.two_cores import matrix_options, residual_options
from tensornet_compress.tensor import Layout, Topology
from tensornet_compress.threads import leave_if_stopped

# Stored bytes of the network options, as shares of what the dense weight takes in bf16.
SIZE_SHARES = tuple(round(0.1 * 1.16**step, 4) for step in range(17))
# A layout that was searched may fit its tensor far better than networks usually do.
_SMALL_SHARES = (0.0125, 0.025, 0.05)


def layer_options(
    statistics: LayerStatistics,
    families: Sequence[Family],
    formats: Sequence[str] | None = None,
    shares: Sequence[float] = SIZE_SHARES,
    layout: tuple[Layout, Topology] | None = None,
) -> list[Option]:
    """All options of a layer (see ``pareto`` for those worth choosing).

    ``formats`` restricts the number formats of every family but ``sorted``, which has its own. Dense floating point is always
    an option; dense integers only in the family ``dense``. ``layout``: found by a search; the family ``searched`` has no
    options without it.

    Raises:
        TensorNetError: a format or family that does not exist.
    """
    unknown = [family for family in families if family not in FAMILIES]
    if unknown:
        raise TensorNetError(f"unknown families {unknown}; choose from {FAMILIES}")
    options = []
    for option in _options(statistics, families, formats, shares, layout):
        leave_if_stopped()
        options.append(option)
    return options


def _options(
    statistics: LayerStatistics,
    families: Sequence[Family],
    formats: Sequence[str] | None,
    shares: Sequence[float],
    layout: tuple[Layout, Topology] | None,
) -> Iterator[Option]:
    yield from _dense_options(statistics, formats, integers="dense" in families)
    core_formats = [reaching(parse_format(name), peak_of(statistics.weight)) for name in formats or CORE_FORMATS]
    plain_formats = [fmt for fmt in core_formats if not isinstance(fmt, PivotFormat)]
    if "svd" in families:
        yield from matrix_options(statistics, core_formats, shares)
    if "residual" in families:
        yield from residual_options(statistics, formats)
    if "sorted" in families:
        yield from sorted_options(statistics)
    for family in families:
        placed = layout if family == "searched" else native_layout(tuple(statistics.weight.shape), family)
        if placed is not None:
            sizes = (*_SMALL_SHARES, *shares[::2]) if family == "searched" else shares[::2]
            yield from _tree_options(statistics, family, placed, plain_formats, sizes)


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
        fmt = reaching(parse_format(name), peak_of(statistics.weight))
        if isinstance(fmt, IntFormat) and not integers:
            continue
        if isinstance(fmt, FloatFormat) and FLOAT_DTYPES[fmt.dtype].itemsize > statistics.weight.element_size():
            continue
        spec = statistics.spec(layout, topology, (), (fmt,))
        yield Option("dense", spec, spec.nbytes, dense_error(statistics, fmt))


def _tree_options(
    statistics: LayerStatistics,
    family: Family,
    placed: tuple[Layout, Topology],
    formats: Sequence[NamedFormat],
    shares: Sequence[float],
) -> Iterator[Option]:
    """Trains and trees; the error is predicted from the tails of the unfoldings at the metric's mean price."""
    shape = tuple(statistics.weight.shape)
    layout, topology = placed
    spectra = bond_spectra(layout.apply(statistics.weight.float()), topology)
    dropped = [tails(spectrum) for spectrum in spectra]
    energy = float(statistics.matrix.double().square().sum())
    for fmt in formats:
        found: list[tuple[int, ...]] = []
        taken = inf
        for share in sorted(shares, reverse=True):
            allowed = int(share * 2 * prod(shape))
            if allowed >= taken:  # the same ranks as before
                continue
            try:
                ranks = ranks_for_bytes(spectra, allowed, layout, topology, fmt)
            except TensorNetError:
                break
            taken = ranks_nbytes(ranks, layout, topology, fmt)
            found.append(tuple(feasible_ranks(ranks, layout, topology)))
        for ranks in dict.fromkeys(reversed(found)):
            truncated = float(sum(float(drop[rank]) for drop, rank in zip(dropped, ranks)))
            spec = statistics.spec(layout, topology, ranks, (fmt,) * len(topology.legs))
            rounded = rounding_error(fmt) * energy * len(topology.legs)
            yield Option(family, spec, spec.nbytes, (truncated + rounded) * statistics.metric.mean_price)

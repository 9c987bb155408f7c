"""Two cores of a layer, alone or beside a quantised dense base: bytes and predicted errors at every rank.

A base is rounded with error feedback once and its error factorised in the metric (LQER 2402.02446), which tells every rank at
once; the network that is made in the end is fitted in turns (CALDERA 2405.18886), which gains a little more. Measured on seven
layers of SmolLM2-135M in the input metric, ranks up to 16 with 4-bit cores lose 5 to 16 % less than the best mix of dense
integers of the same bytes on bases of 2 bits (35 % less in a down projection with massive activations) and 1 to 13 % less on
bases of 3 bits; rank 48, 8-bit cores, and bases with an offset per group lose more than that mix, and are not offered.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tensornet_compress.coding import IntFormat, NamedFormat, PivotFormat, parse_format
from tensornet_compress.decompose import matrix_spectrum, tails
from tensornet_compress.options.layer import LayerStatistics, Option
from tensornet_compress.options.rounding import rounding_by_rank
from tensornet_compress.tensor import Layout, NetworkSpec, Topology

_BASE_FORMATS = ("int2g64z", "int3g64z")
_CORE_FORMAT = "int4g64z"
# Stored bytes of the two cores beside a base, as shares of what the dense weight takes in bf16.
_SHARES = (0.003, 0.006, 0.012)
# What taking turns leaves of the error of the base rounded first, on SmolLM2's layers.
_TURNS = 0.93


def matrix_options(statistics: LayerStatistics, formats: Sequence[NamedFormat], shares: Sequence[float]) -> Iterator[Option]:
    """Two cores: the tail of the spectrum, plus what rounding each core adds. Pivoted cores lose what plain ones of their rank
    do."""
    spectrum, shape = statistics.spectrum, tuple(statistics.weight.shape)
    rows, columns = statistics.matrix.shape
    layout, topology = Layout.native(shape), Topology.two_cores(len(shape), (0,))
    dropped = tails(spectrum.squares.sqrt())
    full = len(spectrum.squares)
    for fmt in formats:
        added = rounding_by_rank(statistics, fmt, spectrum, full) if isinstance(fmt, IntFormat) else [0.0] * (full + 1)
        for rank in _ranks_at(shares, rows, columns, fmt, full):
            spec = statistics.spec(layout, topology, (rank,), (fmt, fmt.base if isinstance(fmt, PivotFormat) else fmt))
            yield Option("svd", spec, spec.nbytes, float(dropped[rank]) + added[rank])


def residual_options(statistics: LayerStatistics, formats: Sequence[str] | None = None) -> Iterator[Option]:
    """Sums of one dense core and two small ones, at a few ranks.

    ``formats`` restricts bases to those of its integer formats of at most 4 bits, and takes the one nearest to 4 bits for the
    cores; without integers there are no options.
    """
    allowed = [fmt for fmt in map(parse_format, formats or (*_BASE_FORMATS, _CORE_FORMAT)) if isinstance(fmt, IntFormat)]
    bases = [fmt for fmt in allowed if (fmt.bits <= 4 if formats else fmt.name in _BASE_FORMATS)]
    shape = tuple(statistics.weight.shape)
    rows, columns = statistics.matrix.shape
    layout, topology = Layout.native(shape), Topology.two_cores(len(shape), (0,))
    for base in bases:
        core = min(allowed, key=lambda fmt: abs(fmt.bits - 4))
        ranks = _ranks_at(_SHARES, rows, columns, core, min(rows, columns)) or [1]
        rounded = statistics.rounded(base)
        lost = statistics.matrix - rounded.to_dense(statistics.matrix.dtype).reshape(rows, columns)
        spectrum = matrix_spectrum(lost, statistics.metric, most=ranks[-1])
        dropped = tails(spectrum.squares.sqrt())
        added = rounding_by_rank(statistics, core, spectrum, ranks[-1])
        for rank in ranks:
            cores = statistics.spec(layout, topology, (rank,), (core, core))
            spec: NetworkSpec = cores.model_copy(update={"terms": (*rounded.spec.terms, *cores.terms)})
            yield Option("residual", spec, spec.nbytes, _TURNS * (float(dropped[rank]) + added[rank]))


def _ranks_at(shares: Sequence[float], rows: int, columns: int, fmt: NamedFormat, full: int) -> list[int]:
    """Ranks whose cores take about the given shares of the dense bf16 bytes in ``fmt``."""
    bits = fmt.bits + 16 / max(fmt.group, 1) if isinstance(fmt, IntFormat) else 32 if fmt.dtype == "fp32" else 16
    numbers = [share * rows * columns * 16 / bits for share in shares]
    if not isinstance(fmt, PivotFormat):
        ranks = {int(count / (rows + columns)) for count in numbers}
        return sorted(rank for rank in ranks if 1 <= rank <= full)
    # Pivoted cores hold r (m + n) - r^2 numbers.
    squares = [((rows + columns) / 2) ** 2 - count for count in numbers if count < rows * columns]
    return sorted({rank for square in squares if 1 <= (rank := int((rows + columns) / 2 - square**0.5)) < full})

"""Two cores of a layer: bytes and predicted errors at every rank."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tensornet_compress.coding import IntFormat, NumberFormat, PivotFormat
from tensornet_compress.coding.formats import grouped_view
from tensornet_compress.decompose import MatrixSpectrum, tails
from tensornet_compress.options.layer import LayerStatistics, Option
from tensornet_compress.tensor import Layout, Topology


def matrix_options(statistics: LayerStatistics, formats: Sequence[NumberFormat], shares: Sequence[float]) -> Iterator[Option]:
    """Two cores: the tail of the spectrum, plus what rounding each core adds (right: error feedback; left: its columns are
    weighted by the spectrum, because ``V C V' = diag(sigma^2)``). Pivoted cores lose what plain ones of their rank do."""
    spectrum, shape = statistics.spectrum, tuple(statistics.weight.shape)
    rows, columns = statistics.matrix.shape
    layout, topology = Layout.native(shape), Topology.two_cores(len(shape), (0,))
    dropped = tails(spectrum.squares.sqrt())
    full = len(spectrum.squares)
    for fmt in formats:
        added = [0.0] * (full + 1)
        if isinstance(fmt, IntFormat):
            added = rounding_by_rank(statistics, fmt, spectrum, full)
        for rank in ranks_at(shares, rows, columns, fmt, full):
            spec = statistics.spec(layout, topology, (rank,), (fmt, fmt.base if isinstance(fmt, PivotFormat) else fmt))
            yield Option("svd", spec, spec.nbytes, float(dropped[rank]) + added[rank])


def rounding_by_rank(statistics: LayerStatistics, fmt: IntFormat, spectrum: MatrixSpectrum, most: int) -> list[float]:
    """What rounding both cores adds at rank 0 .. ``most`` of a spectrum in the layer's metric."""
    left, right = spectrum.cores(most)
    if statistics.feedback is None:
        right_errors = (fmt.fit_grid(right)[0].double().square() / 12).sum(1) * right.shape[1]
    elif statistics.feedback.applies(right, fmt):
        right_errors = statistics.feedback.predicted_error(right, fmt)
    else:
        right_errors = right.double().square().sum(1) * statistics.mean_price
    rows, run = grouped_view(tuple(left.shape), fmt.group)
    steps = fmt.spread(fmt.fit_grid(left.reshape(rows, run))[0], run).reshape(left.shape).double().square() / 12
    per_rank = right_errors + (statistics.row_prices @ steps) * spectrum.squares[:most]
    return [0.0, *per_rank.cumsum(0).tolist()]


def ranks_at(shares: Sequence[float], rows: int, columns: int, fmt: NumberFormat, full: int) -> list[int]:
    """Ranks whose cores take about the given shares of the dense bf16 bytes in ``fmt``."""
    bits = fmt.bits + 16 / max(fmt.group, 1) if isinstance(fmt, IntFormat) else 32 if fmt.dtype == "fp32" else 16
    numbers = [share * rows * columns * 16 / bits for share in shares]
    if not isinstance(fmt, PivotFormat):
        ranks = {int(count / (rows + columns)) for count in numbers}
        return sorted(rank for rank in ranks if 1 <= rank <= full)
    # Pivoted cores hold r (m + n) - r^2 numbers.
    squares = [((rows + columns) / 2) ** 2 - count for count in numbers if count < rows * columns]
    return sorted({rank for square in squares if 1 <= (rank := int((rows + columns) / 2 - square**0.5)) < full})

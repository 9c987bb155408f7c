"""A quantised dense base with two low-rank cores for what it lost: bytes and predicted errors.

The base is rounded with error feedback once and its error factorised in the metric (LQER 2402.02446), which tells every rank
at once; the network that is made in the end is fitted in turns (CALDERA 2405.18886), which gains a little more. Measured on
seven layers of SmolLM2-135M in the input metric, ranks up to 16 with 4-bit cores lose 5 to 16 % less than the best mix of dense
integers of the same bytes on bases of 2 bits (35 % less in a down projection with massive activations) and 1 to 13 % less on
bases of 3 bits; rank 48, 8-bit cores, and bases with an offset per group lose more than that mix, and are not offered.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tensornet_compress.coding import IntFormat, parse_format
from tensornet_compress.decompose import matrix_spectrum, tails
from tensornet_compress.options.layer import LayerStatistics, Option
from tensornet_compress.options.two_cores import ranks_at, rounding_by_rank
from tensornet_compress.tensor import Layout, NetworkSpec, Topology

BASE_FORMATS = ("int2g64z", "int3g64z")
CORE_FORMAT = "int4g64z"
# Stored bytes of the two cores, as shares of what the dense weight takes in bf16.
_SHARES = (0.003, 0.006, 0.012)
# What taking turns leaves of the error of the base rounded first, on SmolLM2's layers.
_TURNS = 0.93


def residual_options(statistics: LayerStatistics, formats: Sequence[str] | None = None) -> Iterator[Option]:
    """Sums of one dense core and two small ones, at a few ranks.

    ``formats`` restricts bases to those of its integer formats of at most 4 bits, and takes the one nearest to 4 bits for the
    cores; without integers there are no options.
    """
    bases, core = _formats(formats)
    shape = tuple(statistics.weight.shape)
    rows, columns = statistics.matrix.shape
    layout, topology = Layout.native(shape), Topology.two_cores(len(shape), (0,))
    for base in bases:
        assert core is not None
        ranks = ranks_at(_SHARES, rows, columns, core, min(rows, columns)) or [1]
        rounded = statistics.rounded(base)
        lost = statistics.matrix - rounded.to_dense(statistics.matrix.dtype).reshape(rows, columns)
        spectrum = matrix_spectrum(lost, statistics.metric, most=ranks[-1])
        dropped = tails(spectrum.squares.sqrt())
        added = rounding_by_rank(statistics, core, spectrum, ranks[-1])
        for rank in ranks:
            cores = statistics.spec(layout, topology, (rank,), (core, core))
            spec: NetworkSpec = cores.model_copy(update={"terms": (*rounded.spec.terms, *cores.terms)})
            yield Option("residual", spec, spec.nbytes, _TURNS * (float(dropped[rank]) + added[rank]))


def _formats(names: Sequence[str] | None) -> tuple[list[IntFormat], IntFormat | None]:
    """Formats of the base, and the one of both cores."""
    allowed = [parse_format(name) for name in (*BASE_FORMATS, CORE_FORMAT)] if names is None else map(parse_format, names)
    integers = [fmt for fmt in allowed if isinstance(fmt, IntFormat)]
    core = min(integers, key=lambda fmt: abs(fmt.bits - 4), default=None)
    bases = [fmt for fmt in integers if fmt.bits <= 4]
    return bases if names is not None else [fmt for fmt in bases if fmt.name in BASE_FORMATS], core

"""Results as plain data: what benchmarks and commands measured, in one JSON schema that reports are made from."""

from tensornet_compress.results.joined import joined, without_peer_layers
from tensornet_compress.results.schema import (
    BitsOfLayer,
    Drawing,
    LayerCell,
    Machine,
    Measure,
    Result,
    Row,
    Spectrum,
    read_result,
    write_result,
)

__all__ = [
    "BitsOfLayer",
    "Drawing",
    "LayerCell",
    "Machine",
    "Measure",
    "Result",
    "Row",
    "Spectrum",
    "joined",
    "read_result",
    "without_peer_layers",
    "write_result",
]

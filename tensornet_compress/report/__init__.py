"""Results as plain data, and the self-contained page made from one."""

from tensornet_compress.report.joined import joined, without_peer_layers
from tensornet_compress.report.page import render, write_report
from tensornet_compress.report.schema import (
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
    "render",
    "without_peer_layers",
    "write_report",
    "write_result",
]

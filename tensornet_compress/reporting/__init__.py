"""Reports: one self-contained HTML page from one result file."""

from tensornet_compress.reporting.page import render, write_report

__all__ = ["render", "write_report"]

"""The metrics by name, and what each needs from a pass over calibration batches. The default of ``compress``, ``fisher``, is
made in ``calibrate/fisher_metrics.py``."""

from __future__ import annotations

from typing import Literal, get_args

from tensornet_compress.errors import TensorNetError

MetricKind = Literal["euclidean", "diagonal", "input", "row-fisher", "kronecker", "elementwise"]
METRIC_KINDS: tuple[MetricKind, ...] = get_args(MetricKind)
# Metrics that need a backward pass.
GRADIENT_KINDS = frozenset({"row-fisher", "kronecker", "elementwise"})


def metric_kind(name: str) -> MetricKind:
    """A checked name.

    Raises:
        TensorNetError: it is none of ``METRIC_KINDS``.
    """
    for kind in METRIC_KINDS:
        if kind == name:
            return kind
    raise TensorNetError(f"unknown metric {name!r}; choose one of {', '.join(METRIC_KINDS)}")

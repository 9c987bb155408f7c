"""Measures that several benchmarks have: a name means the same in all of them, so that their rows fit one result."""

from __future__ import annotations

from tensornet_compress.report import Measure

STORED = Measure(
    title="stored bytes",
    unit="bytes",
    better="lower",
    explanation="Everything: cores, scales, zero points and packed orders; of a model also what was left alone, in fp32.",
)
ERROR = Measure(
    title="relative error",
    better="lower",
    explanation="Measured, Frobenius, of a model over all compressed weights; missing where bytes are only predicted.",
)

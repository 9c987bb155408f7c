"""What a compression of weights did, as a result."""

from __future__ import annotations

import re
from math import sqrt

from pydantic import JsonValue

from tensornet_compress.compressing.report import CompressionReport, LayerReport
from tensornet_compress.nn.plan import Plan
from tensornet_compress.report.drawing_of import kinds_of
from tensornet_compress.report.made import made_here
from tensornet_compress.report.schema import LayerCell, Measure, Result, Row
from tensornet_compress.tensor import NetworkSpec

MEASURES = {
    "nbytes": Measure(title="Whole model", unit="bytes", better="lower", explanation="Stored bytes of all tensors of the "
    "model."),
    "original_nbytes": Measure(title="Whole model before", unit="bytes"),
    "targeted_nbytes": Measure(
        title="Compressed layers", unit="bytes", better="lower", explanation="Stored bytes of the layers that were to be "
        "compressed."
    ),
    "bits_per_weight": Measure(title="Bits per weight", unit="bits", better="lower"),
    "divergence": Measure(
        title="Divergence from the original",
        better="lower",
        explanation="How far the model's output moved: nats per token for language models, one minus the cosine for "
        "encoders, on "
        "calibration text (that no stage fits, where there are stages). 0 means the same output.",
    ),
    "seconds": Measure(title="Time", unit="s", better="lower"),
}  # fmt: skip
OURS = "tensornet_compress"
_COUNTED = re.compile(r" \d+$")


def weights_result(report: CompressionReport, plan: Plan | None, subject: str, command: str = "") -> Result:
    """The result of compressing ``subject`` (the model's name).

    Args:
        report: from ``compress`` or ``compress_in_stages``.
        plan: the model's plan, for ranks, formats and drawings; without one the report's own words serve.
        command: what makes the same compression again.
    """
    before = Row(
        task="weights",
        subject=subject,
        method="original",
        values={
            "nbytes": report.original_nbytes,
            "targeted_nbytes": report.targeted_original_nbytes,
            "bits_per_weight": 8 * report.targeted_original_nbytes / report.targeted_weights,
        },
        note="the model as it was given",
    )
    rows = [before, _row(report, plan, subject), *_steps(report, subject)]
    settings: dict[str, JsonValue] = {
        "budget": str(report.budget),
        "method": report.method,
        "allocator": report.allocator,
        "metric": report.metric,
        "layers left alone": len(report.skipped),
        "notes": list(report.notes),
    }
    return made_here(f"Weights of {subject}", command, MEASURES, rows, settings, sum(report.seconds.values()))


def _row(report: CompressionReport, plan: Plan | None, subject: str) -> Row:
    specs = {} if plan is None else {name: layer.spec for name, layer in plan.layers.items()}
    values: dict[str, float] = {
        "nbytes": report.nbytes,
        "original_nbytes": report.original_nbytes,
        "targeted_nbytes": report.targeted_nbytes,
        "bits_per_weight": report.bits_per_weight,
    }
    kept = [stage.divergence for stage in report.stages if stage.kept]
    if kept or report.divergences:
        values["divergence"] = kept[-1] if kept else min(report.divergences)
    return Row(
        task="weights",
        subject=subject,
        method=OURS,
        ours=True,
        budget=report.budget.bits_per_weight or report.bits_per_weight,
        budget_unit="bits per weight",
        values=values,
        note=f"Errors of layers are relative, in the metric {report.metric!r}.",
        layers=tuple(_cell(layer, specs.get(layer.name)) for layer in report.layers),
        ledger=_ledger(report),
        drawings=kinds_of({layer.name: specs[layer.name] for layer in report.layers if layer.name in specs}),
    )


def _cell(layer: LayerReport, spec: NetworkSpec | None) -> LayerCell:
    terms = spec.terms if spec is not None else ()
    formats = "/".join(dict.fromkeys(fmt.name for term in terms for fmt in term.formats))
    return LayerCell(
        name=layer.name,
        kind=layer.kind,
        family=layer.family,
        formats=formats or layer.network.rsplit(" ", 1)[-1],
        ranks=tuple(rank for term in terms for rank in term.ranks),
        bits_per_weight=layer.bits_per_weight,
        nbytes=layer.nbytes,
        error=sqrt(max(layer.error, 0.0)),
    )


def _ledger(report: CompressionReport) -> dict[str, int]:
    """Bytes of the compressed layers by the last part of their names, and of everything else."""
    parts: dict[str, int] = {}
    for layer in report.layers:
        kind = layer.name.rsplit(".", 1)[-1]
        parts[kind] = parts.get(kind, 0) + layer.nbytes
    parts["everything not compressed"] = max(0, report.nbytes - sum(parts.values()))
    return parts


def _steps(report: CompressionReport, subject: str) -> list[Row]:
    """Stages with what each left of the divergence, or else the times of the steps."""
    if report.stages:
        return [
            Row(
                task="weights",
                subject=subject,
                method=f"stage: {stage.name}",
                ours=True,
                values={"divergence": stage.divergence, "seconds": stage.seconds},
                note="" if stage.kept else "not kept, since the divergence did not fall",
            )
            for stage in report.stages
        ]
    steps: dict[str, float] = {}
    for name, seconds in report.seconds.items():
        kind = _COUNTED.sub("", name)
        steps[kind] = steps.get(kind, 0.0) + seconds
    return [
        Row(task="weights", subject=subject, method=f"step: {name}", ours=True, values={"seconds": seconds})
        for name, seconds in steps.items()
    ]

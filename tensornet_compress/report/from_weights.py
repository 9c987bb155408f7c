"""What a compression of weights did, as a result."""

from __future__ import annotations

from collections import Counter
from functools import partial
from math import sqrt

from pydantic import JsonValue

from tensornet_compress.compressing.report import CompressionReport, LayerReport
from tensornet_compress.nn.plan import Plan
from tensornet_compress.report.made import drawings_of, made_here
from tensornet_compress.report.schema import LayerCell, Measure, Result, Row
from tensornet_compress.tensor import NetworkSpec

_WHOLE = "Stored bytes of all tensors of the model."
_LAYERS = "Stored bytes of the layers that were to be compressed."
_OUTPUT = (
    "How far the model's output moved: nats per token for language models, one minus the cosine for encoders, on calibration "
    "text (that no stage fits, where there are stages). 0 means the same output."
)
MEASURES = {
    "nbytes": Measure(title="Whole model", unit="bytes", better="lower", role="size", explanation=_WHOLE),
    "original_nbytes": Measure(title="Whole model before", unit="bytes", role="before"),
    "targeted_nbytes": Measure(title="Compressed layers", unit="bytes", better="lower", role="size", explanation=_LAYERS),
    "bits_per_weight": Measure(title="Bits per weight", unit="bits", better="lower", role="size"),
    "divergence": Measure(title="Divergence from the original", better="lower", role="quality", explanation=_OUTPUT),
    "seconds": Measure(title="Time", unit="s", better="lower", role="time"),
}
OURS = "tensornet_compress"


def weights_result(report: CompressionReport, plan: Plan | None, subject: str, command: str = "") -> Result:
    """The result of compressing ``subject`` (the model's name).

    Args:
        report: from ``compress`` or ``compress_in_stages``.
        plan: the model's plan, for ranks, formats and drawings; without one the report's own words serve.
        command: what makes the same compression again.
    """
    row = partial(Row, task="weights", subject=subject)
    bits = 8 * report.targeted_original_nbytes / report.targeted_weights
    before = {"nbytes": report.original_nbytes, "targeted_nbytes": report.targeted_original_nbytes, "bits_per_weight": bits}
    specs = {} if plan is None else {name: layer.spec for name, layer in plan.layers.items()}
    kept = [stage.divergence for stage in report.stages if stage.kept]
    divergence = kept[-1] if kept else min(report.divergences, default=None)
    after = {
        "nbytes": report.nbytes,
        "original_nbytes": report.original_nbytes,
        "targeted_nbytes": report.targeted_nbytes,
        "bits_per_weight": report.bits_per_weight,
    }
    rows = [
        row(method="original", values=before, note="the model as it was given"),
        row(
            method=OURS,
            ours=True,
            budget=report.budget.bits_per_weight or report.bits_per_weight,
            budget_unit="bits per weight",
            values=after | ({} if divergence is None else {"divergence": divergence}),
            note=f"Errors of layers are relative, in the metric {report.metric!r}.",
            layers=tuple(_cell(layer, specs.get(layer.name)) for layer in report.layers),
            ledger=_ledger(report),
            drawings=drawings_of({layer.name: specs[layer.name] for layer in report.layers if layer.name in specs}),
        ),
    ]
    # Stages with what each left of the divergence, or else the times of the steps.
    for stage in report.stages:
        note = "" if stage.kept else "not kept, since the divergence did not fall"
        values = {"divergence": stage.divergence, "seconds": stage.seconds}
        rows.append(row(method=f"stage: {stage.name}", ours=True, values=values, note=note))
    for name, seconds in () if report.stages else _steps(report).items():
        rows.append(row(method=f"step: {name}", ours=True, values={"seconds": seconds}))
    settings: dict[str, JsonValue] = {
        "budget": str(report.budget),
        "method": report.method,
        "allocator": report.allocator,
        "metric": report.metric,
        "layers left alone": len(report.skipped),
        "notes": list(report.notes),
    }
    return made_here(f"Weights of {subject}", command, MEASURES, rows, settings, sum(report.seconds.values()))


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
    parts: Counter[str] = Counter()
    for layer in report.layers:
        parts[layer.name.rsplit(".", 1)[-1]] += layer.nbytes
    return {**parts, "everything not compressed": max(0, report.nbytes - parts.total())}


def _steps(report: CompressionReport) -> dict[str, float]:
    """Seconds of each kind of step; repeated steps are numbered in the report."""
    steps: dict[str, float] = {}
    for name, seconds in report.seconds.items():
        kind, _, number = name.rpartition(" ")
        kind = kind if kind and number.isdecimal() else name
        steps[kind] = steps.get(kind, 0.0) + seconds
    return steps

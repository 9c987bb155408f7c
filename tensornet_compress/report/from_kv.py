"""What a compressed KV cache costs and changes, as a result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from tensornet_compress.report.made import made_here
from tensornet_compress.report.schema import BitsOfLayer, Measure, Result, Row

if TYPE_CHECKING:
    from tensornet_compress.kv.planning import CacheCost
    from tensornet_compress.kv.profile.profile import Profile

MEASURES = {
    "nbytes": Measure(title="Cache", unit="bytes", better="lower", explanation="Codes, exact first and last tokens, own "
    "bases."),
    "exact_nbytes": Measure(title="Exact cache", unit="bytes"),
    "bits_per_element": Measure(
        title="Bits per element", unit="bits", better="lower", explanation="8 x the bytes of the cache / its keys and values."
    ),
    "payload_bits_per_element": Measure(
        title="Bits per coded element", unit="bits", better="lower", explanation="Of the coded tokens alone, without the "
        "exact ones."
    ),
    "profile_nbytes": Measure(
        title="Profile", unit="bytes", explanation="Stored once for the model and shared by all its caches; not in the "
        "cache's bytes."
    ),
    "kl": Measure(
        title="KL divergence from the exact cache",
        unit="nats per token",
        better="lower",
        explanation="How far the model's predictions move when it reads this cache in place of the exact one, on held-out "
        "text.",
    ),
    "dce": Measure(title="Change of cross-entropy", unit="nats per token", better="lower"),
    "top1_agreement": Measure(title="Same best next token", better="higher"),
    "held_nbytes": Measure(title="Held between steps", unit="bytes", better="lower"),
    "working_nbytes": Measure(title="More while a step runs", unit="bytes", better="lower"),
    "step_multiply_adds": Measure(title="Multiply-adds of one step", better="lower"),
    "thaw_multiply_adds": Measure(title="Multiply-adds to thaw", better="lower"),
    "predicted_error": Measure(
        title="Predicted error", better="lower", explanation="Expected squared error per element in the metric of the "
        "calibration."
    ),
}  # fmt: skip


def kv_result(
    subject: str,
    rows: Sequence[Mapping[str, float | str]],
    profile: Profile,
    predicted: Sequence[CacheCost] = (),
    command: str = "",
) -> Result:
    """The result of measured caches of ``subject`` (the model's name).

    Args:
        rows: each what ``evaluate_cache`` gives, with ``mode`` and ``bits`` beside it.
        profile: what the caches were made with.
        predicted: kinds of cache to draw as predictions, from ``kv.front``.
    """
    measured = [_measured(subject, row, profile) for row in rows]
    exact = [_exact(subject, rows[0])] if rows else []
    tokens = predicted[0].tokens if predicted else 0
    guessed = [_predicted(f"{subject}, predicted for {tokens:,} tokens", cost) for cost in predicted]
    settings = {
        "layers": len(profile.spec.layers),
        "metric": profile.spec.metric,
        "calibration tokens": profile.spec.calibration_tokens,
        "profile bytes": profile.nbytes,
    }
    return made_here(f"KV cache of {subject}", command, MEASURES, [*exact, *measured, *guessed], settings)


def _measured(subject: str, row: Mapping[str, float | str], profile: Profile) -> Row:
    from tensornet_compress.kv.planning import layer_bits

    mode: Literal["live", "storage"] = "live" if row["mode"] == "live" else "storage"
    bits = float(row["bits"])
    values = {name: float(value) for name, value in row.items() if name in MEASURES}
    shares = layer_bits(profile, bits, mode)
    return Row(
        task="kv",
        subject=subject,
        method=f"{mode} cache",
        ours=True,
        budget=bits,
        budget_unit="bits per element",
        values=values | {"profile_nbytes": profile.nbytes},
        ledger={"cache of one sequence": round(values["nbytes"]), "profile, shared by all caches": profile.nbytes},
        cache_bits=tuple(BitsOfLayer(layer=layer, keys=keys, values=of_values) for layer, keys, of_values in shares),
    )


def _exact(subject: str, row: Mapping[str, float | str]) -> Row:
    """The cache that is not compressed: what all others are measured against."""
    size, bits = float(row["exact_nbytes"]), float(row["bits_per_element"]) * float(row["exact_nbytes"]) / float(row["nbytes"])
    values = {"nbytes": size, "bits_per_element": bits, "kl": 0.0, "dce": 0.0, "top1_agreement": 1.0}
    return Row(task="kv", subject=subject, method="exact cache", values=values, note="not compressed")


def _predicted(subject: str, cost: CacheCost) -> Row:
    values = {
        "held_nbytes": float(cost.held_nbytes),
        "working_nbytes": float(cost.working_nbytes),
        "step_multiply_adds": float(cost.step_multiply_adds),
        "thaw_multiply_adds": float(cost.thaw_multiply_adds),
        "predicted_error": cost.error,
    }
    exact = cost.mode == "exact"
    return Row(
        task="kv",
        subject=subject,
        method="exact cache" if exact else f"{cost.mode}, {cost.attention}",
        ours=not exact,
        budget=None if exact else cost.bits,
        budget_unit="" if exact else "bits per element",
        values=values,
        note="predicted from the profile, not measured",
    )

"""What a compressed KV cache costs and changes, as a result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from tensornet_compress.report.made import made_here
from tensornet_compress.report.schema import BitsOfLayer, Measure, Result, Row

if TYPE_CHECKING:
    from tensornet_compress.kv.planning import CacheCost
    from tensornet_compress.kv.profile.profile import Profile

_CACHE = "Codes, exact first and last tokens, own bases."
_BITS = "8 x the bytes of the cache / its keys and values."
_CODED_BITS = "Of the coded tokens alone, without the exact ones."
_PROFILE = "Stored once for the model and shared by all its caches; not in the cache's bytes."
_KL = "How far the model's predictions move when it reads this cache in place of the exact one, on held-out text."
_PREDICTED = "Expected squared error per element in the metric of the calibration."
_KL_TITLE = "KL divergence from the exact cache"
_NATS = "nats per token"
MEASURES = {
    "nbytes": Measure(title="Cache", unit="bytes", better="lower", role="size", explanation=_CACHE),
    "exact_nbytes": Measure(title="Exact cache", unit="bytes", role="before"),
    "bits_per_element": Measure(title="Bits per element", unit="bits", better="lower", role="size", explanation=_BITS),
    "payload_bits_per_element": Measure(
        title="Bits per coded element", unit="bits", better="lower", role="size", explanation=_CODED_BITS
    ),
    "profile_nbytes": Measure(title="Profile", unit="bytes", role="size", explanation=_PROFILE),
    "kl": Measure(title=_KL_TITLE, unit=_NATS, better="lower", role="quality", explanation=_KL),
    "dce": Measure(title="Change of cross-entropy", unit=_NATS, better="lower", role="quality"),
    "top1_agreement": Measure(title="Same best next token", better="higher", role="quality"),
    "held_nbytes": Measure(title="Held between steps", unit="bytes", better="lower", role="size"),
    "working_nbytes": Measure(title="More while a step runs", unit="bytes", better="lower", role="size"),
    "step_multiply_adds": Measure(title="Multiply-adds of one step", better="lower", role="quality"),
    "thaw_multiply_adds": Measure(title="Multiply-adds to thaw", better="lower", role="quality"),
    "predicted_error": Measure(title="Predicted error", better="lower", role="quality", explanation=_PREDICTED),
}


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
    made = [_exact(subject, rows[0])] if rows else []
    made += [_measured(subject, row, profile) for row in rows]
    made += [_predicted(subject, cost, predicted[0].tokens) for cost in predicted]
    settings = {
        "layers": len(profile.spec.layers),
        "metric": profile.spec.metric,
        "calibration tokens": profile.spec.calibration_tokens,
        "profile bytes": profile.nbytes,
    }
    return made_here(f"KV cache of {subject}", command, MEASURES, made, settings)


def _measured(subject: str, row: Mapping[str, float | str], profile: Profile) -> Row:
    from tensornet_compress.kv.planning import layer_bits

    mode, bits = row["mode"], float(row["bits"])
    values = {name: float(value) for name, value in row.items() if name in MEASURES}
    shares = layer_bits(profile, bits, "live" if mode == "live" else "storage")
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


def _predicted(subject: str, cost: CacheCost, tokens: int) -> Row:
    names = ("held_nbytes", "working_nbytes", "step_multiply_adds", "thaw_multiply_adds")
    row = partial(
        Row,
        task="kv",
        subject=f"{subject}, predicted for {tokens:,} tokens",
        values={name: float(getattr(cost, name)) for name in names} | {"predicted_error": cost.error},
        note="predicted from the profile, not measured",
    )
    if cost.mode == "exact":
        return row(method="exact cache")
    return row(method=f"{cost.mode}, {cost.attention}", ours=True, budget=cost.bits, budget_unit="bits per element")

"""Tables of the KV cache benchmarks, for ``readme_tables.py``."""

from __future__ import annotations

from collections.abc import Callable

from readme_tables import grid, load, note

KV_KINDS = (
    "ours, storage", "ours, live", "ours, no calibration", "all layers PCA", "per-layer PCA", "KIVI-style", "TurboQuant-style",
    "per-token", "QuantizedCache", "per-sequence SVD", "per-sequence TT", "per-sequence Tucker",
)  # fmt: skip


def kv_quality(domain: str, title: str) -> str:
    result = load(f"kv_quality_{domain}")
    rows = []
    for kind in KV_KINDS:
        for row in (r for r in result["rows"] if r["method"].startswith(kind)):
            if "skipped" in row:
                rows.append([row["method"], "skipped", "", "", ""])
                continue
            near, copy = row["natural"], row["copy"]
            figures = [f"{near['kl']:.5f}", f"{copy['kl']:.5f}", f"{near['top1']:.3f} / {copy['top1']:.3f}"]
            rows.append([row["method"], f"{row['bits']:.2f}", *figures])
    text = f"""
        **KV cache, {title}**: KL to the exact cache (nats per token) over a natural continuation and over a verbatim copy
        of a far span, after {result["context"]} tokens of {result["documents"]} documents, {result["coded_tokens"]} of them
        coded; bits per element of the coded tokens, all of them counted. Our profile takes {result["profile_nbytes"]:,} bytes
        ({result["profile_share_of_bf16_model"]:.1%} of the bf16 model), with
        {result["profile_numbers"] / result["full_joined_basis_numbers"]:.1%} of the numbers of the full joined bases, which
        the PCA over all layers needs. `python benchmarks/kv_quality.py --domain {domain}`"""
    return note(text) + grid(["cache", "bits", "KL natural", "KL copy", "same best token"], rows)


def kv_memory() -> str:
    rows = []
    for row in load("kv_memory")["rows"]:
        nbytes = [f"{row[name]:,}" for name in ("tokens", "counted_nbytes", "grown_nbytes")]
        rows.append([row["cache"], *nbytes, f"{row['counted_ratio']:.3f}", f"{row['grown_ratio']:.3f}"])
    text = """
        **KV cache, memory** (`dynamic`: the exact fp32 cache): bytes by our count and by the growth of the process, and both
        as shares of `dynamic`. `python benchmarks/kv_memory.py`"""
    return note(text) + grid(["cache", "tokens", "counted", "grown", "counted share", "grown share"], rows)


def kv_speed() -> str:
    result = load("kv_speed")
    rows = []
    for row in result["rows"]:
        prefill = "" if row["prefill_s"] is None else f"{row['prefill_s']:.2f}"
        figures = [f"{row['decode_ms']:.0f}", f"{row['decode_speed_to_dynamic']:.2f}"]
        rows.append([row["cache"], f"{row['tokens']:,}", prefill, *figures])
    sealing = ", ".join(f"{1000 * s['seconds_per_token']:.2f} ms at {s['tokens']:,}" for s in result["sealing"])
    storage = ", ".join(
        f"{s['encode_MB_s']:.1f} / {s['decode_MB_s']:.1f} MB/s at {s['bits']:g} bits" for s in result["storage"]
    )
    text = f"""
        **KV cache, speed** (threads: {result["machine"]["threads"]}): prefill of all tokens in one pass, one decoded token,
        and its speed over `DynamicCache`'s. Sealing a token of a live cache: {sealing} tokens. Storage encode / decode of bf16
        bytes: {storage}. `python benchmarks/kv_speed.py`"""
    return note(text) + grid(["cache", "tokens", "prefill s", "decode ms", "speed / DynamicCache"], rows)


def kv_profile() -> str:
    result = load("kv_profile")
    parts = ["linear layers", "attention", "cache update", "unpacking", "contraction", "rest of the model"]
    rows = [
        [row["cache"], *(f"{row['parts_ms'].get(part, 0.0):.0f}" for part in parts), f"{row['total_ms']:.0f}"]
        for row in result["rows"]
    ]
    hot = ", ".join(
        f"{h['window']:,} tokens: {h['decode_speed_to_dynamic']:.2f} of its speed at {h['bytes_to_dynamic']:.2f} of its bytes"
        for h in result["hot"]
    )
    text = f"""
        **KV cache, where a decode step's time goes** at {result["rows"][0]["tokens"]:,} tokens (threads: {result["threads"]}),
        milliseconds by part, each without the parts inside it. Were attention and cache free, decoding would run at
        {result["bound_with_free_attention"]:.2f}x `DynamicCache`: no cache can be three times as fast as the stock quantised
        ones. A bounded hot set of decoded tokens is the exact window made longer (live, 3 bits, beside `DynamicCache`): {hot}.
        `python benchmarks/kv_profile.py`"""
    return note(text) + grid(["cache", *parts, "all"], rows)


def kv_generation() -> str:
    result = load("kv_generation")
    rows = []
    for name in dict.fromkeys(row["cache"] for row in result["rows"]):
        mine = [row for row in result["rows"] if row["cache"] == name]
        first, equal = (sum(row[key] for row in mine) / len(mine) for key in ("first_divergence", "agreement_along_exact"))
        rows.append([name, f"{first:.0f}", f"{equal:.3f}"])
    text = f"""
        **KV cache, long generation**: {result["new"]} greedy tokens after {result["prompt"]}, means over documents: the first
        token that differs from the exact cache's, and the share of equal choices along the exact text.
        `python benchmarks/kv_generation.py`"""
    return note(text) + grid(["cache", "first divergence", "equal choices"], rows)


def kv_token_order() -> str:
    result = load("kv_token_order")
    rows = [[name, f"{value:.3f}"] for name, value in result["means"].items()]
    text = f"""
        **KV cache, token order**: ideal code lengths at the step of {result["bits"]:g} bits. Predicting a token from the one
        coded before it, in native order or along a path through similar tokens, against no prediction, with the price of the
        permutation. `python benchmarks/kv_token_order.py`"""
    return note(text) + grid(["code", "bits per element"], rows)


def kv_metrics() -> str:
    result = load("kv_metrics")
    rows = [
        [r["metric"], r["mode"], f"{r['bits']:.2f}", f"{r['natural']['kl']:.5f}", f"{r['copy']['kl']:.5f}"]
        for r in result["rows"]
    ]
    text = f"""
        **KV cache, what weighs errors**: KL to the exact cache of {result["documents"]} documents with profiles calibrated in
        three metrics on the same windows: Fisher information (backward passes), what queries see of keys and outputs of values
        (second moments of queries; forward passes only), and none. `python benchmarks/kv_metrics.py`"""
    return note(text) + grid(["metric", "mode", "bits", "KL natural", "KL copy"], rows)


MAKERS: dict[str, Callable[[], str]] = {
    "kv_quality_wikipedia": lambda: kv_quality("wikipedia", "held-out Wikipedia"),
    "kv_quality_pydoc": lambda: kv_quality("pydoc", "a domain that calibration never saw (the Python reference)"),
    "kv_metrics": kv_metrics,
    "kv_memory": kv_memory,
    "kv_speed": kv_speed,
    "kv_profile": kv_profile,
    "kv_generation": kv_generation,
    "kv_token_order": kv_token_order,
}

"""The README's headline tables: a few rows of the full tables in ``docs/results.md``, drawn from the same committed JSON.

python benchmarks/readme_tables.py --write  # puts both in their places
"""

from __future__ import annotations

from typing import Any

from bench_tables import on_bundled_grid
from readme_tables import grid, load, mean, note

CACHES = (
    "ours, storage 2 b", "ours, live 3 b", "ours, live 2 b", "all layers PCA (KVTC-like) 2 b", "KIVI-style int4 g32",
    "KIVI-style int2 g32", "QuantizedCache quanto int4", "per-sequence SVD + int4 4 b",
)  # fmt: skip
WEIGHTS = {
    "ours": "**ours** (`auto`)",
    "gptq": "GPTQ",
    "hqq": "HQQ",
    "quanto": "quanto",
    "rtn": "round to nearest",
    "svd-llm-int8": "SVD-LLM, 8-bit factors",
    "svd-llm": "SVD-LLM, bf16 factors",
    "tensorly-tt": "tensor trains (tensorly), bf16",
}


def weights() -> str:
    """Every layer of the model at equal bytes, against peers."""
    result = load("bench_weights_smollm2")
    rows = {(r["method"], r["budget"]): r for r in result["rows"] if not r.get("skipped")}
    budgets = sorted({budget for _, budget in rows if budget is not None}, reverse=True)
    table = [
        [title, *(f"{rows[method, bits]['values']['kl']:.3g}" if (method, bits) in rows else "not run" for bits in budgets)]
        for method, title in WEIGHTS.items()
    ]
    kinds = {bits: [layer["family"] for layer in rows["ours", bits]["layers"]] for bits in budgets if ("ours", bits) in rows}
    kept = ", ".join(f"{families.count('dense')} at {bits:g}" for bits, families in kinds.items())
    settings = result["settings"]["weights"]
    text = f"""
        **Weights of SmolLM2-135M**: KL to the original (nats per token) on {settings["heldout_windows"]} held-out windows of
        {settings["length"]}, with all stored bytes of all layers counted; {settings["calibration_windows"]} calibration windows
        for all methods. Of {len(next(iter(kinds.values())))} layers ours stores as one dense core of integers: {kept} bits. The
        sizes of quantisers come in steps, see the full table. {on_bundled_grid(result["rows"])}
        `tensornet-compress bench weights`"""
    return note(text) + grid(["method", *(f"{bits:g} bits" for bits in budgets)], table)


def caches() -> str:
    """The cache beside its peers."""
    result = load("kv_quality_wikipedia")
    rows = {row["method"]: row for row in result["rows"]}
    table = [
        [name, f"{rows[name]['bits']:.2f}", f"{rows[name]['natural']['kl']:.4f}", f"{rows[name]['copy']['kl']:.4f}"]
        for name in CACHES
        if "skipped" not in rows[name]
    ]
    text = f"""
        **KV cache of SmolLM2-135M**: bits per coded element and KL to the exact cache, over a natural continuation and over a
        verbatim copy, after {result["context"]} tokens. Beside it our profile takes {result["profile_nbytes"]:,} bytes once
        per model ({result["profile_share_of_bf16_model"]:.1%} of it in bf16).
        `python benchmarks/kv_quality.py --domain wikipedia`"""
    return note(text) + grid(["cache", "bits", "KL natural", "KL copy"], table)


def searched() -> str:
    """Where index orders pay, and where they do not."""
    rows = {(r["tensor"], r["error"]): r for r in load("search_real")["rows"]}
    models = ("SmolLM2", "MiniLM", "KV cache")
    network = [r for r in rows.values() if r["tensor"].startswith(models) and r["error"] == 0.1]
    dense = sum(r["ours"]["family"] == "dense" for r in network)
    known: dict[str, list[dict[str, Any]]] = {}
    for row in load("search_trees")["rows"]:
        known.setdefault(row["case"].split(",")[0].split(" (")[0], []).append(row)
    table = []
    for name in ("Kronecker product", "hidden pairs of 10"):
        mine = known[name]
        planted, ours = (mean(r[key] for r in mine) for key in ("known_numbers", "tree_numbers"))
        table.append([f"{name}, planted", f"{planted:.0f} numbers", f"{ours:.0f} numbers"])
    for name, error in (("image (china.jpg, 96 x 128 x 3)", 0.1), ("wave field (32 x 32 x 32)", 0.01)):
        r = rows[name, error]
        ours = f"{r['ours']['nbytes']:,} bytes ({r['ours']['family']}{', ordered' if r['ours']['ordered'] else ''})"
        best = min(r[peer]["nbytes"] for peer in ("SVD", "TT, native order", "HT, balanced") if "nbytes" in r[peer])
        table.append([f"{name}, error {error:g}", f"{best:,} bytes (best of SVD, TT, HT)", ours])
    text = f"""
        **Search of one tensor**: what is there to be found, or the best native form, beside what `search` finds. Of the
        {len(network)} weight and cache tensors of SmolLM2 and MiniLM, {dense} are best stored dense at 10 % error: no order
        pays there. `python benchmarks/search_trees.py`, `python benchmarks/search_real.py`"""
    return note(text) + grid(["tensor", "known or native", "ours"], table)


def cost() -> str:
    """What it takes in time."""
    result = load("weights_cost")
    seconds, settings = result["seconds"], result["settings"]
    speed = {(r["cache"], r["tokens"]): r["decode_speed_to_dynamic"] for r in load("kv_speed")["rows"]}
    modules = load("module_speed")["rows"]
    ours = [r["ours_over_by_hand"] for r in modules]
    text = f"""
        **Cost**, on {result["machine"]["cores"]} CPU cores: compressing at {settings["bits"]:g} bits takes
        {seconds["compress"]:.0f} s where one bare SVD of each weight takes {seconds["bare_svd_wall"]:.0f} s
        (`python benchmarks/weights_cost.py`); a module of two cores takes {min(ours):.2f} to {max(ours):.2f} of the time of two
        matmuls by hand (`python benchmarks/module_speed.py`); decoding through a live cache of 3 bits runs at
        {speed["live 3 b, contracted", 4096]:.2f} of the exact cache's speed at 4,096 tokens
        (`python benchmarks/kv_speed.py`)."""
    return note(text).rstrip("\n") + "\n"


def headlines() -> str:
    """All of them, in the README's order."""
    return "\n".join(make() for make in (weights, caches, searched, cost))

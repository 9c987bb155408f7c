"""The result tables of ``docs/results.md``, made from the committed JSON and nothing else; the README's few are ``headlines``.

python benchmarks/readme_tables.py          # print
python benchmarks/readme_tables.py --write  # put them between the result marks of docs/results.md and of the README
"""

from __future__ import annotations

import json
import statistics
import sys
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
README = HERE.parent / "README.md"
RESULTS = HERE.parent / "docs" / "results.md"
START, END = "<!-- results -->\n", "<!-- /results -->\n"


def load(name: str) -> dict[str, Any]:
    """A committed result."""
    result: dict[str, Any] = json.loads((HERE / "results" / f"{name}.json").read_text(encoding="utf-8"))
    return result


def grid(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [" | ".join(head), " | ".join("---" for _ in head), *(" | ".join(row) for row in rows)]
    return "\n".join(f"| {line} |" for line in lines) + "\n"


def by_method(rows: list[dict[str, Any]], figure: str, digits: int) -> str:
    """Methods down, budgets across."""
    budgets = list(dict.fromkeys(row["budget_bits_per_weight"] for row in rows))
    table = []
    for method in dict.fromkeys(row["method"] for row in rows):
        cells = [method]
        for budget in budgets:
            row = next((r for r in rows if r["method"] == method and r["budget_bits_per_weight"] == budget), None)
            if row is None or figure not in row:
                cells.append("not run" if row is None else "cannot be met")
            else:
                cells.append(f"{row[figure]:.{digits}f} ({row['bits_per_weight']:.2f} b)")
        table.append(cells)
    return grid(["method", *(f"{budget:g} bits" for budget in budgets)], table)


def ranks() -> str:
    result = load("weights_ranks")
    dense = result["dense"]["perplexity"]
    rows = [
        [f"{r['keep']:g}", r["allocator"], f"{r['perplexity']:.1f}", f"{r['kl']:.3f}", f"{r['ratio_to_uniform']:.2f}"]
        for r in sorted(result["rows"], key=lambda r: -r["keep"])
    ]
    return (
        f"**Truncation alone** (two cores in bf16, no integers; dense perplexity {dense:.2f}): the uniform allocator is the\n"
        "SVD-LLM baseline; the last column is the excess cross-entropy over it. `python benchmarks/weights_ranks.py`\n\n"
        + grid(["bytes kept", "allocation of ranks", "perplexity", "KL", "excess / uniform's"], rows)
    )


def quality() -> str:
    result = load("weights_table")
    refined = sorted({row["method"] for row in result["rows"] if row.get("refine")})
    names = ", ".join(f"`{name}`" for name in refined) or "none"
    return (
        "**KL to the dense model** (nats per token, with the bits in fact stored; everything counted). `rtn` rounds every\n"
        "layer to nearest in groups of 64; trains and trees are not refined by ALS here. Sensitivities measured anew at the\n"
        f"compressed model: {names}. `python benchmarks/weights_table.py`\n\n"
        + by_method(result["rows"], "kl", 4)
        + _missing(result["rows"])
    )


def _missing(rows: list[dict[str, Any]]) -> str:
    missing = [method for method in ("dense", "auto", "svd", "ttm", "tt", "tree") if all(r["method"] != method for r in rows)]
    return f"\nNot run on this model yet: {', '.join(missing)}; the next table has them.\n" if missing else ""


def encoder() -> str:
    result = load("encoder_table")
    return (
        "**all-MiniLM-L6-v2** (true fp32 weights): mean cosine of sentence embeddings to the original's; `rtn` is given more\n"
        "bytes than the other rows. `python benchmarks/encoder_table.py`\n\n" + by_method(result["rows"], "mean_cosine", 4)
    )


def cost() -> str:
    result = load("weights_cost")
    seconds, peak = result["seconds"], result["peak_bytes"]
    gib = {name: f"{value / 2**30:.1f} GiB" for name, value in peak.items()}
    settings = result["settings"]
    return (
        f"**Cost** of `{settings['method']}` at {settings['bits']:g} bits: {seconds['compress']:.0f} s, beside "
        f"{seconds['bare_svd_wall']:.0f} s for one bare SVD of each weight;\n"
        f"peak memory {gib['parent']} and {gib['largest_worker']} per worker, for a model of "
        f"{result['model_bytes'] / 2**30:.2f} GiB. The folder takes {result['on_disk']:,} bytes\n"
        f"on disk, the ledger says {result['ledger']['folder']:,}. `python benchmarks/weights_cost.py`\n"
    )


def speed() -> str:
    result = load("module_speed")
    figures = ("ours_over_by_hand", "ours_over_bare_matmuls", "ours_over_dense")
    rows = [[r["layer"], r["mode"], str(r["batch"]), *(f"{r[figure]:.2f}" for figure in figures)] for r in result["rows"]]
    threads = result["machine"]["torch_threads"]
    return (
        f"**Module speed** (two fp32 cores at {result['settings']['keep']:g} of the bytes, threads: {threads}): "
        "time of our module over a\nhand-written module of two matmuls, over the bare expression outside any module, "
        "and over the dense layer.\n`python benchmarks/module_speed.py`\n\n"
        + grid(["layer", "mode", "batch", "ours / by hand", "ours / bare", "ours / dense"], rows)
    )


def note(text: str) -> str:
    """A paragraph of at most 120 columns."""
    return textwrap.fill(" ".join(text.split()), 120, break_long_words=False, break_on_hyphens=False) + "\n\n"


def mean(values: Iterable[float]) -> float:
    """The mean of what may be a generator."""
    kept = list(values)
    return sum(kept) / len(kept)


def search_trees() -> str:
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in load("search_trees")["rows"]:
        groups.setdefault(row["case"].split(",")[0].split(" (")[0], []).append(row)
    rows = []
    for name, mine in groups.items():
        numbers = [f"{mean(r[key] for r in mine):.0f}" for key in ("known_numbers", "tree_numbers")]
        theirs = [r for r in mine if "ttnopt_seconds" in r]
        figures = [f"{mean(r['ttnopt_merged_numbers'] for r in theirs):.0f}"] if theirs else ["not installed"]
        seconds = [statistics.median(r[key] for r in mine) for key in ("ours_seconds", "tree_seconds")]
        figures += [f"{s:.2f}" for s in seconds]
        figures.append(f"{statistics.median(r['ttnopt_seconds'] for r in theirs):.2f}" if theirs else "")
        rows.append([name, *numbers, *figures])
    text = """
        **Search, known networks**: stored numbers at 1e-5 relative error, means over seeds, and median seconds on one thread;
        TTNOpt after the fewest sweeps that reach its final size, from an exact start (it cannot reorder four modes).
        `PYTHONPATH=.peers python benchmarks/search_trees.py`"""
    head = ["tensor", "planted", "ours", "TTNOpt", "seconds, all formats", "trees only", "TTNOpt"]
    grown = [
        [
            f"{r['size']}^6 = {r['entries']:,}",
            f"{3 * r['size'] ** 2} / {r['tree_numbers']} / {r['ttnopt_merged_numbers']} / {r['ttnopt_usual_merged_numbers']}",
            f"{r['tree_seconds']:.3f}",
            f"{r['ours_seconds']:.3f}",
            f"{r['ttnopt_seconds']:.3f} / {r['ttnopt_usual_seconds']:.3f}",
            f"{r['tree_seconds'] / r['ttnopt_seconds']:.3f} / {r['tree_seconds'] / r['ttnopt_usual_seconds']:.3f}",
        ]
        for r in load("search_trees")["growth"]
        if "ttnopt_seconds" in r
    ]
    growth = grid(
        [
            "hidden pairs, entries",
            "numbers: planted / ours / TTNOpt after one sweep / five",
            "ours, trees, s",
            "ours, all formats, s",
            "TTNOpt, one sweep / five, s",
            "trees over TTNOpt",
        ],
        grown,
    )
    return note(text) + grid(head, rows) + "\n" + growth


def search_orders() -> str:
    result = load("search_orders")
    rows = []
    for size in dict.fromkeys(r["size"] for r in result["kronecker"]):
        mine = [r for r in result["kronecker"] if r["size"] == size]
        found = " / ".join(f"{r['recovered']} of {r['seeds']}" for r in mine)
        rows.append([f"Kronecker sum, {size} x {size}", found, " / ".join(f"{r['median_seconds']:.1f} s" for r in mine)])
    planted = grid(["10 / 30 % of fibres out of place", "recovered exactly", "median time"], rows)
    rows = []
    for r in result["smooth"]:
        if "skipped" not in r:
            figures = [f"{r[key]:,}" for key in ("plain_nbytes", "scrambled_nbytes", "order_nbytes", "without_ordering_nbytes")]
            shape = " x ".join(map(str, r["shape"]))
            without = (r["scrambled_nbytes"] - r["order_nbytes"]) / r["plain_nbytes"]
            ratios = [f"{value:.2f}" for value in (r["ratio"], without, 1 + r["least_order_nbytes"] / r["plain_nbytes"])]
            rows.append([f"{r['data'].split(',')[0]}, {shape}", *figures, f"{r['least_order_nbytes']:,.0f}", *ratios])
    header = ["1 % error, bytes", "in order", "shuffled", "of them orders", "without ordering", "least for orders"]
    smooth = grid([*header, "shuffled / in order", "less its orders", "in order and least"], rows)
    accepted = sum(r["accepted"] for r in result["null"])
    runs = sum(r["seeds"] for r in result["null"])
    text = f"""
        **Search, fibre orders** put right: sums of eight Kronecker products partly scrambled, and smooth data with the fibres
        of all axes shuffled. Orders cost log2(n!) bits an axis, which is more than some smooth tables hold. Least for orders:
        what a code takes on average at this error even if it knows the table in order (a bound by counting the orders that one
        code word can stand for); the last column, for comparison, adds it to the bytes in order. On Gaussian noise and
        shuffled weights an order was accepted in {accepted} of {runs} searches.
        `python benchmarks/search_orders.py`"""
    return note(text) + planted + "\n" + smooth


def search_entries() -> str:
    result = load("search_entries")["rows"]
    tensors = list(dict.fromkeys(r["tensor"] for r in result))
    rows = []
    for method in dict.fromkeys(r["method"] for r in result):
        mine = {r["tensor"]: r for r in result if r["method"] == method and "snr_db" in r}
        if set(mine) != set(tensors):
            continue
        noise, real = mine[tensors[0]], [mine[name] for name in tensors[1:]]
        both = [(r["bits_per_weight"], r["snr_db"]) for r in (noise, *real)]
        bits, decibel = mean(b for b, _ in both[1:]), mean(d for _, d in both[1:])
        rows.append([method, f"{both[0][1]:.1f} ({both[0][0]:.2f} b)", f"{decibel:.1f} ({bits:.2f} b)"])
    text = f"""
        **Entry sorts, priced** (EinSort): signal to noise in dB at the bits per weight that everything takes, the permutation
        as packed, on N(0, 1) and as means over {len(tensors) - 1} matrices of SmolLM2 and MiniLM.
        `python benchmarks/search_entries.py`"""
    return note(text) + grid(["method", "N(0, 1)", "real"], rows)


def search_free_orders() -> str:
    result = load("search_free_orders")
    rows = [
        [row["format"], row["orders"], f"{row['largest_logit_change']:.0e}", f"{row['squared_error']:,.0f}", f"{row['kl']:.3f}"]
        for row in result["rows"]
    ]
    text = f"""
        **Free orders** of SmolLM2's inner axes by size of their weights, absorbed by neighbouring weights, then all block
        linears rounded to nearest in groups; the largest change of a logit beside logits up to
        {result["settings"]["largest_logit"]:.0f}. Nothing is gained: the native groups follow the weights' own grid.
        `python benchmarks/search_free_orders.py`"""
    return note(text) + grid(["format", "orders", "logits change by", "squared error", "KL"], rows)


def search_real() -> str:
    result = load("search_real")
    peers = ("SVD", "TT, native order", "HT, balanced", "TTNOpt's tree")
    rows = []
    for r in result["rows"]:
        cells = [("" if r[p].get("measured") else "~") + f"{r[p]['nbytes']:,}" if "nbytes" in r[p] else "-" for p in peers]
        ours = f"{r['ours']['nbytes']:,} ({r['ours']['family']}{', ordered' if r['ours']['ordered'] else ''})"
        rows.append(
            [f"{r['tensor']}, {r['error']:g}", f"{r['dense']:,}", *cells, ours, f"{r['gain']:.2f} / {r['null_gain']:.2f}"]
        )
    worst = max(r["ours_over_best"] for r in result["rows"])
    text = f"""
        **Search, real tensors**: bytes at equal relative error, all with the same number formats and our choice of ranks
        ("~": predicted, and more than 1.3 times the dense size, so not made; "-": one core, or too large for TTNOpt). Ours over
        the best of the others is at most {worst:.3f}. Gain of ordering, and of the same search on shuffled entries.
        `PYTHONPATH=.peers python benchmarks/search_real.py`"""
    return note(text) + grid(["tensor, error", "dense", *peers, "ours", "gain / null"], rows)


def search_cost() -> str:
    rows = []
    for r in load("search_cost")["rows"]:
        if "skipped" not in r:
            shape = " x ".join(map(str, r["shape"])) if len(r["shape"]) < 4 else f"{len(r['shape'])} modes of 2"
            state = "" if r["finished"] else " (stopped)"
            rows.append(
                [
                    f"{r['tensor']}, {shape}",
                    f"{r['seconds']:.1f}{state}",
                    f"{r['processor_seconds']:.1f}",
                    f"{r['peak_bytes'] / 2**20:,.0f}",
                    str(r["unfoldings"]),
                ]
            )
    text = """
        **Search, cost** with its null control on one thread ([plot](../benchmarks/results/search_cost.svg)): seconds on a
        machine that was busy with other work, seconds of the processor, and peak memory above what the process held.
        `python benchmarks/search_cost.py`"""
    return note(text) + grid(["tensor", "seconds", "processor seconds", "peak MiB", "unfoldings"], rows)


def tables() -> str:
    """The tables of all results that are there."""
    if str(HERE) not in sys.path:
        sys.path.insert(0, str(HERE))
    from bench_tables import MAKERS as BENCH  # these draw on this module
    from geometry_tables import MAKERS as GEOMETRY
    from kv_tables import MAKERS as KV

    makers = {
        **BENCH,
        "weights_ranks": ranks,
        "weights_table": quality,
        "encoder_table": encoder,
        "weights_cost": cost,
        "module_speed": speed,
        **KV,
        "search_trees": search_trees,
        "search_orders": search_orders,
        "search_entries": search_entries,
        "search_real": search_real,
        "search_free_orders": search_free_orders,
        "search_cost": search_cost,
        **GEOMETRY,
    }
    return "\n".join(make() for name, make in makers.items() if (HERE / "results" / f"{name}.json").exists())


def main() -> None:
    from headlines import headlines  # it draws on this module

    if "--write" not in sys.argv[1:]:
        print(tables())
        return
    for path, content in ((README, headlines()), (RESULTS, tables())):
        text = path.read_text(encoding="utf-8")
        before, after = text.split(START)[0], text.split(END)[1]
        path.write_text(before + START + content + END + after, encoding="utf-8")


if __name__ == "__main__":
    main()

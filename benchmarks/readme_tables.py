"""The README's result tables, made from the committed JSON and nothing else.

python benchmarks/readme_tables.py          # print
python benchmarks/readme_tables.py --write  # put them between the README's result marks
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
README = HERE.parent / "README.md"
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
    return (
        "**KL to the dense model** (nats per token, with the bits in fact stored; everything counted). `rtn` rounds every\n"
        "layer to nearest in groups of 64; trains and trees are not refined by ALS and no row is refined at the compressed\n"
        "model. `python benchmarks/weights_table.py`\n\n" + by_method(result["rows"], "kl", 4) + _missing(result["rows"])
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


def tables() -> str:
    """The tables of all results that are there."""
    makers = {
        "weights_ranks": ranks,
        "weights_table": quality,
        "encoder_table": encoder,
        "weights_cost": cost,
        "module_speed": speed,
    }
    return "\n".join(make() for name, make in makers.items() if (HERE / "results" / f"{name}.json").exists())


def main() -> None:
    text = README.read_text(encoding="utf-8")
    if "--write" in sys.argv[1:]:
        before, after = text.split(START)[0], text.split(END)[1]
        README.write_text(before + START + tables() + END + after, encoding="utf-8")
    else:
        print(tables())


if __name__ == "__main__":
    main()

"""Tables of the geometry benchmarks, for ``readme_tables.py``."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

from geometry_claims import claims as counted
from readme_tables import by_method, grid, load, note


def bits() -> str:
    result = load("geometry_bits")
    rows = sorted(result["rows"], key=lambda row: -row["budget_bits_per_weight"])
    text = f"""
        **SmolLM2 at few bits**: KL to the dense model on held-out text (nats per token, with the bits in fact stored;
        everything counted). All see the same {result["settings"]["windows"]["calibration"]} calibration windows; `gptq` is our
        faithful implementation, with at least our bytes; `allocated` are dense integers allocated by measured sensitivity. Ours
        over GPTQ's: {_ratios(rows, "heldout_kl", ("gptq",), ("allocated", "propagated", "healed"))}.
        `python benchmarks/geometry_bits.py`"""
    return note(text) + by_method(rows, "heldout_kl", 4)


def encoder() -> str:
    rows = sorted(load("geometry_encoder")["rows"], key=lambda row: -row["budget_bits_per_weight"])
    text = f"""
        **MiniLM at few bits**: one minus the cosine of sentence embeddings to the original's, on held-out sentences. Ours over
        the better GPTQ's, last stage: {_ratios(rows, "heldout_divergence", ("gptq", "gptq, mse grids"), ("healed",))}.
        `python benchmarks/geometry_encoder.py`"""
    return note(text) + by_method(rows, "heldout_divergence", 4)


def _ratios(rows: list[dict[str, Any]], figure: str, peers: tuple[str, ...], stages: tuple[str, ...]) -> str:
    """Our last stage's figure over the best peer's, size by size."""
    found = []
    for size in dict.fromkeys(row["budget_bits_per_weight"] for row in rows):
        mine = {row["method"]: row[figure] for row in rows if row["budget_bits_per_weight"] == size and figure in row}
        ours = [mine[stage] for stage in stages if stage in mine]
        theirs = [mine[peer] for peer in peers if peer in mine]
        if ours and theirs:
            found.append(f"{ours[-1] / min(theirs):.2f} at {size:g} bits")
    return ", ".join(found)


def ranks() -> str:
    result = load("geometry_ranks")
    rows = []
    for row in sorted(result["rows"], key=lambda r: -r["keep"]):
        tokens = f"{row['heal']['tokens']:,}" if "heal" in row else ""
        figures = [f"{row['heldout_perplexity']:.1f}", f"{row['heldout_kl']:.3f}", f"{row['ratio_to_uniform']:.2f}"]
        rows.append([f"{row['keep']:g}", row["storage"], row["stage"], tokens, *figures, f"{row['seconds']:,.0f}"])
    windows = result["settings"]["windows"]["calibration"]
    known = ", ".join(
        f"{min(r['ratio_to_uniform'] for r in load('weights_ranks')['rows'] if r['keep'] == keep):.2f} at {keep:g}"
        for keep in sorted({r["keep"] for r in load("weights_ranks")["rows"]}, reverse=True)
    )
    text = f"""
        **Truncation alone, the whole pipeline** (SmolLM2, bf16 cores, no integers; the baseline is the uniform SVD-LLM row of
        the truncation table): ranks allocated, layers fitted behind the compressed prefix and blocks refined on the same
        {windows} calibration windows as the baseline, then distillation of the dense model on more windows of the calibration
        articles, each seen once. Allocation alone gave {known} there. `python benchmarks/geometry_ranks.py`"""
    head = [
        "bytes kept",
        "stored as",
        "after",
        "tokens healed on",
        "perplexity",
        "KL",
        "excess / uniform's",
        "processor seconds",
    ]
    return note(text) + grid(head, rows)


BEFORE, AFTER, SOFTER = "before fine-tuning", "after fine-tuning", "at equal bytes and steps"
PAPER = {
    # What the paper says of each statement that ``claims`` counts: the metric matters until fine-tuning, and softer wins.
    **{f"{kind} beats SVD {BEFORE}": True for kind in ("row-fisher", "input", "kronecker", "elementwise")},
    f"kronecker beats input {BEFORE}": True,
    **{f"{kind} beats SVD {AFTER}": False for kind in ("row-fisher", "input", "kronecker", "elementwise")},
    f"kronecker beats input {AFTER}": False,
    **{f"{kind} beats one-shot {SOFTER}": True for kind in ("isvt", "cycles", "cubic", "soft")},
}


def _verdict(held: int, of: int, paper: bool) -> str:
    """Three quarters of the settings or more settle a statement, a quarter or fewer its opposite; that something makes no
    difference is borne out by anything between."""
    often, seldom = held >= 0.75 * of, held <= 0.25 * of
    if paper:
        return "holds" if often else "does not hold" if seldom else "undecided"
    return "does not hold" if often or seldom else "holds"


def claims() -> str:
    result = load("geometry_claims")
    seeds = len({row["seed"] for row in result["rows"]})
    rows = []
    for statement, paper in PAPER.items():
        held, of = (int(part) for part in result["claims"][statement].split(" of "))
        says = "yes" if paper else "no difference"
        rows.append([statement, says, f"{held} of {of}", _verdict(held, of, paper)])
    settings = result["settings"]
    text = f"""
        **The paper's claims on small models** (a transformer and a CNN on scikit-learn's digits, seeds: {seeds}, fp32 cores at
        {", ".join(f"{keep:g}" for keep in settings["keep"])} of the bytes, {settings["fine_tuning_steps"]} steps of
        fine-tuning): in how many settings the held-out loss was lower. A claim holds from three quarters on; that a metric
        makes no difference holds between one and three quarters. Then mean excess loss over the dense model's.
        `python benchmarks/geometry_claims.py`"""
    counted = grid(["statement", "paper", "true in", "the paper's claim here"], rows)
    return note(text) + counted + "\n" + grid(["excess loss, before / after fine-tuning", *_sizes(result)], _excess(result))


def claims_real() -> str:
    result = load("geometry_claims_real")
    rows = result["rows"]
    dense = {(row["architecture"], row["seed"], row["precision"]): row["loss"] for row in rows if row["part"] == "dense"}
    keeps = [keep for keep in result["settings"]["keep"] if any(row.get("keep") == keep for row in rows)]
    table, told = [], []
    for model in dict.fromkeys(row["architecture"] for row in rows):
        mine = [row for row in rows if row["architecture"] == model and row["part"] != "dense"]
        told.append(f"{model} with {len({row['seed'] for row in mine})} seed(s)")
        for part, label in dict.fromkeys((row["part"], row["label"]) for row in mine):
            cells = [model, f"{part}: {label}"]
            for keep in keeps:
                found = [row for row in mine if (row["part"], row["label"], row["keep"]) == (part, label, keep)]
                excess = [
                    statistics.mean(row[f"loss_{stage}"] - dense[model, row["seed"], row["precision"]] for row in found)
                    if found
                    else None
                    for stage in ("before", "after")
                ]
                seen, all_seeds = len({row["seed"] for row in found}), len({row["seed"] for row in mine})
                fewer = f" ({seen} of {all_seeds} seeds)" if found and seen < all_seeds else ""
                cells.append(" / ".join("-" if value is None else f"{value:.3f}" for value in excess) + fewer if found else "-")
            table.append(cells)
    settings = result["settings"]
    text = f"""
        **The same on real models** ({", ".join(told)}; all layers at the same keep, {settings["fine_tuning_steps"]} steps of
        fine-tuning with one batch each; schedules in the Kronecker metric, with {settings["before_the_last_threshold"]} of
        these steps before the last threshold): held-out cross-entropy (SmolLM2), or one minus the cosine to the original's
        sentence embedding (MiniLM). First in how many settings it was lower, then its means in excess of the dense model's,
        before / after fine-tuning. {_precisions(rows)} `python benchmarks/geometry_claims_real.py`"""
    means = grid(["model", "contender", *(f"{keep:g} kept" for keep in keeps)], table)
    return note(text) + _counted(rows) + "\n" + means


def _precisions(rows: list[dict[str, Any]]) -> str:
    """What losses were computed in, each beside the dense model in the same."""
    told = []
    for model in dict.fromkeys(row["architecture"] for row in rows):
        mine = [row for row in rows if row["architecture"] == model and row["part"] != "dense"]
        usual = max(sorted({row["precision"] for row in mine}), key=[row["precision"] for row in mine].count)
        others = sorted(
            {(row["part"], row["keep"], row["precision"]) for row in mine if row["precision"] != usual}, reverse=True
        )
        told.append(f"{model} {usual}" + "".join(f", {part} at {keep:g} {precision}" for part, keep, precision in others))
    return f"Losses computed in: {'; '.join(told)}."


def _counted(rows: list[dict[str, Any]]) -> str:
    """What the paper says, and how often it was so, by model and in all."""
    models = list(dict.fromkeys(row["architecture"] for row in rows))
    by_model = [counted([row for row in rows if row["architecture"] == model]) for model in models]
    table = []
    for statement, paper in PAPER.items():
        held, of = (int(part) for part in counted(rows)[statement].split(" of "))
        if of:
            here = [verdicts[statement].replace("0 of 0", "not run") for verdicts in by_model]
            table.append([statement, "yes" if paper else "no difference", *here, _verdict(held, of, paper)])
    return grid(["statement", "paper", *models, "the paper's claim here"], table)


def _sizes(result: dict[str, Any]) -> list[str]:
    architectures = dict.fromkeys(entry["architecture"] for entry in result["summary"])
    return [f"{architecture}, {keep:g}" for architecture in architectures for keep in result["settings"]["keep"][-2:]]


def _excess(result: dict[str, Any]) -> list[list[str]]:
    """Every contender at the two smallest sizes."""
    found: dict[tuple[str, str], list[str]] = {}
    for entry in result["summary"]:
        if entry["keep"] in result["settings"]["keep"][-2:]:
            cells = found.setdefault((entry["part"], entry["label"]), [f"{entry['part']}: {entry['label']}"])
            cells.append(f"{entry['excess_before']:.3f} / {entry['excess_after']:.3f}")
    return list(found.values())


def networks() -> str:
    result = load("geometry_networks")
    rows = []
    for model in dict.fromkeys(row["model"] for row in result["rows"]):
        mine = [row for row in result["rows"] if row["model"] == model]
        for network in dict.fromkeys(row["network"] for row in mine):
            cells = [model, network]
            for figure in ("heldout", "divergence"):
                for metric in ("euclidean", "input"):
                    values = [row[figure] for row in mine if row["network"] == network and row["metric"] == metric]
                    cells.append(f"{statistics.geometric_mean(values):.4f}")
            rows.append(cells)
    share = ", ".join(f"{share:g}" for share in result["settings"]["shares"])
    gaps = ", ".join(
        f"{_nearest(result['rows'], model):.2f} ({model})" for model in {row["model"]: None for row in result["rows"]}
    )
    text = f"""
        **Networks in the metric**: one layer of each kind from the middle of both models, bf16 cores at {share} of the bf16
        bytes; two cores in closed form, trains and trees by {result["settings"]["sweeps"]} sweeps of ALS in the input metric.
        Geometric means over layers of the relative squared error of the layer's output on held-out text, and of what the model
        loses with that one layer replaced (KL, or one minus the cosine). Error in the metric of the best train or tree over
        that of two cores: {gaps}. `python benchmarks/geometry_networks.py`"""
    head = ["model", "network", "error, Euclidean", "error, metric", "model, Euclidean", "model, metric"]
    return note(text) + grid(head, rows)


def _nearest(rows: list[dict[str, Any]], model: str) -> float:
    """Held-out error of the best train or tree in the metric over that of two cores."""
    errors: dict[str, list[float]] = {}
    for row in rows:
        if row["model"] == model and row["metric"] == "input":
            errors.setdefault(row["network"], []).append(row["heldout"])
    means = {network: statistics.geometric_mean(values) for network, values in errors.items()}
    return min(value for network, value in means.items() if network != "two cores") / means["two cores"]


def cost() -> str:
    result = load("geometry_cost")
    measured = {row["stage"] for row in result["rows"]}
    absent = [stage for stage in ("ISVT, one step", "statistics, survey, allocation, truncation") if stage not in measured]
    missing = f"Not measured yet: {'; '.join(absent)}." if absent else ""
    tokens = result["settings"]["windows"] * result["settings"]["length"]
    rows = [
        [
            row["stage"],
            f"{row['seconds']:.1f}",
            f"{row['passes']:.1f} x {row['against']}",
            f"{row['peak_bytes'] / 2**20:,.0f}",
        ]
        for row in result["rows"]
    ]
    text = f"""
        **Cost of the stages** on SmolLM2 with {tokens:,} tokens on one thread in float32: processor seconds, the same as a
        multiple of the passes over these tokens that the stage needs at least, and peak memory above what the process held.
        Work per layer (eigendecompositions, cores) does not grow with the tokens. {missing}
        `python benchmarks/geometry_cost.py`"""
    return note(text) + grid(["stage", "processor seconds", "of passes", "peak MiB"], rows)


def gptq() -> str:
    rows = [
        [row["variant"], str(row["bits"]), str(row["windows"]), f"{row['bits_per_weight']:.2f}", f"{row['validation_kl']:.3f}"]
        for row in load("geometry_gptq")["rows"]
    ]
    text = """
        **Is the GPTQ baseline healthy?** Its options on SmolLM2, judged on validation windows.
        `python benchmarks/geometry_gptq.py`"""
    return note(text) + grid(["variant", "bits", "calibration windows", "bits stored", "KL"], rows)


MAKERS: dict[str, Callable[[], str]] = {
    "geometry_bits": bits,
    "geometry_encoder": encoder,
    "geometry_gptq": gptq,
    "geometry_ranks": ranks,
    "geometry_claims": claims,
    "geometry_claims_real": claims_real,
    "geometry_networks": networks,
    "geometry_cost": cost,
}

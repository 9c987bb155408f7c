"""Tables of the full runs of ``tensornet-compress bench``, for ``readme_tables.py``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from readme_tables import grid, load, note

Row = dict[str, Any]

_LOSSLESS = 1e-5


def _measured(rows: list[Row]) -> list[Row]:
    return [row for row in rows if not row.get("skipped")]


def _sized(rows: list[Row], value: Callable[[Row], float], size: str, shown: Callable[[float], str]) -> list[list[str]]:
    """A line per method, a column per size asked for; where a method stored another size, that size too."""
    budgets = sorted({row["budget"] for row in rows if row["budget"] is not None}, reverse=True)
    lines = []
    for method in dict.fromkeys(row["method"] for row in rows if row["budget"] is not None):
        cells = [f"**{method}**" if any(row["ours"] for row in rows if row["method"] == method) else method]
        for budget in budgets:
            row = next((row for row in rows if (row["method"], row["budget"]) == (method, budget)), None)
            if row is None:
                cells.append("not run")
            elif row.get("skipped"):
                cells.append("cannot")
            else:
                stored = row["values"][size]
                cells.append(shown(value(row)) + ("" if abs(stored / budget - 1) < 0.02 else f" ({stored:.2f})"))
        lines.append(cells)
    return lines


def _ahead(rows: list[Row], value: Callable[[Row], float], size: str) -> str:
    """Ours over the best peer that takes no more bytes than asked for (or than its format's steps allow), size by size."""
    found = []
    for budget in sorted({row["budget"] for row in rows if row["budget"] is not None}, reverse=True):
        mine = [value(row) for row in _measured(rows) if row["ours"] and row["budget"] == budget]
        theirs = {row["method"]: value(row) for row in _measured(rows) if not row["ours"] and row["budget"] == budget}
        if mine and theirs:
            best = min(theirs, key=lambda name: theirs[name])
            found.append(f"{min(mine) / theirs[best]:.2f} at {budget:g} bits ({best})")
    return ", ".join(found)


def _bits_head(rows: list[Row]) -> list[str]:
    return [f"{bits:g} bits" for bits in sorted({row["budget"] for row in rows if row["budget"] is not None}, reverse=True)]


def on_bundled_grid(rows: list[Row]) -> str:
    """How many layers of SmolLM2 ours stores on the grid of the file that they came in, and what that means."""
    exact = {
        row["budget"]: sum(layer["error"] < _LOSSLESS for layer in row["layers"]) for row in rows if row["method"] == "ours"
    }
    counts = ", ".join(f"{exact[bits]} at {bits:g}" for bits in sorted(exact, reverse=True) if exact[bits])
    if not counts:
        return ""
    return f"""The bundled weights come from a 4-bit file. Ours finds its grid, which stores a layer without loss in 5 bits:
        {counts} bits. That says nothing about other models; judge these sizes by MiniLM's table in docs/results.md."""


def weights() -> str:
    """KL of SmolLM2 at every size."""
    result = load("bench_weights_smollm2")
    rows, settings = result["rows"], result["settings"]["weights"]

    def kl(row: Row) -> float:
        return float(row["values"]["kl"])

    text = f"""
        **Weights of SmolLM2 against every peer**: KL to the dense model on held-out text (nats per token,
        {settings["heldout_windows"]} windows of {settings["length"]}), all layers, {settings["calibration_windows"]}
        calibration windows, everything stored counted; in brackets the bits per weight where a method stores more or less than
        asked. {on_bundled_grid(rows)} Best of ours over the best peer: {_ahead(rows, kl, "bits_per_weight")}.
        `tensornet-compress bench weights`"""
    return note(text) + grid(["method", *_bits_head(rows)], _sized(rows, kl, "bits_per_weight", lambda v: f"{v:.3g}"))


def encoder() -> str:
    """Cosine of MiniLM at every size."""
    result = load("bench_weights_minilm")
    rows, settings = result["rows"], result["settings"]["weights"]

    def away(row: Row) -> float:
        return 1 - float(row["values"]["mean_cosine"])

    text = f"""
        **Weights of MiniLM against every peer**: one minus the cosine of sentence embeddings to the original's on
        {32 * settings["heldout_windows"]} held-out sentences. Best of ours over the best peer:
        {_ahead(rows, away, "bits_per_weight")}. `tensornet-compress bench weights --model all-minilm-l6-v2`"""
    return note(text) + grid(["method", *_bits_head(rows)], _sized(rows, away, "bits_per_weight", lambda v: f"{v:.3g}"))


def caches() -> str:
    """KL of every cache at every rate."""
    result = load("bench_kv_smollm2")
    rows, settings = result["rows"], result["settings"]["kv"]

    def natural(row: Row) -> float:
        return float(row["values"]["kl_natural"])

    both = [
        [*line, *copied[1:]]
        for line, copied in zip(
            _sized(rows, natural, "bits_per_element", lambda v: f"{v:.2g}"),
            _sized(rows, lambda row: float(row["values"]["kl_copy"]), "bits_per_element", lambda v: f"{v:.2g}"),
        )
    ]
    text = f"""
        **KV caches of SmolLM2 against every peer**: KL to the exact cache (nats per token) over {settings["ahead"]} tokens read
        with the coded cache of {settings["context"]:,}, means over {settings["documents"]} held-out documents, which go on
        naturally, or are copied (a copy needs every detail). Sinks and the last {settings["window"]} tokens stay exact for
        all; profiles are stored once and not in the bits. In brackets the bits per element where they differ from those asked.
        `ours-free` needs no calibration. Best of ours over the best peer, natural:
        {_ahead(rows, natural, "bits_per_element")}. `tensornet-compress bench kv`"""
    head = _bits_head(rows)
    return note(text) + grid(["cache", *(f"{h}, natural" for h in head), *(f"{h}, copy" for h in head)], both)


def search() -> str:
    """Bytes at equal error."""
    result = load("bench_search")
    rows = result["rows"]
    methods = list(dict.fromkeys(row["method"] for row in rows))
    lines = []
    for subject, error in dict.fromkeys((row["subject"], row["budget"]) for row in rows):
        mine = {row["method"]: row for row in rows if (row["subject"], row["budget"]) == (subject, error)}
        cells = [subject, f"{error:g}"]
        for method in methods:
            row = mine.get(method)
            cells.append("" if row is None else "cannot" if row.get("skipped") else f"{row['values']['nbytes']:,.0f}")
        ours = mine.get("ours", {}).get("values", {})
        lines.append(
            [*cells, f"{ours['gain']:.2f}" if "gain" in ours else "", f"{ours.get('null_gain', 1):.2f}" if ours else ""]
        )
    text = """
        **Search against every peer**: stored bytes at equal error; the gain of ordering, and what the same search gains on the
        same entries shuffled. `tensornet-compress bench search`"""
    return note(text) + grid(["tensor", "error", *methods, "gain", "null"], lines)


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def speed() -> str:
    """Times as ratios."""
    result = load("bench_speed")
    rows = [
        [row["subject"], row["method"], _short(1e3 * row["values"]["time"]), _short(row["values"]["ours_over_this"])]
        if not row.get("skipped")
        else [row["subject"], row["method"], "cannot", ""]
        for row in result["rows"]
    ]
    machine = result["machine"]
    text = f"""
        **Speed** on {machine["cores"]} cores with {machine["threads"]} threads, medians, all contenders of a subject timed in
        turn in one run: milliseconds, and the time of ours over this one's (below one: ours is faster). Ours surveys every form
        of every layer and measures what each is worth; that of quanto holds the compilation of its extension.
        `tensornet-compress bench speed`"""
    return note(text) + grid(["what", "method", "ms", "ours / this"], rows)


MAKERS: dict[str, Callable[[], str]] = {
    "bench_weights_smollm2": weights,
    "bench_weights_minilm": encoder,
    "bench_kv_smollm2": caches,
    "bench_search": search,
    "bench_speed": speed,
}

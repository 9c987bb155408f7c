"""``make demo``: compress the embedded model, wrap its KV cache, check both on held-out text, and generate.

python benchmarks/demo.py [--bits 4.5] [--out out/demo]
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from time import perf_counter
from typing import Any

from common import MODEL, language_inputs
from rich.console import Console
from rich.table import Table

import tensornet_compress as tnc
import tensornet_compress.kv as kv
from tensornet_compress.cli.kv import PROFILE_FOLDER, counted, evaluate_cache
from tensornet_compress.cli.main import continue_text, folder_nbytes
from tensornet_compress.cli.progress import RichProgress
from tensornet_compress.compressing import model_nbytes
from tensornet_compress.compressing.report import CompressionReport
from tensornet_compress.evaluate import LanguageQuality, Reference, evaluate_language
from tensornet_compress.inputs import calibration_windows, heldout_windows, resolve_model
from tensornet_compress.nn import decoded
from tensornet_compress.nn.plan import PLAN_ATTRIBUTE
from tensornet_compress.report import Measure, write_report, write_result
from tensornet_compress.report.from_kv import kv_result
from tensornet_compress.report.from_weights import OURS, weights_result
from tensornet_compress.report.made import made_here

PROMPT = "The capital of France is"
CACHES = (("storage", 2.0), ("live", 3.0))
PASSAGE = 400
SHARED = {
    "nbytes": Measure(title="Stored", unit="bytes", better="lower", explanation="Of the whole model, or of one sequence's "
    "cache."),
    "kl": Measure(
        title="KL divergence", unit="nats per token", better="lower", explanation="From the original, or from its exact cache."
    ),
    "perplexity": Measure(title="Perplexity", better="lower", explanation="On held-out articles."),
    "top1": Measure(title="Same best next token", better="higher", explanation="On held-out articles."),
}  # fmt: skip
KV_LENGTH, KV_WINDOWS, KV_SENSITIVITY_WINDOWS, KV_HELDOUT = 1152, 20, 8, 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bits", type=float, default=4.5)
    parser.add_argument("--out", type=Path, default=Path("out/demo"))
    arguments = parser.parse_args()
    console, progress, started = Console(), RichProgress(), perf_counter()
    model, tokenizer, batches, heldout = language_inputs(windows=8)
    with progress.stage("reference", 2) as advance:
        reference = Reference(model, heldout, advance=advance)
    before, bytes_before = evaluate_language(model, heldout, reference), model_nbytes(model)
    budget = tnc.Budget(bits_per_weight=arguments.bits)
    report = tnc.compress(model, budget, batches, source=Path(resolve_model(MODEL)), progress=progress)
    tnc.save(model, arguments.out, tokenizer, report, overwrite=True)
    loaded = tnc.load(arguments.out)
    with progress.stage("evaluate", 2) as advance:
        after = evaluate_language(loaded, heldout, reference, advance=advance)
    cache_rows = wrap_cache(loaded, tokenizer, arguments.out / PROFILE_FOLDER, progress)
    text = continue_text(loaded, tokenizer, PROMPT, 24)
    passage = tokenizer.decode(heldout[0, :PASSAGE])
    with kv.compressed(loaded, bits=CACHES[-1][1], profile=kv.Profile.load(arguments.out / PROFILE_FOLDER)) as caches:
        longer = continue_text(loaded, tokenizer, passage, 40)[len(passage) :]
    minutes = (perf_counter() - started) / 60
    table = Table("figure", "before", "after", title=f"{MODEL}: block linears at {report.bits_per_weight:.3f} bits per weight")
    table.add_row("bytes of the block linears", f"{report.targeted_original_nbytes:,}", f"{report.targeted_nbytes:,}")
    table.add_row("bytes of all tensors", f"{bytes_before:,}", f"{report.nbytes:,}")
    table.add_row("perplexity, held-out articles", f"{before.perplexity:.3f}", f"{after.perplexity:.3f}")
    table.add_row("KL to the original (nats/token)", "0", f"{after.kl:.4f}")
    table.add_row("same best token", "100 %", f"{after.top1:.1%}")
    console.print(table)
    console.print(cache_table(cache_rows))
    page = demo_report(report, loaded, (before, after), cache_rows, arguments.out / PROFILE_FOLDER, arguments.out.parent)
    console.print(str(report))
    console.print(f"saved {arguments.out} ({folder_nbytes(arguments.out):,} bytes on disk), {minutes:.1f} minutes in all")
    console.print(f"generated from the saved folder: {text!r}")
    console.print(f"a held-out passage of {PASSAGE} tokens continued through the live cache: {longer!r}")
    console.print(str(caches[-1].report()))
    result = {"summary": report.summary(), "before": before.model_dump(), "after": after.model_dump(), "minutes": minutes}
    result |= {"caches": cache_rows}
    (arguments.out.parent / "demo.json").write_text(json.dumps(result | {"text": text}, indent=1) + "\n", encoding="utf-8")
    console.print(f"open the report in a browser: {page}")


def demo_report(
    report: CompressionReport,
    model: Any,
    quality: tuple[LanguageQuality, LanguageQuality],
    caches: list[dict[str, Any]],
    profile_folder: Path,
    folder: Path,
) -> Path:
    """Weights and caches of the demo as one result, ``demo_report.json``, and its page, ``demo_report.html``."""
    command = " ".join(["python", *sys.argv])
    weights = weights_result(report, getattr(model, PLAN_ATTRIBUTE, None), MODEL, command)
    cache = kv_result(MODEL, caches, kv.Profile.load(profile_folder), command=command)
    rows = []
    for row in weights.rows:
        found = {"original": quality[0], OURS: quality[1]}.get(row.method)
        if found is not None:
            measured = {"kl": max(found.kl or 0.0, 0.0), "perplexity": found.perplexity, "top1": found.top1 or 0.0}
            row = row.model_copy(update={"values": row.values | measured})
        rows.append(row)
    measures = weights.measures | cache.measures | SHARED
    made = made_here("Demo: SmolLM2-135M, compressed", command, measures, [*rows, *cache.rows], weights.settings)
    write_result(made, folder / "demo_report.json")
    return write_report(made, folder / "demo_report.html")


def wrap_cache(model: Any, tokenizer: Any, folder: Path, progress: RichProgress) -> list[dict[str, Any]]:
    """Calibrate the cache of a model, save the profile, and measure it on held-out windows."""
    windows = calibration_windows(tokenizer, KV_LENGTH, KV_WINDOWS)
    with decoded(model):
        with progress.stage("calibrate cache", len(windows)) as advance:
            profile = kv.calibrate(model, counted(windows, advance), sensitivity_windows=KV_SENSITIVITY_WINDOWS)
        profile.save(folder)
        rows = []
        heldout = heldout_windows(tokenizer, KV_LENGTH, KV_HELDOUT)
        for mode, bits in CACHES:
            with progress.stage(f"{mode} cache at {bits:g} bits", len(heldout)) as advance:
                rows.append({"mode": mode, "bits": bits} | evaluate_cache(model, heldout, bits, mode, profile, advance))
    return [row | {"profile_nbytes": profile.nbytes} for row in rows]


def cache_table(rows: list[dict[str, Any]]) -> Table:
    """The caches against the exact cache of the same model."""
    table = Table("cache", "bits, all counted", "bytes", "exact bytes", "KL to exact", "same best token")
    table.title = f"KV cache of {KV_LENGTH * 7 // 8} tokens; profile {rows[0]['profile_nbytes']:,} bytes, shared by all caches"
    for row in rows:
        table.add_row(
            f"{row['mode']}, {row['bits']:g} bits",
            f"{row['bits_per_element']:.3f}",
            f"{row['nbytes']:,.0f}",
            f"{row['exact_nbytes']:,.0f}",
            f"{row['kl']:.5f}",
            f"{row['top1_agreement']:.1%}",
        )
    return table


if __name__ == "__main__":
    main()

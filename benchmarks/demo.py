"""``make demo``: compress the embedded model, check it on held-out text, and generate from the saved folder.

python benchmarks/demo.py [--bits 4.5] [--out out/demo]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from time import perf_counter

from common import MODEL, language_inputs
from rich.console import Console
from rich.table import Table

import tensornet_compress as tnc
from tensornet_compress.cli.main import continue_text, folder_nbytes
from tensornet_compress.cli.progress import RichProgress
from tensornet_compress.compression import model_nbytes
from tensornet_compress.evaluate import Reference, evaluate_language
from tensornet_compress.inputs import resolve_model

PROMPT = "The capital of France is"


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
    text = continue_text(loaded, tokenizer, PROMPT, 24)
    minutes = (perf_counter() - started) / 60
    table = Table("figure", "before", "after", title=f"{MODEL}: block linears at {report.bits_per_weight:.3f} bits per weight")
    table.add_row("bytes of the block linears", f"{report.targeted_original_nbytes:,}", f"{report.targeted_nbytes:,}")
    table.add_row("bytes of all tensors", f"{bytes_before:,}", f"{report.nbytes:,}")
    table.add_row("perplexity, held-out articles", f"{before.perplexity:.3f}", f"{after.perplexity:.3f}")
    table.add_row("KL to the original (nats/token)", "0", f"{after.kl:.4f}")
    table.add_row("same best token", "100 %", f"{after.top1:.1%}")
    console.print(table)
    console.print(str(report))
    console.print(f"saved {arguments.out} ({folder_nbytes(arguments.out):,} bytes on disk), {minutes:.1f} minutes in all")
    console.print(f"generated from the saved folder: {text!r}")
    result = {"summary": report.summary(), "before": before.model_dump(), "after": after.model_dump(), "minutes": minutes}
    (arguments.out.parent / "demo.json").write_text(json.dumps(result | {"text": text}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""``make demo``: compress the bundled model, wrap its cache, and show what that cost and saved on one screen.

    python benchmarks/demo.py [--bits 3.5] [--out out/demo]

A small run on purpose: few calibration windows, a small profile. ``tensornet-compress bench`` has the long tables.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import tensornet_compress as tnc
from tensornet_compress.cli.common import RichProgress
from tensornet_compress.cli.report import leave_report
from tensornet_compress.cli.weights import folder_nbytes
from tensornet_compress.compressing import model_nbytes
from tensornet_compress.evaluate import Reference, evaluate_cache, evaluate_language
from tensornet_compress.inputs import calibration_windows, heldout_windows, load_causal_lm, load_tokenizer, wikipedia_articles
from tensornet_compress.nn.plan import PLAN_ATTRIBUTE
from tensornet_compress.report.from_weights import weights_result

MODEL, PROMPT, PASSAGE, NEW_TOKENS = "smollm2-135m", "The capital of France is", 1600, 32
WINDOWS, LENGTH, CACHE_WINDOWS, CACHE_LENGTH, CACHE_BITS = 6, 512, 10, 640, 3.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=float, default=3.5)
    parser.add_argument("--out", type=Path, default=Path("out/demo"))
    options = parser.parse_args()
    progress, tokenizer, model = RichProgress(), load_tokenizer(MODEL), load_causal_lm(MODEL)
    held = heldout_windows(tokenizer, 256, 6)
    with progress.stage("measure the original", 2) as advance:
        reference = Reference(model, held, advance=advance)
        original = evaluate_language(model, held, reference, advance=advance)
    speed, sentence = spoken(model, tokenizer, PROMPT)
    rows = [("original", model_nbytes(model), original, speed)]

    batches = list(calibration_windows(tokenizer, LENGTH, WINDOWS).split(2))
    budget = tnc.Budget(bits_per_weight=options.bits)
    report = tnc.compress(model, budget, batches, effort="fast", progress=progress)
    tnc.save(model, options.out, tokenizer, report, overwrite=True)
    shutil.rmtree(options.out / "kv_profile", ignore_errors=True)  # of an earlier demo, which would be counted
    files = folder_nbytes(options.out)
    command = f"python benchmarks/demo.py --bits {options.bits:g}"
    leave_report(weights_result(report, getattr(model, PLAN_ATTRIBUTE), MODEL, command), options.out)
    model = tnc.load(options.out)
    with progress.stage("measure the compressed", 2) as advance:
        compressed = evaluate_language(model, held, reference, advance=advance)
    speed, answer = spoken(model, tokenizer, PROMPT)
    rows.append((f"compressed to {report.bits_per_weight:.2f} bits a weight", files, compressed, speed))

    with progress.stage("learn to code the cache", CACHE_WINDOWS) as advance:
        windows = counted(calibration_windows(tokenizer, CACHE_LENGTH, CACHE_WINDOWS), advance)
        profile = tnc.kv.calibrate(model, windows, sensitivity_windows=4, draws=1)
    profile.save(options.out / "kv_profile")
    cache = evaluate_cache(model, heldout_windows(tokenizer, 1024, 2), CACHE_BITS, "live", profile)
    # Of an article that calibration never saw.
    passage = " ".join(wikipedia_articles()[-1][:PASSAGE].split()[:-1])
    with tnc.kv.compressed(model, bits=CACHE_BITS, profile=profile):
        _, continued = spoken(model, tokenizer, passage)
    show(
        rows, cache, {"original": sentence, "compressed": answer, "compressed, with its cache": f"... {continued}"}, options.out
    )


def spoken(model: Any, tokenizer: Any, prompt: str) -> tuple[float, str]:
    """Tokens per second of greedy decoding, and the first lines that it gives."""
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    model.generate(ids, max_new_tokens=2, min_new_tokens=2, do_sample=False)  # loads what decoding needs, once
    began = perf_counter()
    with torch.no_grad():
        given = model.generate(ids, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False)
    speed = NEW_TOKENS / (perf_counter() - began)
    text = tokenizer.decode(given[0, ids.shape[1] :], skip_special_tokens=True)
    return speed, " ".join(text.split())


def counted(windows: torch.Tensor, advance: Any) -> Any:
    """Windows one by one, with progress."""
    for window in windows.split(1):
        yield window
        advance()


def show(rows: list[Any], cache: dict[str, float], sentences: dict[str, str], out: Path) -> None:
    """One screen: sizes, quality, speed, a sentence, where the report is."""
    console = Console()
    table = Table(
        "weights", "bytes", "KL to the original", "perplexity", "tokens per second", title=f"{MODEL} on held-out text"
    )
    for name, nbytes, quality, speed in rows:
        table.add_row(name, f"{nbytes:,}", f"{quality.kl:.3f}", f"{quality.perplexity:.1f}", f"{speed:.1f}")
    console.print(table)
    share = cache["exact_nbytes"] / cache["nbytes"]
    console.print(
        f"cache: {cache['bits_per_element']:.1f} bits a number held, {share:.1f} times smaller than exact, "
        f"KL to the exact cache {cache['kl']:.4f}"
    )
    for name, sentence in sentences.items():
        console.print(f"[bold]{name}[/bold]: {sentence}", highlight=False)
    console.print(f"the report: {out / 'report.html'}", highlight=False)


if __name__ == "__main__":
    main()

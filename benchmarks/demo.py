"""``make demo``: compress the bundled model, calibrate its cache, check both on held-out text, and generate.

    python benchmarks/demo.py [--bits 3.5] [--out out/demo]

These are plain commands of ``tensornet-compress``, printed as they are run; each leaves its page and data in the folder.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from pathlib import Path
from time import perf_counter

from tensornet_compress.inputs import wikipedia_articles

MODEL, PROMPT, PASSAGE, SHOWN = "smollm2-135m", "The capital of France is", 1600, 140


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=float, default=3.5)
    parser.add_argument("--out", type=Path, default=Path("out/demo"))
    options = parser.parse_args()
    out, began = str(options.out), perf_counter()
    passage = " ".join(wikipedia_articles()[-1][:PASSAGE].split()[:-1])  # of an article that calibration never saw
    commands = (
        ["weights", MODEL, out, "--bits-per-weight", f"{options.bits:g}", "--samples", "8", "--overwrite"],
        ["inspect", out],
        ["eval", out, "--reference", MODEL, "--windows", "8", "--json", str(options.out.parent / "demo.json")],
        ["kv", out, "--bits", "2", "--samples", "20", "--sensitivity-windows", "8", "--overwrite"],
        ["eval", out, "--kv-bits", "3", "--windows", "3", "--length", "1152"],
        ["generate", out, "--prompt", PROMPT, "--max-new-tokens", "24"],
        ["generate", out, "--prompt", passage, "--max-new-tokens", "40", "--kv-bits", "3"],
    )
    for command in commands:
        print(f"\n$ tensornet-compress {shlex.join(command)}"[:SHOWN], flush=True)
        done = subprocess.run([sys.executable, "-m", "tensornet_compress.cli", *command], check=False)
        if done.returncode:
            return done.returncode
    pages = [options.out / "report.html", options.out / "kv_profile" / "report.html"]
    print(f"\n{(perf_counter() - began) / 60:.1f} minutes; open in a browser: {', '.join(map(str, pages))}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

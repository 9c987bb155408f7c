"""``make demo``: compress the bundled model, calibrate its cache, check both on held-out text, and generate.

    python benchmarks/demo.py [--bits 4.5] [--out out/demo]

These are plain commands of ``tensornet-compress``, printed as they are run; each leaves its page and data in the folder.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from pathlib import Path
from time import perf_counter

MODEL, PROMPT = "smollm2-135m", "The capital of France is"
PASSAGE = (
    "The tower was built of iron by an engineer whose firm had until then made railway bridges. It was meant to stand for "
    "twenty years, as the entrance to a fair, and to be taken down again. Painters and writers of the city signed a letter "
    "against it; when it was found that messages could be sent from its top"
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=float, default=4.5)
    parser.add_argument("--out", type=Path, default=Path("out/demo"))
    options = parser.parse_args()
    out, began = str(options.out), perf_counter()
    commands = (
        ["weights", MODEL, out, "--bits-per-weight", f"{options.bits:g}", "--overwrite"],
        ["inspect", out],
        ["eval", out, "--reference", MODEL, "--windows", "8", "--json", str(options.out.parent / "demo.json")],
        ["kv", out, "--bits", "2", "--samples", "20", "--sensitivity-windows", "8", "--overwrite"],
        ["eval", out, "--kv-bits", "3", "--windows", "3", "--length", "1152"],
        ["generate", out, "--prompt", PROMPT, "--max-new-tokens", "24"],
        ["generate", out, "--prompt", PASSAGE, "--max-new-tokens", "40", "--kv-bits", "3"],
    )
    for command in commands:
        print(f"\n$ tensornet-compress {shlex.join(command)}", flush=True)
        done = subprocess.run([sys.executable, "-m", "tensornet_compress.cli", *command], check=False)
        if done.returncode:
            return done.returncode
    pages = [options.out / "report.html", options.out / "kv_profile" / "report.html"]
    print(f"\n{(perf_counter() - began) / 60:.1f} minutes; open in a browser: {', '.join(map(str, pages))}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

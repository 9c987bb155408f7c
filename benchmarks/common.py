"""What the benchmark scripts share: inputs, progress and results as JSON with the settings that made them."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "tensorly", "opt_einsum", "transformers", "numpy", "scipy", "safetensors")
MODEL = "smollm2-135m"
LENGTH = 512


class Lines:
    """Progress as plain lines with seconds, for logs."""

    @contextmanager
    def stage(self, title: str, total: int) -> Iterator[Callable[[], None]]:
        started = perf_counter()
        yield lambda: None
        print(f"  {title} ({total}): {perf_counter() - started:.1f} s", flush=True)


def machine() -> dict[str, Any]:
    """Where and with what a result was made."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=RESULTS.parent, check=False)
    return {
        "command": " ".join(["python", *[os.path.relpath(sys.argv[0], RESULTS.parent.parent), *sys.argv[1:]]]),
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
        "commit": commit.stdout.strip() or None,
    }


def write_result(name: str, content: dict[str, Any]) -> Path:
    """Write ``benchmarks/results/NAME.json`` under a temporary name, then rename."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps({"name": name, "machine": machine()} | content, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)
    print(f"wrote {path.relative_to(RESULTS.parent.parent)}", flush=True)
    return path


def language_inputs(windows: int, calibration: int = 32) -> tuple[Any, Any, list[Tensor], Tensor]:
    """SmolLM2-135M, its tokenizer, calibration batches of four windows, and held-out windows from other articles."""
    from tensornet_compress.inputs import calibration_windows, heldout_windows, load_causal_lm, load_tokenizer

    tokenizer = load_tokenizer(MODEL)
    batches = list(calibration_windows(tokenizer, LENGTH, calibration).split(4))
    return load_causal_lm(MODEL), tokenizer, batches, heldout_windows(tokenizer, LENGTH, windows)


@contextmanager
def original_layers(model: torch.nn.Module) -> Iterator[None]:
    """Put the model's modules, and norms that were trained, back after a compression inside the block."""
    from tensornet_compress.nn import KeptModules

    kept = KeptModules(model)
    try:
        yield
    finally:
        kept.put_back()

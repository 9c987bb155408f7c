"""Where and with what a result is made."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from tensornet_compress.report.schema import Machine

PACKAGES = (
    "torch", "tensorly", "opt_einsum", "transformers", "numpy", "scipy", "safetensors", "optimum-quanto", "hqq",
    "tensorly-torch", "teneva", "ttnopt",
)  # fmt: skip


def this_machine() -> Machine:
    """The machine and the versions of what is measured; a package that is not installed is left out."""
    packages = {}
    for name in PACKAGES:
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            continue
    return Machine(
        processor=_processor(),
        cores=os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        python=platform.python_version(),
        packages=packages,
        commit=_commit(),
    )


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    """The commit of the source tree, when the package lies in one."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=root, check=False)
    except OSError:
        return None
    return found.stdout.strip() or None

"""Run notebooks and keep their outputs: ``python notebooks/execute.py [NAME.ipynb ...]`` (all by default), or ``make docs``."""

from __future__ import annotations

import os
import resource
import sys
import tempfile
from pathlib import Path
from time import perf_counter

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent
TIMEOUT = 1200


def execute(path: Path, folder: Path) -> nbformat.NotebookNode:
    """The notebook with the outputs of a run in ``folder``; an error in a cell is raised."""
    notebook = nbformat.read(path, as_version=4)
    # One thread makes runs comparable, and the small factorisations here faster.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("PYTHONWARNINGS", "ignore")  # warnings name files of this machine
    NotebookClient(notebook, timeout=TIMEOUT, resources={"metadata": {"path": str(folder)}}).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times of the run, which would change with each
    notebook.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    return notebook


def processor_seconds() -> float:
    """Spent so far by kernels that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    paths = [Path(name) for name in sys.argv[1:]] or sorted(HERE.glob("*.ipynb"))
    for path in paths:
        began, before = perf_counter(), processor_seconds()
        with tempfile.TemporaryDirectory() as folder:
            notebook = execute(path, Path(folder))
        nbformat.write(notebook, path)
        seconds = f"{perf_counter() - began:.0f} s, {processor_seconds() - before:.0f} s of the processor"
        print(f"{path.name}: {seconds}, {path.stat().st_size:,} bytes", flush=True)


if __name__ == "__main__":
    main()

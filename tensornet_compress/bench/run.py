"""One run of one or several benchmarks into one result file."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Protocol

import torch
from pydantic import JsonValue

from tensornet_compress.bench.harness import Harness, Job, start
from tensornet_compress.errors import TensorNetError
from tensornet_compress.progress import Progress
from tensornet_compress.report import Measure, Result


class Bench(Protocol):
    """One of the four benchmarks."""

    def describe(self) -> dict[str, JsonValue]:
        """Its settings as data."""
        ...

    def measures(self) -> Mapping[str, Measure]:
        """What the values of its rows mean."""
        ...

    def prepare(self) -> None:
        """Load what the jobs need; raises for bad input."""
        ...

    def jobs(self) -> Iterable[Job]:
        """The rows to make."""
        ...

    def release(self) -> None:
        """Let go of models and data."""
        ...


def run(
    benches: Mapping[str, Bench],
    command: str,
    path: Path | None,
    resume: bool,
    progress: Progress,
    say: Callable[[str], None] = lambda line: None,
) -> Result:
    """All jobs of all benchmarks, in order, into one result.

    Raises:
        TensorNetError: bad input, or a result file that does not fit; a method that fails is a skipped row.
    """
    began = perf_counter()
    settings: dict[str, JsonValue] = {name: bench.describe() for name, bench in benches.items()}
    measures: dict[str, Measure] = {}
    for bench in benches.values():
        for measure, meaning in bench.measures().items():
            if measures.setdefault(measure, meaning) != meaning:
                raise ValueError(f"two benchmarks mean different things by {measure!r}")
    threads: JsonValue = torch.get_num_threads()
    result = start(f"bench {' '.join(benches)}", command, settings | {"threads": threads}, measures, path, resume)
    harness = Harness(result, path, progress, say)
    for name, bench in benches.items():
        harness.run(name, list(bench.jobs()), bench.prepare)
        bench.release()
    return harness.finish(perf_counter() - began)


def load_plugins(files: Sequence[Path]) -> None:
    """Run Python files that add methods, models, texts or metrics to the registries.

    Raises:
        TensorNetError: a file that is missing or fails; the message holds its error.
    """
    for file in files:
        if not file.is_file():
            raise TensorNetError(f"no plug-in file at {str(file)!r}")
        spec = importlib.util.spec_from_file_location(f"tensornet_plugin_{file.stem}", file)
        if spec is None or spec.loader is None:
            raise TensorNetError(f"{str(file)!r} is not a Python file")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            raise TensorNetError(f"the plug-in {str(file)!r} failed: {type(error).__name__}: {error}") from error

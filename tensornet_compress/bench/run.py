"""What the four benchmarks have in common, and one run of several of them into one result file."""

from __future__ import annotations

import importlib.util
import re
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache, cached_property, lru_cache, partial
from pathlib import Path
from time import perf_counter
from typing import Any, ClassVar, Generic, Self, TypeVar

import torch
from pydantic import JsonValue

from tensornet_compress.bench.harness import Harness, Job, row_of, start
from tensornet_compress.bench.models import find_model
from tensornet_compress.bench.peer_packages import SIDE
from tensornet_compress.bench.registry import Method, Registry
from tensornet_compress.bench.texts import find_text
from tensornet_compress.compressing.cluster import cluster, cluster_kind
from tensornet_compress.compressing.workers import run_jobs
from tensornet_compress.errors import TensorNetError
from tensornet_compress.progress import Progress
from tensornet_compress.report import Measure, Result, Row
from tensornet_compress.report.schema import Task


@dataclass(frozen=True)
class Settings:
    """What a run of a benchmark does; the defaults are those of a quick run. ``FULL``: what the full tables have instead."""

    FULL: ClassVar[Mapping[str, Any]] = {}
    quick: bool = True
    seed: int = 0

    @classmethod
    def full(cls, **changed: Any) -> Self:
        """The full table."""
        return cls(**{**cls.FULL, "quick": False, **changed})


Chosen = TypeVar("Chosen", bound=Settings)
RowMaker = Callable[[Method[Any, Any], float], dict[str, Any]]


class Bench(ABC, Generic[Chosen]):
    """A benchmark: which rows it makes, and how. What jobs need is loaded once, as cached properties named in ``loaded``."""

    task: ClassVar[Task]
    unit: ClassVar[str] = ""
    loaded: ClassVar[tuple[str, ...]] = ()
    # Whether its rows measure time, for which nothing may run beside them.
    timed: ClassVar[bool] = False

    def __init__(self, settings: Chosen, methods: Sequence[Method[Any, Any]] = ()):
        self.settings = settings
        self.methods = list(methods)

    def describe(self) -> dict[str, JsonValue]:
        """The settings as data."""
        told: dict[str, Any] = asdict(self.settings)
        told |= {"methods": [method.name for method in self.methods]} if "methods" in told else {}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in told.items()}

    @abstractmethod
    def measures(self) -> Mapping[str, Measure]:
        """What the values of its rows mean."""

    @abstractmethod
    def jobs(self) -> Iterable[Job]:
        """The rows to make."""

    def prepare(self) -> None:
        """Load what the jobs need, so that bad input ends the command and is not taken for a method's failure."""
        for name in self.loaded:
            getattr(self, name)

    def release(self) -> None:
        """Let go of models and data."""
        for name in self.loaded:
            self.__dict__.pop(name, None)

    def job(self, subject: str, method: Method[Any, Any], size: float, row: RowMaker) -> Job:
        """The row that ``row(method, size)`` makes, with the seed and what the method is."""

        def work() -> dict[str, Any]:
            torch.manual_seed(self.settings.seed)
            made = row(method, size)
            told = {"explanation": method.explanation} | made.get("settings", {})
            return made | {"seed": self.settings.seed, "settings": told}

        return Job(self.task, subject, method.name, work, size, self.unit, method.ours)


@dataclass(frozen=True)
class ModelSettings(Settings):
    """Of a benchmark of methods on one model. ``bits``: the sizes that they are asked for."""

    model: str = "smollm2-135m"
    text: str = "wikipedia"
    bits: tuple[float, ...] = ()
    methods: tuple[str, ...] | None = None


Sized = TypeVar("Sized", bound=ModelSettings)


class ModelBench(Bench[Sized]):
    """Methods at several sizes on one model, which is loaded when the first row needs it."""

    def __init__(self, settings: Sized, methods: Registry[Any]):
        if not settings.bits or min(settings.bits) <= 0:
            raise TensorNetError(f"{self.unit.replace('/', ' per ')} must be positive, were given {list(settings.bits)}")
        super().__init__(settings, methods.choose(settings.methods))
        self.source = find_model(settings.model)
        self.text = find_text(settings.text)

    @cached_property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        return self.source.tokenizer()

    def jobs(self) -> Iterator[Job]:
        """Every method at every size."""
        for method in self.methods:
            for bits in sorted(self.settings.bits, reverse=True):
                yield self.job(self.settings.model, method, bits, self.row)

    @abstractmethod
    def row(self, method: Method[Any, Any], bits: float) -> dict[str, Any]:
        """One method at one size."""


def run(
    benches: Mapping[str, Bench[Any]],
    command: str,
    path: Path | None,
    resume: bool,
    progress: Progress,
    say: Callable[[str], None] = lambda line: None,
    overwrite: bool = False,
    only: str = "",
    apart: RowsApart | None = None,
) -> Result:
    """All jobs of all benchmarks, in order, into one result; ``only`` those whose ``subject: method`` the expression matches.
    ``apart``: rows that measure no time are made by other processes.

    Raises:
        TensorNetError: bad input, or a result file that does not fit; a method that fails is a skipped row.
    """
    began = perf_counter()
    try:
        wanted = re.compile(only)
    except re.error as error:
        raise TensorNetError(f"{only!r} is no regular expression ({error})") from error
    settings: dict[str, JsonValue] = {name: bench.describe() for name, bench in benches.items()}
    measures: dict[str, Measure] = {}
    for bench in benches.values():
        for measure, meaning in bench.measures().items():
            if measures.setdefault(measure, meaning) != meaning:
                raise ValueError(f"two benchmarks mean different things by {measure!r}")
    threads: JsonValue = torch.get_num_threads()
    result = start(f"bench {' '.join(benches)}", command, settings | {"threads": threads}, measures, path, resume, overwrite)
    harness = Harness(result, path, progress, say)
    for name, bench in benches.items():
        jobs = [job for job in bench.jobs() if wanted.search(f"{job.subject}: {job.method}")]
        if apart is None or bench.timed:
            harness.run(name, jobs, bench.prepare)
        else:
            harness.run(name, jobs, make=partial(apart.make, bench))
        bench.release()
    return harness.finish(perf_counter() - began)


@dataclass(frozen=True)
class RowsApart:
    """Rows made by ``workers`` processes of this machine, or by those of a ``cluster``; those of one method on one subject by
    the same, as they share what is computed first. ``plugins``: files to load there too; ``install``: whether peers may be
    installed."""

    workers: int | None = None
    cluster: str = "processes"
    plugins: tuple[Path, ...] = ()
    install: bool = True

    def __post_init__(self) -> None:
        cluster_kind(self.cluster)

    def make(self, bench: Bench[Any], jobs: Sequence[Job], receive: Callable[[Row], None]) -> None:
        """Make the rows of jobs of a benchmark; see ``RowsMaker``."""
        groups: dict[tuple[str, str], list[Job]] = {}
        for job in jobs:
            groups.setdefault((job.subject, job.method), []).append(job)
        tasks = [(self, type(bench), bench.settings, [job.key for job in group]) for group in groups.values()]

        def arrived(_number: int, rows: list[Row]) -> None:
            for row in rows:
                receive(row)

        # Rows set what is global in a process.
        with cluster(self.cluster):
            run_jobs(_rows, tasks, self.workers, arrived)


def _rows(task: tuple[RowsApart, type[Bench[Any]], Settings, list[Any]]) -> list[Row]:
    how, kind, settings, keys = task
    _with_plugins(how.plugins)
    SIDE.install = how.install
    wanted = {job.key: job for job in _prepared(kind, settings).jobs()}
    return [row_of(wanted[key]) for key in keys]


@cache
def _with_plugins(files: tuple[Path, ...]) -> None:
    load_plugins(files)


@lru_cache(maxsize=1)
def _prepared(kind: type[Bench[Any]], settings: Settings) -> Bench[Any]:
    """A benchmark in a worker, which keeps it for its next rows."""
    bench = kind(settings)
    bench.prepare()
    return bench


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

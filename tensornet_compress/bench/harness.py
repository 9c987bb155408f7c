"""The harness: jobs in, rows out, written as they come.

Measures that several benchmarks have stand here: a name means the same in all of them, so that their rows fit one result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from math import isfinite
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

from pydantic import JsonValue

from tensornet_compress.bench.peer_packages import reason
from tensornet_compress.errors import TensorNetError
from tensornet_compress.progress import Progress, SilentProgress
from tensornet_compress.report import Measure, Result, Row, read_result, write_result
from tensornet_compress.report.joined import widened
from tensornet_compress.report.made import this_machine
from tensornet_compress.report.schema import Role, Task
from tensornet_compress.version import __version__


def lower(title: str, unit: str = "", explanation: str = "", role: Role | None = None) -> Measure:
    """A measure of which less is better."""
    return Measure(title=title, unit=unit, better="lower", explanation=explanation, role=role)


SECONDS = lower(
    "seconds", "s", "Processor time of the row, evaluation included; what rows share is counted in the first of them."
)
STORED = lower(
    "stored bytes",
    "bytes",
    "Everything: cores, scales, zero points and packed orders; of a model also what was left alone, in fp32.",
)
ERROR = lower(
    "relative error",
    explanation="Measured, Frobenius, of a model over all compressed weights; missing where bytes are only predicted.",
)


@dataclass(frozen=True)
class Job:
    """One row to make. ``work`` gives the fields of the row beside those named here; ``Unavailable`` and any other exception
    make it a skipped row with the reason."""

    task: Task
    subject: str
    method: str
    work: Callable[[], dict[str, Any]]
    budget: float | None = None
    budget_unit: str = ""
    ours: bool = False

    @property
    def key(self) -> tuple[str, str, str, float | None]:
        """As ``Row.key``."""
        return (self.task, self.subject, self.method, self.budget)


RowsMaker = Callable[[Sequence[Job], Callable[[Row], None]], None]
"""Makes the rows of jobs, and hands on each as it comes."""


def in_turn(jobs: Sequence[Job], receive: Callable[[Row], None]) -> None:
    """Make rows in this process, one after the other."""
    for job in jobs:
        receive(row_of(job))


def row_of(job: Job) -> Row:
    """The row that a job makes, skipped with the reason where it fails."""
    told = ("task", "subject", "method", "ours", "budget", "budget_unit")
    common: dict[str, Any] = {name: getattr(job, name) for name in told}
    began, clock = process_time(), perf_counter()
    try:
        made = job.work()
    except Exception as error:  # A peer may raise anything, and its row must say so.
        return Row.model_validate(common | {"skipped": reason(error)})
    # Where time is what is measured, the row's own would be mistaken for it.
    spent = {} if job.task == "speed" else {"seconds": process_time() - began}
    values = spent | made.pop("values")
    settings = {"wall_seconds": round(perf_counter() - clock, 3)} | made.pop("settings", {})
    if wild := [name for name, value in values.items() if not isfinite(value)]:
        return Row.model_validate(common | {"skipped": f"its {', '.join(wild)} came out as infinite or no number"})
    return Row.model_validate(common | made | {"values": values, "settings": settings})


@dataclass
class Harness:
    """Runs jobs into one result. ``path``: the result file, rewritten after every row; ``say`` gets a line for every row."""

    result: Result
    path: Path | None = None
    progress: Progress = field(default_factory=SilentProgress)
    say: Callable[[str], None] = lambda line: None

    def run(
        self,
        title: str,
        jobs: Sequence[Job],
        prepare: Callable[[], object] = lambda: None,
        make: RowsMaker = in_turn,
    ) -> None:
        """Make the rows that the result lacks by ``make``; a skipped row is tried again. ``prepare`` is
        called before the first one, and its errors end the run."""
        done = {row.key for row in self.result.rows if row.skipped is None}
        waiting = [job for job in jobs if job.key not in done]
        if len(waiting) < len(jobs):
            self.say(f"{title}: {len(jobs) - len(waiting)} of {len(jobs)} rows are in the file already")
        if not waiting:
            return
        prepare()
        with self.progress.stage(title, len(waiting)) as advance:

            def receive(row: Row) -> None:
                self.record(row)
                advance()

            make(waiting, receive)

    def record(self, row: Row) -> None:
        """Add a row and write the file."""
        self._keep(self.result.with_row(row))
        self.say(describe(row))

    def finish(self, seconds: float) -> Result:
        """Mark the result as complete."""
        self._keep(self.result.model_copy(update={"complete": True, "seconds": (self.result.seconds or 0.0) + seconds}))
        return self.result

    def _keep(self, result: Result) -> None:
        self.result = result
        if self.path is not None:
            write_result(result, self.path)


def start(
    name: str,
    command: str,
    settings: dict[str, JsonValue],
    measures: dict[str, Measure],
    path: Path | None,
    resume: bool,
    overwrite: bool = False,
) -> Result:
    """A fresh result, or the one in ``path`` to go on with. One to ``overwrite`` stays until the first row takes its place.

    Raises:
        TensorNetError: ``path`` is no result, exists without ``resume``, or was made with other settings.
    """
    fresh = Result(
        name=name,
        command=command,
        version=__version__,
        made=datetime.now(UTC).isoformat(timespec="seconds"),
        machine=this_machine(),
        settings=settings,
        measures={"seconds": SECONDS} | measures,
        complete=False,
    )
    if path is None or not path.exists() or (overwrite and not resume):
        return fresh
    if not resume:
        raise TensorNetError(
            f"{str(path)!r} exists; pass --resume to go on with it, --overwrite to replace it, or another file"
        )
    stored = read_result(path)
    both, changed = widened(stored.settings, settings)
    if changed:
        raise TensorNetError(f"{str(path)!r} was made with other settings ({'; '.join(changed)}); drop --resume or change them")
    kept = {"rows": stored.rows, "seconds": stored.seconds, "made": stored.made, "settings": both}
    return fresh.model_copy(update=kept | {"measures": stored.measures | fresh.measures})


def describe(row: Row) -> str:
    """One line for a row."""
    size = "" if row.budget is None else f" {row.budget:g}"
    head = f"{row.subject}: {row.method}{size}"
    if row.skipped is not None:
        return f"{head}: skipped, {row.skipped}"
    shown = [
        f"{name} {value:,.0f}" if name.endswith("nbytes") else f"{name} {value:.4g}"
        for name, value in row.values.items()
        if name != "seconds"
    ]
    spent = f" ({row.values['seconds']:.1f} s)" if "seconds" in row.values else ""
    return f"{head}: {', '.join(shown)}{spent}"

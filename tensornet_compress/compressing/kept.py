"""Results of jobs as files, so that a compression that was killed does not make them again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, TypeVar

import torch

from tensornet_compress.compressing.jobs import Job, Made, Surveyed
from tensornet_compress.compressing.workers import run_jobs
from tensornet_compress.files.single import load_network, save_network
from tensornet_compress.files.steps import Steps
from tensornet_compress.memory import trim
from tensornet_compress.options import Option
from tensornet_compress.tensor import NetworkSpec

Task = TypeVar("Task")
Result = TypeVar("Result")


def kept_jobs(
    work: Callable[[Task], Result],
    tasks: Sequence[Task],
    workers: int | None,
    advance: Callable[[], None],
    read: Callable[[int], Result | None],
    keep: Callable[[int, Result], None],
) -> list[Result]:
    """``run_jobs`` for those tasks of which ``read(number)`` knows nothing yet; results are given to ``keep`` as they come."""
    known = {number: read(number) for number in range(len(tasks))}
    missing = [number for number, result in known.items() if result is None]
    for _ in range(len(tasks) - len(missing)):
        advance()

    def receive(place: int, result: Result) -> None:
        known[missing[place]] = result
        keep(missing[place], result)
        trim()
        advance()

    # What calibration, and then jobs, have freed is wanted by others: each thread keeps some of that for itself.
    trim()
    run_jobs(work, [tasks[number] for number in missing], workers, receive)
    return [known[number] for number in range(len(tasks))]  # type: ignore[misc]


class SurveyFiles:
    """What layers may become, by job."""

    def __init__(self, steps: Steps):
        self.steps = steps

    def read(self, number: int) -> list[Surveyed] | None:
        """Of an earlier run; None if it did not come so far."""
        known = self.steps.found(f"survey-{number}")
        return None if known is None else [_surveyed(layer) for layer in known]

    def keep(self, number: int, layers: Sequence[Surveyed]) -> None:
        """Record it."""
        if self.steps.lasting:
            self.steps.finish(f"survey-{number}", [_told(layer) for layer in layers])


class MadeFiles:
    """Networks of a round, by job; ``wanted``: their specs."""

    def __init__(self, steps: Steps, number: int, tasks: Sequence[tuple[Job, Sequence[NetworkSpec]]]):
        self.steps, self.round, self.tasks = steps, number, tasks

    def read(self, number: int) -> list[Made] | None:
        """Of an earlier run; None if it did not come so far, or wanted others."""
        known = self.steps.found(self._step(number))
        wanted = [spec.to_json() for spec in self.tasks[number][1]]
        if known is None or known["specs"] != wanted:
            return None
        files = [self.steps.folder / name for name in known["files"]]
        layers = self.tasks[number][0].layers
        return [Made(layer.name, load_network(file), error) for layer, file, error in zip(layers, files, known["errors"])]

    def keep(self, number: int, made: Sequence[Made]) -> None:
        """Record them."""
        if self.steps.lasting:
            files = [self.steps.folder / f"{self._step(number)}-{place}.safetensors" for place in range(len(made))]
            for done, file in zip(made, files):
                save_network(done.network, file)
            specs = [spec.to_json() for spec in self.tasks[number][1]]
            given = {"specs": specs, "files": [file.name for file in files], "errors": [done.error for done in made]}
            self.steps.finish(self._step(number), given, files)

    def _step(self, number: int) -> str:
        return f"make-{self.round}-{number}"


def _told(layer: Surveyed) -> dict[str, Any]:
    options = [asdict(option) | {"spec": option.spec.to_json()} for option in layer.options]
    return {name: getattr(layer, name) for name in ("name", "shape", "energy", "price", "unit", "coded")} | {
        "dtype": str(layer.dtype).removeprefix("torch."),
        "options": options,
        "squares": None if layer.squares is None else layer.squares.tolist(),
    }


def _surveyed(known: dict[str, Any]) -> Surveyed:
    squares = known["squares"]
    return Surveyed(
        **{name: known[name] for name in ("name", "energy", "price", "unit")},
        shape=tuple(known["shape"]),
        dtype=getattr(torch, known["dtype"]),
        coded=[(bits, error) for bits, error in known["coded"]],
        options=[Option(**(option | {"spec": NetworkSpec.from_json(option["spec"])})) for option in known["options"]],
        squares=None if squares is None else torch.tensor(squares, dtype=torch.float64),
    )

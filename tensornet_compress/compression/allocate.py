"""Predict, allocate, realise, and allocate again where predictions were off."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from tensornet_compress.budget import (
    Option,
    Realised,
    choose_options,
    pareto,
    realise_layer,
    uniform_options,
)
from tensornet_compress.compression.clock import Clock
from tensornet_compress.compression.options import Allocator, Method
from tensornet_compress.compression.sizes import Sizes
from tensornet_compress.compression.survey import ModelSurvey
from tensornet_compress.jobs import run_jobs

_MISPREDICTED = 0.1
_ROUNDS = 3


@dataclass
class _Front:
    """Options of one layer, whose predictions are corrected as families and formats are measured."""

    options: list[Option]
    corrections: dict[tuple[str, str], float] = field(default_factory=dict)

    def error(self, option: Option) -> float:
        return option.error * self.corrections.get(_kind(option), 1.0)

    def learn(self, option: Option, measured: float) -> bool:
        """Note a measured error; True when the prediction was off."""
        off = abs(measured - self.error(option)) > _MISPREDICTED * max(measured, self.error(option))
        self.corrections[_kind(option)] = measured / max(option.error, 1e-300)
        return off


def _kind(option: Option) -> tuple[str, str]:
    return option.family, option.spec.terms[0].formats[0].name


def allocate(
    survey: ModelSurvey,
    method: Method,
    sizes: Sizes,
    allocator: Allocator,
    workers: int | None,
    clock: Clock,
) -> tuple[list[Option], list[Realised]]:
    """Predict, allocate, realise, and allocate again where realised errors belie the predictions."""
    fronts = [_Front(_offered(layer.options, method)) for layer in survey.layers]
    weights = [survey.damage_weight(layer, allocator == "sensitivity") for layer in survey.layers]
    nbytes = [[option.nbytes for option in front.options] for front in fronts]
    done: dict[tuple[int, int], Realised] = {}
    picks: list[int] = []
    for number in range(_ROUNDS):
        damage = [[w * front.error(option) for option in front.options] for w, front in zip(weights, fronts)]
        if allocator == "uniform":
            share = sizes.allowed / sum(sizes.weights.values())
            picks = uniform_options(nbytes, damage, [share * sizes.weights[job.name] for job in survey.jobs])
        else:
            picks = choose_options(nbytes, damage, sizes.allowed)
        fresh = [(layer, pick) for layer, pick in enumerate(picks) if (layer, pick) not in done]
        tasks = [(survey.jobs[layer], fronts[layer].options[pick].spec) for layer, pick in fresh]
        with clock.stage("realise" if number == 0 else f"adjust {number}", len(tasks)) as advance:
            results = run_jobs(realise_layer, tasks, workers, advance)
        off = 0
        for (layer, pick), result in zip(fresh, results):
            done[layer, pick] = result
            off += fronts[layer].learn(fronts[layer].options[pick], result.error)
        if off == 0:
            break
    return [front.options[pick] for front, pick in zip(fronts, picks)], [done[i, pick] for i, pick in enumerate(picks)]


def _offered(options: Sequence[Option], method: Method) -> list[Option]:
    """The undominated options of a method: its own family, and dense floating point."""
    if method == "auto":
        return pareto(options)
    return pareto([o for o in options if o.family == method or (o.family == "dense" and o.is_float)])

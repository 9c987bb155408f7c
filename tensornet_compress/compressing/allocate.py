"""Predict, allocate, realise, measure, and allocate again with what was learned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import exp, log

from torch import Tensor

from tensornet_compress.calibrate import OperatingPoint
from tensornet_compress.compressing.clock import Clock
from tensornet_compress.compressing.knapsack import choose_options, uniform_options
from tensornet_compress.compressing.layer_jobs import Realised, realise_layer
from tensornet_compress.compressing.sizes import Sizes
from tensornet_compress.compressing.survey import ModelSurvey
from tensornet_compress.compressing.words import Allocator, Method
from tensornet_compress.compressing.workers import run_jobs
from tensornet_compress.nn import turned
from tensornet_compress.options import Option, pareto

_MISPREDICTED = 0.1
_CORRECTIONS = 3
_LARGEST_STEP = 16.0
_NO_ERROR = 1e-9


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


@dataclass(frozen=True)
class _Measured:
    """An allocation with the model's divergence under it, and each layer's derivative of that."""

    divergence: float
    derivative: dict[str, float]
    options: list[Option]
    realised: list[Realised]

    @property
    def has_networks(self) -> bool:
        return any(option.family != "dense" for option in self.options)


def _kind(option: Option) -> tuple[str, str]:
    return option.family, option.spec.terms[0].formats[0].name


class Allocation:
    """One allocation in the making: options of every layer, what their errors count, and what was realised so far."""

    def __init__(
        self, survey: ModelSurvey, method: Method, sizes: Sizes, allocator: Allocator, workers: int | None, clock: Clock
    ):
        self.survey, self.method, self.sizes, self.allocator = survey, method, sizes, allocator
        self.workers, self.clock = workers, clock
        self.fronts = [_Front(_offered(layer.options, method)) for layer in survey.layers]
        self.weights = [survey.damage_weight(layer, allocator == "sensitivity") for layer in survey.layers]
        self._done: dict[tuple[int, Option], Realised] = {}
        self._rounds = self._measurements = 0

    def solve(self) -> tuple[list[Option], list[Realised]]:
        """Allocate and realise, again while realised errors belie the predictions."""
        options: list[Option] = []
        for _ in range(_CORRECTIONS):
            options = [front.options[pick] for front, pick in zip(self.fronts, self._pick())]
            if not self._realise([pick for pick in enumerate(options) if pick not in self._done]):
                break
        return options, [self._done[pick] for pick in enumerate(options)]

    def refine(self, point: OperatingPoint, rounds: int) -> tuple[list[Option], list[Realised], list[float]]:
        """Allocate with sensitivities measured anew at the compressed model, ``rounds`` times; the allocation of least
        divergence wins. Also gives the divergence of each.

        Networks beside dense integers have to prove themselves: unless the model diverges less with them than with the best
        allocation of dense layers alone, they are dropped."""
        best = current = self._measured(point)
        history = [best.divergence]
        networks, dense = self.fronts, self._dense_fronts()
        if self.method == "auto" and best.has_networks and self._fits(dense):
            self.fronts = dense
            plain = self._measured(point)
            history.append(plain.divergence)
            if plain.divergence <= best.divergence:
                best = current = plain
            else:
                self.fronts = networks
        for _ in range(rounds):
            self._learn(current)
            current = self._measured(point)
            history.append(current.divergence)
            best = min(best, current, key=lambda measured: measured.divergence)
        return best.options, best.realised, history

    def _dense_fronts(self) -> list[_Front]:
        return [
            _Front(pareto([o for o in layer.options if o.family == "dense"]), front.corrections)
            for layer, front in zip(self.survey.layers, self.fronts)
        ]

    def _fits(self, fronts: Sequence[_Front]) -> bool:
        return sum(min(option.nbytes for option in front.options) for front in fronts) <= self.sizes.allowed

    def _measured(self, point: OperatingPoint) -> _Measured:
        options, realised = self.solve()
        with self.clock.stage(f"measure {self._measurements}", 1):
            divergence, derivative = point.measure(self._module_weights(realised))
        self._measurements += 1
        return _Measured(divergence, derivative, options, realised)

    def _pick(self) -> list[int]:
        nbytes = [[option.nbytes for option in front.options] for front in self.fronts]
        damage = [[w * front.error(option) for option in front.options] for w, front in zip(self.weights, self.fronts)]
        if self.allocator != "uniform":
            return choose_options(nbytes, damage, self.sizes.allowed)
        share = self.sizes.allowed / sum(self.sizes.weights.values())
        return uniform_options(nbytes, damage, [share * self.sizes.weights[job.name] for job in self.survey.jobs])

    def _realise(self, fresh: list[tuple[int, Option]]) -> int:
        """Make networks; the number whose error was not as predicted."""
        tasks = [(self.survey.jobs[layer], option.spec) for layer, option in fresh]
        with self.clock.stage("realise" if self._rounds == 0 else f"realise {self._rounds}", len(tasks)) as advance:
            results = run_jobs(realise_layer, tasks, self.workers, advance)
        self._rounds += 1
        off = 0
        for (layer, option), result in zip(fresh, results):
            self._done[layer, option] = result
            off += self.fronts[layer].learn(option, result.error)
        return off

    def _module_weights(self, realised: Sequence[Realised]) -> dict[str, Tensor]:
        """Dense weights as the modules store them."""
        dense = {}
        for target, done in zip(self.survey.chosen, realised):
            dense[target.name] = turned(done.network.to_dense(), target.kind)
        return dense

    def _learn(self, measured: _Measured) -> None:
        """Move what errors count half way, on a logarithmic scale, to what was measured; layers without an error, or
        that were not called, follow the others' mean."""
        steps: list[float | None] = []
        for weight, layer, done in zip(self.weights, self.survey.layers, measured.realised):
            if done.error <= _NO_ERROR * layer.energy or weight <= 0 or not measured.derivative[layer.name]:
                steps.append(None)
                continue
            seen = measured.derivative[layer.name] / (2 * done.error)
            steps.append(log(min(max(seen / weight, 1 / _LARGEST_STEP), _LARGEST_STEP)) / 2)
        known = [step for step in steps if step is not None]
        mean = sum(known) / len(known) if known else 0.0
        self.weights = [w * exp(mean if step is None else step) for w, step in zip(self.weights, steps)]


def _offered(options: Sequence[Option], method: Method) -> list[Option]:
    """The undominated options of a method: its own family, and dense floating point."""
    if method == "auto":
        return pareto(options)
    return pareto([o for o in options if o.family == method or (o.family == "dense" and o.is_float)])

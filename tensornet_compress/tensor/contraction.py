"""Contraction programs: planned once by opt_einsum, replayed as pairwise ``torch.einsum`` calls.

Replaying pairs keeps ``torch.compile(fullgraph=True)`` and autograd working, which ``opt_einsum.contract`` does not.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any

import opt_einsum
import torch
from opt_einsum.paths import DynamicProgramming
from torch import Tensor

from tensornet_compress.errors import TensorNetError

Labels = tuple[str, ...]
_LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
_MOST_PARTS = 1 << 20
"""Connected sets of operands up to which all orders are weighed."""


@dataclass(frozen=True)
class Step:
    """Contract operands ``left`` and ``right`` (removed from the list, ``right > left``) and append the result."""

    left: int
    right: int
    equation: str


@dataclass(frozen=True)
class Program:
    """A planned contraction: pairwise steps and what they cost for the planned sizes."""

    steps: tuple[Step, ...]
    multiply_adds: int
    largest_intermediate: int

    def run(self, operands: Sequence[Tensor]) -> Tensor:
        """Replay on operands in planned order."""
        stack = list(operands)
        for step in self.steps:
            # Slices, because list.pop refuses the symbolic numbers that torch.compile(dynamic=True) makes of plain ones.
            first, last = step.left, step.right
            chosen = stack[first : first + 1] if first == last else [stack[first], stack[last]]
            stack = stack[:first] + stack[first + 1 : last] + stack[last + 1 :]
            stack.append(torch.einsum(step.equation, *chosen))
        return stack[0]


def plan_contraction(
    inputs: Sequence[Labels],
    output: Labels,
    sizes: dict[str, int],
    max_intermediate: int | None = None,
    last: int | None = None,
    quick: bool = False,
) -> Program:
    """The cheapest pairwise program whose largest intermediate stays within ``max_intermediate`` numbers.

    Several opt_einsum orders compete (fewest multiply-adds, smallest intermediates, greedy); with ``last``, the order that
    contracts operand ``last`` after all others (rebuild the weight, then apply it) competes too. When no order stays within
    the bound, the one with the smallest largest intermediate is taken. ``quick`` tries the greedy order only, where one
    contraction is not worth the search for another.
    """
    key_sizes = tuple(sorted((label, sizes[label]) for label in {label for labels in inputs for label in labels}))
    return _plan(tuple(inputs), output, key_sizes, max_intermediate, last, quick)


@lru_cache(maxsize=4096)
def _plan(
    inputs: tuple[Labels, ...],
    output: Labels,
    size_items: tuple[tuple[str, int], ...],
    max_intermediate: int | None,
    last: int | None,
    quick: bool,
) -> Program:
    sizes = dict(size_items)
    programs = [_compile(inputs, output, sizes, path) for path in _candidate_paths(inputs, output, sizes, quick)]
    if last is not None and len(inputs) > 2:
        others = [labels for i, labels in enumerate(inputs) if i != last]
        kept = tuple(sorted({label for labels in others for label in labels} & (set(output) | set(inputs[last]))))
        for path in _candidate_paths(tuple(others), kept, sizes, quick):
            programs.append(_compile(inputs, output, sizes, _defer(path, last, len(inputs))))
    within = [p for p in programs if max_intermediate is None or p.largest_intermediate <= max_intermediate]
    if within:
        return min(within, key=lambda p: (p.multiply_adds, p.largest_intermediate))
    return min(programs, key=lambda p: (p.largest_intermediate, p.multiply_adds))


def _candidate_paths(
    inputs: tuple[Labels, ...], output: Labels, sizes: dict[str, int], quick: bool
) -> list[list[tuple[int, ...]]]:
    if len(inputs) == 1:
        return [[(0,)]]
    symbols = {label: opt_einsum.get_symbol(i) for i, label in enumerate(sorted(sizes))}
    equation = ",".join("".join(symbols[label] for label in labels) for labels in inputs)
    equation += "->" + "".join(symbols[label] for label in output)
    shapes = [tuple(sizes[label] for label in labels) for labels in inputs]
    optimizers: list[Any] = ["greedy"]
    if not quick and _connected_parts(inputs) <= _MOST_PARTS:
        optimizers = [DynamicProgramming(minimize="flops"), DynamicProgramming(minimize="size"), "greedy"]
    if not quick and len(inputs) <= 5:
        optimizers.append("optimal")
    paths: list[list[tuple[int, ...]]] = []
    for optimizer in optimizers:
        path = list(opt_einsum.contract_path(equation, *shapes, shapes=True, optimize=optimizer)[0])
        if all(len(step) <= 2 for step in path) and path not in paths:
            paths.append(path)
    return paths


def _connected_parts(inputs: tuple[Labels, ...]) -> int:
    """About how many connected sets of operands dynamic programming would look at, counted in a spanning tree."""
    owners: dict[str, list[int]] = {}
    for number, labels in enumerate(inputs):
        for label in labels:
            owners.setdefault(label, []).append(number)
    parent, order = {0: 0}, [0]
    for number in order:
        for other in (other for label in inputs[number] for other in owners[label]):
            if other not in parent:
                parent[other] = number
                order.append(other)
    sets = dict.fromkeys(order, 1)
    for number in reversed(order[1:]):
        sets[parent[number]] = min(sets[parent[number]] * (1 + sets[number]), 1 << 60)
    return sum(sets.values())


def _defer(path: Iterable[tuple[int, ...]], last: int, count: int) -> list[tuple[int, ...]]:
    """A path over all operands but ``last`` -> a path over all of them that contracts ``last`` at the end."""
    names: list[int] = [i for i in range(count) if i != last]
    everyone = list(range(count))
    fresh = count
    result: list[tuple[int, ...]] = []
    for step in path:
        chosen = [names[i] for i in step]
        result.append(tuple(sorted(everyone.index(name) for name in chosen)))
        for name in chosen:
            names.remove(name)
            everyone.remove(name)
        names.append(fresh)
        everyone.append(fresh)
        fresh += 1
    return [*result, (0, 1)]


def _compile(inputs: tuple[Labels, ...], output: Labels, sizes: dict[str, int], path: Sequence[tuple[int, ...]]) -> Program:
    stack = list(inputs)
    steps: list[Step] = []
    multiply_adds = largest = 0
    for number, chosen in enumerate(path):
        pair = sorted(chosen)
        operands = [stack[i] for i in pair]
        for i in reversed(pair):
            stack.pop(i)
        needed = set(output).union(*stack)
        seen = list(dict.fromkeys(label for labels in operands for label in labels))
        result = output if number == len(path) - 1 else tuple(label for label in seen if label in needed)
        steps.append(Step(pair[0], pair[-1], _local_equation(operands, result, seen)))
        multiply_adds += prod(sizes[label] for label in seen)
        if number < len(path) - 1:
            largest = max(largest, prod(sizes[label] for label in result))
        stack.append(result)
    return Program(tuple(steps), multiply_adds, largest)


def _local_equation(operands: Sequence[Labels], result: Labels, seen: Sequence[str]) -> str:
    """An einsum equation with letters given afresh, since one step never has more than 52 labels."""
    if len(seen) > len(_LETTERS):
        raise TensorNetError(f"a contraction step of {len(seen)} indices; at most {len(_LETTERS)} can be")
    letters = dict(zip(seen, _LETTERS))
    terms = ["".join(letters[label] for label in labels) for labels in operands]
    return ",".join(terms) + "->" + "".join(letters[label] for label in result)

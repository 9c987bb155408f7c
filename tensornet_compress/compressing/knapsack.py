"""Multiple-choice knapsack: one option per layer, least total damage within the bytes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_matrix

from tensornet_compress.errors import BudgetError


def choose_options(nbytes: Sequence[Sequence[int]], damage: Sequence[Sequence[float]], max_bytes: int) -> list[int]:
    """Index of the chosen option of each layer: least summed ``damage`` with summed ``nbytes`` at most ``max_bytes``.

    Solved by HiGHS (scipy) to a relative gap of 1e-4; deterministic.

    Raises:
        BudgetError: even the smallest options are too large together.
    """
    smallest = sum(min(sizes) for sizes in nbytes)
    if smallest > max_bytes:
        raise BudgetError(
            f"the budget leaves {max_bytes:,} bytes for the targeted layers, their smallest options take {smallest:,}; "
            "raise the budget, or target more layers"
        )
    flat_bytes = np.array([size for sizes in nbytes for size in sizes], dtype=float)
    flat_damage = np.array([value for values in damage for value in values], dtype=float)
    owner = np.concatenate([np.full(len(sizes), layer) for layer, sizes in enumerate(nbytes)])
    count = len(flat_bytes)
    choose_one = coo_matrix((np.ones(count), (owner, np.arange(count))), shape=(len(nbytes), count))
    scale = max(float(flat_damage.max()), 1e-300)
    result = milp(
        flat_damage / scale,
        integrality=np.ones(count, dtype=np.int64),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(choose_one.tocsr(), 1, 1),
            LinearConstraint((flat_bytes / max_bytes)[None, :], -np.inf, 1.0 - 1e-9),
        ],
        options={"mip_rel_gap": 1e-4, "node_limit": 2000},
    )
    if result.x is None:
        raise BudgetError(f"no allocation of {max_bytes:,} bytes was found: {result.message}")
    picked = result.x > 0.5
    starts = np.concatenate([[0], np.cumsum([len(sizes) for sizes in nbytes])])
    chosen = [int(np.flatnonzero(picked[a:b])[0]) for a, b in pairwise(starts)]
    return _spend_rest(_shed_excess(chosen, nbytes, damage, max_bytes), nbytes, damage, max_bytes)


def _shed_excess(
    chosen: list[int], nbytes: Sequence[Sequence[int]], damage: Sequence[Sequence[float]], max_bytes: int
) -> list[int]:
    """Cheapest downgrades until the bytes fit: the solver's own tolerance is relative, a budget is exact."""
    chosen = list(chosen)
    while sum(sizes[pick] for sizes, pick in zip(nbytes, chosen)) > max_bytes:
        _, layer, option = min(
            (damage[layer][option] - damage[layer][pick], layer, option)
            for layer, pick in enumerate(chosen)
            for option, size in enumerate(nbytes[layer])
            if size < nbytes[layer][pick]
        )
        chosen[layer] = option
    return chosen


def _spend_rest(
    chosen: list[int], nbytes: Sequence[Sequence[int]], damage: Sequence[Sequence[float]], max_bytes: int
) -> list[int]:
    """Greedy upgrades with the bytes that the solver left inside its gap."""
    left = max_bytes - sum(sizes[pick] for sizes, pick in zip(nbytes, chosen))
    while True:
        best: tuple[float, int, int] | None = None
        for layer, pick in enumerate(chosen):
            for option, size in enumerate(nbytes[layer]):
                extra = size - nbytes[layer][pick]
                gain = damage[layer][pick] - damage[layer][option]
                if extra <= left and gain > 0 and (best is None or gain > best[0]):
                    best = (gain, layer, option)
        if best is None:
            return chosen
        _, layer, option = best
        left -= nbytes[layer][option] - nbytes[layer][chosen[layer]]
        chosen[layer] = option


def uniform_options(nbytes: Sequence[Sequence[int]], damage: Sequence[Sequence[float]], shares: Sequence[float]) -> list[int]:
    """The least damaging option of each layer within that layer's own share of the bytes (the baseline allocator).

    Raises:
        BudgetError: a layer has no option within its share.
    """
    chosen = []
    for layer, (sizes, values, share) in enumerate(zip(nbytes, damage, shares)):
        fitting = [option for option, size in enumerate(sizes) if size <= share]
        if not fitting:
            raise BudgetError(f"layer {layer} may take {share:,.0f} bytes, its smallest option takes {min(sizes):,}")
        chosen.append(min(fitting, key=lambda option: values[option]))
    return chosen

"""Known networks: identities, Kronecker products, hidden pairs and planted trees, found and timed.

    PYTHONPATH=.peers python benchmarks/search_trees.py [--seeds 5] [--modes 12 14 16] [--growth 6 8 10 12 14]

The search keeps a relative error of 1e-5 in fp32; numbers are those stored, beside those of the network that was planted (its
own cores, unmerged) and of the tree that TTNOpt finds (left out, with the reason, where it is not installed):
after the fewest sweeps that reach the size it has after ten, which is the time that counts. ``ours_seconds`` is the whole
search; ``tree_seconds`` one that only looks at trees, as TTNOpt does. ``growth``: processor seconds on hidden pairs of growing
sizes (medians), TTNOpt with a single sweep, the least it can do, whether that is enough or not, and with the five that its
``run`` makes where nothing else is asked for.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from statistics import median
from time import perf_counter, process_time
from typing import Any

import torch
from common import write_result
from torch import Tensor

import tensornet_compress as tnc
from tensornet_compress.bench.peers.search.ttnopt import available, optimal_tree
from tensornet_compress.options.offered import SearchFamily

ERROR = 1e-5
CUT = 1e-6
REPEATS = 15
SWEEPS = (1, 2, 3, 4, 5, 7, 10)
USUAL_SWEEPS = 5


def identity(order: tuple[int, ...]) -> Tensor:
    return torch.eye(64).reshape(8, 8, 8, 8).permute(order).contiguous()


def kronecker(seed: int, size: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(size, size, generator=generator) for _ in range(2))
    order = torch.randperm(4, generator=generator).tolist()
    return torch.einsum("ac,bd->abcd", a, b).permute(order).contiguous()


def pairs(seed: int, size: int = 6) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.randn(size, size, generator=generator) for _ in range(3)]
    order = torch.randperm(6, generator=generator).tolist()
    return torch.einsum("ab,cd,ef->abcdef", *parts).permute(order).contiguous()


def planted(seed: int, modes: int, bond: int = 2, size: int = 2) -> tuple[Tensor, int]:
    """A random binary tree with its modes shuffled, and the numbers that its own cores hold."""
    generator = torch.Generator().manual_seed(1000 + seed)
    parts: list[tuple[list[int], Tensor]] = [([mode], torch.eye(size)) for mode in range(modes)]
    numbers = 0
    while len(parts) > 1:
        i, j = sorted(torch.randperm(len(parts), generator=generator)[:2].tolist())
        (left, a), (right, b) = parts[i], parts[j]
        last = len(parts) == 2
        wide = 1 if last else min(bond + (len(left) + len(right) > 3), a.shape[-1] * b.shape[-1])
        core = torch.randn(a.shape[-1], b.shape[-1], wide, generator=generator)
        numbers += core.numel()
        joined = torch.einsum("xa,yb,abc->xyc", a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1]), core)
        parts = [part for place, part in enumerate(parts) if place not in (i, j)]
        parts.append((left + right, joined.reshape(-1, wide)))
    order, tensor = parts[0]
    shaped = tensor.reshape([size] * modes)
    places = sorted(range(modes), key=order.__getitem__)
    shaped = shaped.permute(places).contiguous()
    return shaped / shaped.norm(), numbers


def search(tensor: Tensor, topologies: tuple[SearchFamily, ...]) -> tuple[tnc.SearchResult, float]:
    began = perf_counter()
    result = tnc.search(
        tensor,
        max_error=ERROR,
        formats=("fp32",),
        topologies=topologies,
        orderings=("mode",),
        null=False,
        time_budget=600,
    )
    return result, perf_counter() - began


def ours(tensor: Tensor) -> dict[str, Any]:
    result, seconds = search(tensor, tnc.searching.FAMILIES)
    only, tree_seconds = search(tensor, ("tree",))
    return {
        "ours_numbers": result.best.spec.terms[0].numbers,
        "ours_error": result.error,
        "ours_seconds": seconds,
        "tree_numbers": only.best.spec.terms[0].numbers,
        "tree_seconds": tree_seconds,
    }


def theirs(tensor: Tensor) -> dict[str, Any]:
    missing = available()
    if missing is not None:
        return {"ttnopt_skipped": missing}
    best = optimal_tree(tensor, CUT, SWEEPS[-1])
    for sweeps in SWEEPS:
        tree = optimal_tree(tensor, CUT, sweeps)
        if tree.merged_numbers <= best.merged_numbers:
            break
    return {
        "ttnopt_numbers": tree.numbers,
        "ttnopt_merged_numbers": tree.merged_numbers,
        "ttnopt_error": tree.error,
        "ttnopt_sweeps": sweeps,
        "ttnopt_seconds": tree.seconds,
    }


def growth(size: int) -> dict[str, Any]:
    """Processor seconds on three hidden pairs of this size, medians of repeats in turns (TTNOpt on large tensors: of one)."""
    tensor, few = pairs(0, size), size > 10
    row: dict[str, Any] = {"size": size, "entries": tensor.numel()}
    works: dict[str, Callable[[], int]] = {
        "tree": lambda: search(tensor, ("tree",))[0].best.spec.terms[0].numbers,
        "ours": lambda: search(tensor, tnc.searching.FAMILIES)[0].best.spec.terms[0].numbers,
    }
    if (missing := available()) is not None:
        row["ttnopt_skipped"] = missing
    else:
        works["ttnopt"] = lambda: optimal_tree(tensor, CUT, 1).merged_numbers
        works["ttnopt_usual"] = lambda: optimal_tree(tensor, CUT, USUAL_SWEEPS).merged_numbers
    seconds: dict[str, list[float]] = {name: [] for name in works}
    numbers: dict[str, int] = {}
    for repeat in range(REPEATS):
        for name, work in works.items():
            if not (few and repeat and name.startswith("ttnopt")):
                began = process_time()
                numbers[name] = work()
                seconds[name].append(process_time() - began)
    row |= {f"{name}_seconds": median(values) for name, values in seconds.items()}
    kind = {name: "merged_numbers" if name.startswith("ttnopt") else "numbers" for name in works}
    return row | {f"{name}_{kind[name]}": value for name, value in numbers.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--modes", type=int, nargs="+", default=[12, 14, 16])
    parser.add_argument("--growth", type=int, nargs="+", default=[6, 8, 10, 12, 14])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cases: list[tuple[str, Tensor, int]] = [
        (f"identity {order}", identity(order), 256) for order in ((0, 1, 2, 3), (2, 0, 3, 1), (3, 2, 1, 0), (0, 2, 1, 3))
    ]
    cases += [(f"Kronecker product, seed {seed}", kronecker(seed), 128) for seed in range(arguments.seeds)]
    for size in (6, 8, 10):
        known = 3 * size * size
        cases += [(f"hidden pairs of {size}, seed {seed}", pairs(seed, size), known) for seed in range(arguments.seeds)]
    for modes in arguments.modes:
        cases += [(f"planted tree of {modes} modes, seed {seed}", *planted(seed, modes)) for seed in range(arguments.seeds)]
    rows: list[dict[str, Any]] = []
    settings = {"error": ERROR, "threads": 1, "ttnopt_cut": CUT}
    ours(cases[0][1])
    grown = []
    for size in arguments.growth:
        grown.append(growth(size))
        print(grown[-1], flush=True)
    for name, tensor, known in cases:
        rows.append({"case": name, "known_numbers": known} | ours(tensor) | theirs(tensor))
        print(rows[-1], flush=True)
        write_result("search_trees", {"settings": settings, "growth": grown, "rows": rows})


if __name__ == "__main__":
    main()

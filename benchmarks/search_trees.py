"""Known networks: identities, Kronecker products, hidden pairs and planted trees, found and timed; beside TTNOpt.

    make peers
    PYTHONPATH=.peers python benchmarks/search_trees.py [--seeds 5]

TTNOpt (its structure optimisation for a given tensor, default schedule) starts from an exact train, as its own program does;
without it installed its columns are reported as skipped. Both sides keep a relative error of 1e-5; numbers are those stored.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import statistics
from time import perf_counter
from typing import Any

import numpy as np
import torch
from common import write_result
from torch import Tensor

import tensornet_compress as tnc

ERROR = 1e-5


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


def ours(tensor: Tensor) -> dict[str, Any]:
    began = perf_counter()
    result = tnc.search(tensor, max_error=ERROR, formats=("fp32",), orderings=("mode",), null=False, time_budget=600)
    seconds = perf_counter() - began
    return {"ours_numbers": result.best.spec.terms[0].numbers, "ours_error": result.error, "ours_seconds": seconds}


def ttnopt(tensor: Tensor) -> dict[str, Any]:
    try:
        from ttnopt.src import FactorizeTensor, TreeTensorNetwork
    except ImportError as error:
        return {"ttnopt": f"skipped: {error}"}
    target = tensor.double().numpy()
    target = target / np.linalg.norm(target)
    most = 4096
    began = perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        psi = TreeTensorNetwork.mps(target.ndim, target=target, max_bond_dimension=most)
        run = FactorizeTensor(psi, max_bond_dim=most)
        run.run(target=target, opt_structure=1, max_num_sweep=10, max_truncation_error=ERROR**2 / 10)
    seconds = perf_counter() - began
    numbers = sum(int(np.prod(t.shape)) for t in psi.tensors) + int(np.prod(psi.gauge_tensor.shape))
    fidelity = float(np.abs(next(reversed(run.fidelity.values()))))
    error = float(max(0.0, 1 - fidelity**2) ** 0.5)
    return {"ttnopt_numbers": numbers, "ttnopt_error": error, "ttnopt_seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--modes", type=int, nargs="+", default=[12, 14, 16])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cases: list[tuple[str, Tensor, int]] = [
        (f"identity {order}", identity(order), 256) for order in ((0, 1, 2, 3), (2, 0, 3, 1), (3, 2, 1, 0), (0, 2, 1, 3))
    ]
    cases += [(f"Kronecker product, seed {seed}", kronecker(seed), 128) for seed in range(arguments.seeds)]
    cases += [(f"hidden pairs, seed {seed}", pairs(seed), 108) for seed in range(arguments.seeds)]
    for modes in arguments.modes:
        cases += [(f"planted tree of {modes} modes, seed {seed}", *planted(seed, modes)) for seed in range(arguments.seeds)]
    rows: list[dict[str, Any]] = []
    for name, tensor, known in cases:
        rows.append({"case": name, "known_numbers": known} | ours(tensor) | ttnopt(tensor))
        print(rows[-1], flush=True)
        write_result("search_trees", {"settings": {"error": ERROR, "threads": 1}, "rows": rows})
    timed = [row["ours_seconds"] / row["ttnopt_seconds"] for row in rows if "ttnopt_seconds" in row]
    if timed:
        print("median of our seconds over TTNOpt's:", statistics.median(timed))


if __name__ == "__main__":
    main()

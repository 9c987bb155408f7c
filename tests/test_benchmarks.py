"""Scripts under benchmarks/: each can be imported, and what they compute themselves is right."""

from __future__ import annotations

import importlib
import re
from itertools import permutations
from math import factorial, log
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.documents import ROOT

SCRIPTS = sorted(path.stem for path in (ROOT / "benchmarks").glob("*.py"))


@pytest.fixture(autouse=True)
def _scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_can_be_imported(name: str) -> None:
    importlib.import_module(name)


@pytest.mark.parametrize("result", sorted((ROOT / "benchmarks" / "results").rglob("*.json")), ids=lambda path: path.name)
def test_results_name_no_folder_of_the_machine_that_made_them(result: Path) -> None:
    assert re.findall(r"/(?:tmp|root|home|work|Users|var|mnt)/[^\s\"]*", result.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("seed", range(4))
def test_orders_near_each_other_are_never_counted_too_low(seed: int) -> None:
    bound = importlib.import_module("order_bound")
    rows = np.random.default_rng(seed).normal(size=(6, 2)).cumsum(0)
    distances = ((rows[:, None] - rows) ** 2).sum(-1)
    totals = [sum(distances[i, j] for i, j in enumerate(order)) for order in permutations(range(6))]
    for most in np.quantile(totals, [0.02, 0.2, 0.7]):
        counted = sum(total <= most for total in totals)
        assert log(counted) <= bound.near_orders(distances, most) + 1e-9


def test_orders_of_fibres_far_apart_cost_all_their_bits() -> None:
    bound = importlib.import_module("order_bound")
    table = 100 * torch.eye(16, dtype=torch.float64)
    whole = log(factorial(16)) / log(256)
    # Rows have all their bits; columns of known rows too, of unknown rows none, as sorted they are all alike.
    assert 0.9 * whole <= bound.least_order_nbytes(table, 1e-3) <= whole
    assert bound.least_order_nbytes(torch.ones(5, 7), 0.01) == 0.0

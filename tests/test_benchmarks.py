"""Scripts under benchmarks/ can be imported and list their rows, what they compute themselves is right, results are whole."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterator
from itertools import permutations
from math import factorial, log
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from tensornet_compress.bench import methods  # noqa: F401
from tensornet_compress.bench.cache_case import CACHE_METHODS
from tensornet_compress.bench.weight_case import WEIGHT_METHODS, WeightCase
from tensornet_compress.report import Machine, Measure, Result, Row, read_result
from tests import models
from tests.documents import DOCUMENTS, ROOT

SCRIPTS = sorted(path.stem for path in (ROOT / "benchmarks").glob("*.py"))
RESULTS = sorted((ROOT / "benchmarks" / "results").rglob("*.json"))


@pytest.fixture(autouse=True)
def _scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


@pytest.fixture
def _plugged() -> Iterator[None]:
    """What a plug-in registers is taken out again."""
    registries = (WEIGHT_METHODS, CACHE_METHODS)
    before = [[method.name for method in registry] for registry in registries]
    yield
    sys.modules.pop("variants", None)
    for registry, names in zip(registries, before):
        for name in [method.name for method in registry if method.name not in names]:
            registry.remove(name)


@pytest.mark.usefixtures("_plugged")
@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_can_be_imported_and_its_rows_differ(name: str) -> None:
    module = importlib.import_module(name)
    keys = [job.key for job in module.jobs()] if hasattr(module, "jobs") else []
    assert len(keys) == len(set(keys))


@pytest.mark.usefixtures("_plugged")
def test_further_stages_keep_the_bytes_of_the_plan() -> None:
    importlib.import_module("variants")
    case = WeightCase(models.tiny_llama(), models.batches(), ["model.layers.1.*"])
    _ = case.kept, case.targets
    nbytes = {}
    for name in ("ours-dense", "ours-propagated", "ours-refined", "ours-healed", "ours-bf16", "ours-bf16-refined"):
        try:
            nbytes[name] = sum(cell.nbytes for cell in WEIGHT_METHODS[name].run(case, 9.6).layers)
        finally:
            case.put_back()
    assert nbytes["ours-dense"] == nbytes["ours-propagated"] == nbytes["ours-refined"] == nbytes["ours-healed"]
    assert nbytes["ours-bf16"] == nbytes["ours-bf16-refined"] <= 9.6 * case.weights / 8


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.name)
def test_results_are_of_the_one_schema_and_drawn_somewhere(path: Path) -> None:
    result = read_result(path)
    assert result.complete
    assert result.rows
    assert any(re.search(rf"<!-- (table |=){path.stem}\b", document.read_text(encoding="utf-8")) for document in DOCUMENTS)


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.name)
def test_results_name_no_folder_of_the_machine_that_made_them(path: Path) -> None:
    assert re.findall(r"/(?:tmp|root|home|work|Users|var|mnt)/[^\s\"]*", path.read_text(encoding="utf-8")) == []


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The maker of tables with one small result."""
    module = importlib.import_module("tables")
    measures = {"kl": Measure(title="KL", better="lower"), "bits": Measure(title="bits", unit="bits")}
    rows = [
        Row(
            task="weights",
            subject="m, seed 0",
            method="mine",
            ours=True,
            budget=4,
            budget_unit="bits/weight",
            values={"kl": 0.25},
        ),
        Row(
            task="weights",
            subject="m, seed 1",
            method="mine",
            ours=True,
            budget=4,
            budget_unit="bits/weight",
            values={"kl": 0.75},
        ),
        Row(
            task="weights",
            subject="m",
            method="theirs",
            budget=4,
            budget_unit="bits/weight",
            values={"kl": 1, "bits": 4.5},
            errors={"kl": 0.0625},
        ),
        Row(task="weights", subject="m", method="theirs", budget=3, budget_unit="bits/weight", skipped="too few"),
        Row(task="weights", subject="m", method="dense", values={"kl": 0}),
    ]
    machine = Machine(processor="p", cores=1, threads=1, python="3")
    result = Result(name="r", command="c", version="0", made="2026-01-01", machine=machine, measures=measures, rows=tuple(rows))
    module.lines.cache_clear()
    monkeypatch.setattr(module, "load", lambda name: result)
    yield module
    module.lines.cache_clear()


def test_a_table_has_means_over_seeds_sizes_and_what_could_not_run(tables: ModuleType) -> None:
    assert tables.table("r columns=budget values=kl size=bits best=yes").splitlines() == [
        "| method | 4 bits | 3 bits |",
        "| --- | --- | --- |",
        "| **mine** | 0.5 |  |",
        "| theirs | 1 (4.50) | cannot |",
        "| ours / best peer | 0.50 (theirs) |  |",
    ]
    by_method = "r rows=subject,budget columns=method values=kl also=theirs:bits methods='mine|theirs'"
    assert tables.table(by_method).splitlines()[2:] == ["| m | 4 bits | 0.5 | 1 | 4.5 |", "| m | 3 bits |  | cannot | cannot |"]
    assert tables.table("r rows=method,budget values=kl,bits order=theirs").splitlines()[2] == "| theirs | 4 bits | 1 | 4.5 |"


def test_a_table_has_errors_over_seeds_or_documents(tables: ModuleType) -> None:
    assert tables.table("r columns=budget values=kl size=bits errors=yes").splitlines()[2:] == [
        "| **mine** | 0.5 ± 0.2 |  |",
        "| theirs | 1 ± 0.06 (4.50) | cannot |",
    ]
    assert tables.table("r rows=method values=kl,bits errors=yes order=theirs").splitlines()[2] == "| theirs | 1 ± 0.06 | 4.5 |"


def test_a_figure_keeps_its_decimals_and_fits_one_row(tables: ModuleType) -> None:
    text = "off by 0.44<!-- =r | m | mine | 4 | kl --> and 1<!-- =r | m | mine | 4 | 1-kl -->"
    assert tables.filled(text) == "off by 0.50<!-- =r | m | mine | 4 | kl --> and 0<!-- =r | m | mine | 4 | 1-kl -->"
    with pytest.raises(SystemExit, match="fits 0 rows"):
        tables.filled("1<!-- =r | elsewhere | mine | 4 | kl -->")


@pytest.mark.parametrize("seed", range(4))
def test_orders_near_each_other_are_never_counted_too_low(seed: int) -> None:
    bound = importlib.import_module("search_orders")
    rows = np.random.default_rng(seed).normal(size=(6, 2)).cumsum(0)
    distances = ((rows[:, None] - rows) ** 2).sum(-1)
    totals = [sum(distances[i, j] for i, j in enumerate(order)) for order in permutations(range(6))]
    for most in np.quantile(totals, [0.02, 0.2, 0.7]):
        counted = sum(total <= most for total in totals)
        assert log(counted) <= bound.near_orders(distances, most) + 1e-9


def test_orders_of_fibres_far_apart_cost_all_their_bits() -> None:
    bound = importlib.import_module("search_orders")
    table = 100 * torch.eye(16, dtype=torch.float64)
    whole = log(factorial(16)) / log(256)
    # Rows have all their bits; columns of known rows too, of unknown rows none, as sorted they are all alike.
    assert 0.9 * whole <= bound.least_order_nbytes(table, 1e-3) <= whole
    assert bound.least_order_nbytes(torch.ones(5, 7), 0.01) == 0.0


@pytest.mark.parametrize("name", ["file-sizes", "scale"])
def test_pictures_are_drawn_from_the_results(name: str) -> None:
    pictures = importlib.import_module("pictures")
    assert pictures.path_of(name).read_text(encoding="utf-8") == pictures.drawn(name)


def test_a_recording_shows_what_a_terminal_showed_and_cuts_pauses_short() -> None:
    recording = importlib.import_module("recording")
    written = list(recording.recorded(["sh", "-c", "printf 'one\\r\\n'; sleep 0.3; printf '\\033[32m<two>\\033[0m'; tty"]))
    text = b"".join(part for _, part in written)
    assert b"<two>" in text
    assert b"/dev/" in text
    with pytest.raises(SystemExit, match="ended with 3"):
        list(recording.recorded(["sh", "-c", "exit 3"]))

    written = [(0.0, b"one\r\n"), (60.0, b"working 1\r"), (60.01, b"working 2\r"), (61.0, b"\x1b[K\x1b[32m<two>\x1b[0m ok")]
    film = recording.frames(written, "make it")
    screens = [["".join(run[0] for run in line).strip() for line in frame.lines if line] for frame in film]
    assert screens == [["$ make it", "one"], ["$ make it", "one", "working 2"], ["$ make it", "one", "<two> ok"]]
    assert max(frame.seconds for frame in film[:-1]) <= 2 * recording.LONGEST_PAUSE
    picture = ElementTree.fromstring(recording.svg(film, "a & b"))
    names = {part.get("id") for part in picture.iter() if part.get("id")}
    assert {use.get("href", "")[1:] for use in picture.iter("{http://www.w3.org/2000/svg}use")} <= names
    assert ("<two>", recording.COLOURS["green"]) in {(part.text, part.get("fill")) for part in picture.iter()}

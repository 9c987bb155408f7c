"""The harness: rows as they come, resuming, skips with reasons, and comparison of results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tensornet_compress.bench import caches, search, speed, weights
from tensornet_compress.bench.compare import compare
from tensornet_compress.bench.harness import Harness, Job, start
from tensornet_compress.bench.peer_packages import SIDE, SIDE_PACKAGES, SideEnvironment, SidePackage, Unavailable
from tensornet_compress.bench.run import load_plugins
from tensornet_compress.errors import TensorNetError
from tensornet_compress.report import Measure, read_result
from tensornet_compress.report.joined import differences

MEASURES = {"kl": Measure(title="KL", better="lower")}


def job(method: str, value: float, made: list[str], budget: float = 4.0) -> Job:
    def work() -> dict[str, Any]:
        made.append(method)
        if value < 0:
            raise Unavailable("not installed here")
        return {"values": {"kl": value}}

    return Job("weights", "model", method, work, budget, "bits/weight")


def harness(path: Path, resume: bool = False, **settings: Any) -> Harness:
    return Harness(start("bench weights", "command", {"weights": {"length": 8} | settings}, MEASURES, path, resume), path)


def test_rows_are_written_as_they_come_and_not_made_twice(tmp_path: Path) -> None:
    path, made = tmp_path / "r.json", []

    def interrupted() -> dict[str, Any]:
        raise KeyboardInterrupt

    first = harness(path)
    jobs = [job("a", 0.5, made), job("absent", -1, made)]
    with pytest.raises(KeyboardInterrupt):
        first.run("weights", [*jobs, Job("weights", "model", "b", interrupted, 4.0)])
    stored = read_result(path)
    assert not stored.complete
    assert [(row.method, row.skipped) for row in stored.rows] == [("a", None), ("absent", "not installed here")]
    second = harness(path, resume=True)
    second.run("weights", [*jobs, job("b", 0.25, made)])
    done = second.finish(1.0)
    assert done.complete
    assert read_result(path) == done
    assert made == ["a", "absent", "absent", "b"]
    assert {row.method: row.values.get("kl") for row in done.rows} == {"a": 0.5, "absent": None, "b": 0.25}


def test_any_failure_of_a_method_is_its_reason(tmp_path: Path) -> None:
    def broken() -> dict[str, Any]:
        raise RuntimeError("their kernel is missing")

    made = harness(tmp_path / "r.json")
    made.run("weights", [Job("weights", "model", "theirs", broken)])
    assert made.result.rows[0].skipped == "RuntimeError: their kernel is missing"


def test_a_result_of_other_settings_is_not_resumed_or_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    harness(path).run("weights", [job("a", 0.5, [])])
    with pytest.raises(TensorNetError, match=r"weights\.length: 8 -> 16"):
        harness(path, resume=True, length=16)
    with pytest.raises(TensorNetError, match="exists; pass --resume"):
        harness(path)


def test_methods_and_sizes_are_added_to_a_result(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    harness(path, methods=["a"], bits=[4.0]).run("weights", [job("a", 0.5, [])])
    made: list[str] = []
    again = harness(path, resume=True, methods=["b"], bits=[4.0, 3.0])
    again.run("weights", [job("a", 0.5, made), job("b", 0.25, made, 3.0)])
    assert made == ["b"]
    assert len(read_result(path).rows) == 2
    assert read_result(path).settings["weights"] == {"length": 8, "methods": ["a", "b"], "bits": [4.0, 3.0]}


def test_nothing_is_prepared_when_every_row_is_there(tmp_path: Path) -> None:
    path, prepared = tmp_path / "r.json", []
    for resume in (False, True):
        harness(path, resume).run("weights", [job("a", 0.5, [])], lambda: prepared.append(1))
    assert prepared == [1]


def test_comparison_names_ratios_directions_and_settings(tmp_path: Path) -> None:
    old, new = harness(tmp_path / "old.json"), harness(tmp_path / "new.json", length=16)
    old.run("weights", [job("a", 0.5, []), job("gone", 0.1, [])])
    new.run("weights", [job("a", 0.25, []), job("fresh", 0.1, [])])
    found = compare(old.result, new.result)
    change = next(change for change in found.changes if change.value == "kl")
    assert (change.old, change.new, change.ratio, change.better) == (0.5, 0.25, 0.5, True)
    notes = "\n".join(found.notes)
    assert "settings differ: weights.length: 8 -> 16" in notes
    assert "only in the new result: weights: model, fresh at 4 bits/weight" in notes
    assert "only in the old result: weights: model, gone at 4 bits/weight" in notes
    assert differences({"a": {"b": 1}}, {"a": {"b": 1}, "c": 2}) == ["c: none -> 2"]


def test_a_side_package_that_may_not_be_installed_is_unavailable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TENSORNET_COMPRESS_CACHE", str(tmp_path))
    monkeypatch.setitem(SIDE_PACKAGES, "nowhere", SidePackage("no_such_module_here", ("no-such-package==0",)))
    with pytest.raises(Unavailable, match="installing was refused"):
        SIDE.module("nowhere")


def test_a_side_package_is_found_in_the_side_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import sys

    monkeypatch.setenv("TENSORNET_COMPRESS_CACHE", str(tmp_path))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setitem(SIDE_PACKAGES, "beside", SidePackage("package_beside", ()))
    folder = tmp_path / "peers" / f"beside-py{sys.version_info.major}.{sys.version_info.minor}"
    folder.mkdir(parents=True)
    (folder / "package_beside.py").write_text("answer = 42\n")
    (folder / ".complete").touch()
    assert SideEnvironment(install=False).module("beside").answer == 42


def test_a_plug_in_registers_a_metric_or_says_what_is_wrong(tmp_path: Path) -> None:
    from tensornet_compress.bench.metrics import TOKEN_METRICS

    file = tmp_path / "mine.py"
    file.write_text(
        "from tensornet_compress.bench.metrics import TOKEN_METRICS, TokenMetric\n"
        "from tensornet_compress.report import Measure\n"
        "TOKEN_METRICS.add(TokenMetric('mine', Measure(title='mine'), lambda s: s.got.amax(-1)))\n"
    )
    load_plugins([file])
    try:
        assert "mine" in TOKEN_METRICS
    finally:
        TOKEN_METRICS.remove("mine")
    file.write_text("1 / 0\n")
    with pytest.raises(TensorNetError, match="failed: ZeroDivisionError"):
        load_plugins([file])
    with pytest.raises(TensorNetError, match="no plug-in file"):
        load_plugins([tmp_path / "missing.py"])


def test_a_measure_means_the_same_in_every_benchmark() -> None:
    seen: dict[str, Measure] = {}
    for measures in (weights.MEASURES, caches.MEASURES, search.MEASURES, speed.MEASURES):
        for name, measure in measures.items():
            assert seen.setdefault(name, measure) == measure, name


def test_our_own_errors_are_reasons_without_the_name_of_a_class(tmp_path: Path) -> None:
    def refused() -> dict[str, Any]:
        raise TensorNetError("no form keeps 4 bytes")

    run = harness(tmp_path / "r.json")
    run.run("weights", [Job("weights", "model", "m", refused, 4.0)])
    assert run.result.rows[0].skipped == "no form keeps 4 bytes"

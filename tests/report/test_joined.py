"""Runs put together: rows of all of them, and refusals where they do not belong together."""

from __future__ import annotations

from pathlib import Path
from random import random
from typing import Any

import pytest
from typer.testing import CliRunner

from tensornet_compress.cli.main import app
from tensornet_compress.errors import TensorNetError
from tensornet_compress.report import LayerCell, Result, joined, read_result, without_peer_layers, write_result
from tests.report.test_schema import result, row


def run(method: str, task: str = "weights", skipped: str | None = None, kl: float = 0.5, **settings: Any) -> Result:
    whole = {task: {"methods": [method], "bits": [4.0], "length": 8} | settings, "threads": 1}
    values = {} if skipped else {"kl": kl, "seconds": 100 * random()}
    made = result().model_copy(update={"settings": whole, "command": f"bench {method}", "seconds": 2.0})
    return made.with_row(row(method, task=task, values=values, skipped=skipped))


def test_rows_settings_and_seconds_of_all_runs() -> None:
    whole = joined([run("ours"), run("theirs"), run("theirs", task="kv")])
    assert [(r.task, r.method) for r in whole.rows] == [("weights", "ours"), ("weights", "theirs"), ("kv", "theirs")]
    assert whole.settings["weights"] == {"methods": ["ours", "theirs"], "bits": [4.0], "length": 8}
    assert whole.settings["kv"] == {"methods": ["theirs"], "bits": [4.0], "length": 8}
    assert (whole.command, whole.seconds) == ("bench ours && bench theirs && bench theirs", 6.0)


def test_a_row_that_runs_agree_on_counts_once() -> None:
    assert [r.method for r in joined([run("dense"), run("dense"), run("ours")]).rows] == ["dense", "ours"]


def test_a_measured_row_counts_before_a_skipped_one() -> None:
    for order in ([run("a", skipped="no compiler"), run("a")], [run("a"), run("a", skipped="no compiler")]):
        assert [r.values["kl"] for r in joined(order).rows] == [0.5]


def test_layers_of_peers_may_be_left_out() -> None:
    cell = LayerCell(name="a", kind="a", family="dense", formats="bf16", bits_per_weight=16.0, nbytes=2)
    whole = result().with_row(row("ours", ours=True, layers=(cell,))).with_row(row("theirs", layers=(cell,)))
    assert [(r.layers, r.values) for r in without_peer_layers(whole).rows] == [((cell,), {"kl": 0.5}), ((), {"kl": 0.5})]


def test_runs_that_do_not_belong_together() -> None:
    with pytest.raises(TensorNetError, match=r"weights\.length: 8 -> 16"):
        joined([run("ours"), run("theirs", length=16)])
    with pytest.raises(TensorNetError, match=r"two of the results measured ours on s at 4\.0"):
        joined([run("ours"), run("ours", kl=0.25)])
    with pytest.raises(TensorNetError, match="at least one result"):
        joined([])


def test_the_report_command_puts_files_together(tmp_path: Path) -> None:
    paths = [str(write_result(run(name), tmp_path / f"{name}.json")) for name in ("ours", "theirs")]
    done = CliRunner().invoke(app, ["report", *paths, "--json", str(tmp_path / "all.json")])
    assert done.exit_code == 0, done.output
    assert {r.method for r in read_result(tmp_path / "all.json").rows} == {"ours", "theirs"}
    assert "theirs" in (tmp_path / "all.html").read_text()
    again = CliRunner().invoke(app, ["report", *paths, "--json", paths[1]])
    assert again.exit_code == 2
    assert "would be overwritten" in again.stderr
    assert {r.method for r in read_result(Path(paths[1])).rows} == {"theirs"}

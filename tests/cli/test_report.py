"""The ``report`` command, and the reports that other commands leave behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

pytest.importorskip("matplotlib", reason="the extra `report` is not installed")

import tensornet_compress.report as reporting
from tensornet_compress.cli.main import app
from tensornet_compress.cli.report import leave_report
from tensornet_compress.errors import MissingExtraError
from tensornet_compress.report import write_result
from tests.report.synthetic import result, row


def call(*arguments: object) -> tuple[int, str]:
    done = CliRunner(env={"COLUMNS": "200"}).invoke(app, [str(argument) for argument in arguments])
    return done.exit_code, " ".join(done.output.split())


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    return write_result(result(row("auto", 2000, 0.1, True), row("rtn", 2000, 0.2)), tmp_path / "r.json")


def test_a_page_is_written_beside_the_result_or_where_it_is_wanted(stored: Path, tmp_path: Path) -> None:
    code, said = call("report", stored)
    assert (code, said) == (0, f"wrote {tmp_path / 'r.html'}")
    assert call("report", stored, "--html", tmp_path / "deep" / "x.html")[0] == 0
    assert (tmp_path / "r.html").read_bytes() == (tmp_path / "deep" / "x.html").read_bytes()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read"),
        ("{", "is not JSON"),
        ('{"name": 3}', "not a valid Result"),
        ("\x00\xff", "holds zero bytes"),
    ],
)
def test_what_is_no_result_is_one_line(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "r.json"
    if content is not None:
        path.write_text(content)
    done = CliRunner().invoke(app, ["report", str(path)])
    assert done.exit_code == 2
    assert message in " ".join(done.output.split())
    assert done.output.count("\n") == 1
    assert not (tmp_path / "r.html").exists()


def test_a_page_never_replaces_its_result_or_a_folder(stored: Path, tmp_path: Path) -> None:
    assert "is a result and would be overwritten; give another --html" in call("report", stored, "--html", stored)[1]
    assert "is a folder" in call("report", stored, "--html", tmp_path)[1]


def test_without_the_extra_the_result_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(*_: object) -> None:
        raise MissingExtraError("reports need matplotlib")

    monkeypatch.setattr(reporting, "write_report", missing)
    leave_report(result(row("auto", 2000, 0.1, True)), tmp_path)
    assert json.loads((tmp_path / "report.json").read_text())["name"] == "Tiny"
    assert not (tmp_path / "report.html").exists()
    assert "tensornet-compress report" in capsys.readouterr().err

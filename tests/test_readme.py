"""The README's code runs as it stands; its commands run on the bundled model, made smaller by extra options."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tensornet_compress.cli.main import app

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
SMALLER = {
    "weights": ["--targets", "layers.0.mlp.*", "--samples", "4", "--length", "128"],
    "eval": ["--windows", "2", "--length", "256"],
    "generate": ["--max-new-tokens", "3"],
    "inspect": [],
    "report": [],
    "search": ["--time-budget", "5"],
    "kv": ["--samples", "6", "--length", "256", "--sensitivity-windows", "1"],
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.model
@pytest.mark.parametrize("block", blocks("python"))
def test_python_blocks_run(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "README.md", "exec"), {"__name__": "readme"})


@pytest.mark.model
def test_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    lines = [
        line[2:].split("#")[0] for block in blocks("console") for line in block.splitlines() if line.startswith("$ tensor")
    ]
    assert len(lines) >= 4
    for line in lines:
        arguments = shlex.split(line)[1:]
        result = CliRunner().invoke(app, [*arguments, *SMALLER[arguments[0]]])
        assert result.exit_code == 0, f"{line}\n{result.output}"


def test_make_targets_exist() -> None:
    makefile = (Path(__file__).parent.parent / "Makefile").read_text(encoding="utf-8")
    wanted = re.findall(r"^\$ make (\w+)", README, flags=re.MULTILINE)
    assert wanted
    assert all(re.search(rf"^{target}:", makefile, flags=re.MULTILINE) for target in wanted)


def test_figures_are_those_of_the_committed_results() -> None:
    path = Path(__file__).parent.parent / "benchmarks" / "readme_tables.py"
    spec = importlib.util.spec_from_file_location("readme_tables", path)
    assert spec is not None
    assert spec.loader is not None
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    assert README.split(tables.START)[1].split(tables.END)[0] == tables.tables()

"""The code of README and docs runs as it stands; its commands run on the bundled model, made smaller by extra options."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tensornet_compress.cli.main import app
from tests.documents import DOCUMENTS, README, ROOT, Block, all_blocks, blocks

SMALLER = {
    "weights": ["--targets", "layers.0.mlp.*", "--samples", "4", "--length", "128"],
    "eval": ["--windows", "2", "--length", "256"],
    "generate": ["--max-new-tokens", "3"],
    "inspect": [],
    "export": [],
    "report": [],
    "search": ["--time-budget", "5"],
    "bench weights": ["--methods", "rtn", "--bits", "4.5"],
    "bench search": ["--methods", "ours,svd", "--budget", "5"],
    "kv": ["--samples", "6", "--length", "256", "--sensitivity-windows", "1"],
}
LANGUAGES = {"python", "console", "json", "bibtex", "text"}
# The only reasons for which a block that could be run is not; a document gives one as `<!-- not run: REASON -->` above it.
NOT_RUN = {
    "takes hours": r"make bench|python benchmarks/\w+\.py",
    "downloads packages": r"make peers|pip install",
}
USES_MODEL = "smollm2-135m"


def _standalone(block: Block) -> bool:
    """README's blocks stand alone; those of a page in docs/ are read, and run, from top to bottom."""
    return block.document == README


def _marked(block: Block) -> object:
    marks = [pytest.mark.model] if USES_MODEL in block.text else []
    return pytest.param(block, id=str(block), marks=marks)


@pytest.mark.parametrize("block", [_marked(b) for b in all_blocks("python") if _standalone(b)])
def test_python_blocks_of_the_readme_run(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(block.text, str(block), "exec"), {"__name__": "readme"})


@pytest.mark.parametrize("document", [d for d in DOCUMENTS if d != README], ids=lambda d: d.name)
def test_python_blocks_of_a_page_run_in_order(document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    # A page may define classes, whose annotations are looked up in a module of their own.
    page = type(sys)("page")
    monkeypatch.setitem(sys.modules, "page", page)
    for block in blocks(document):
        if block.language == "python":
            exec(compile(block.text, str(block), "exec"), page.__dict__)


@pytest.mark.model
@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: d.name)
def test_commands_run(document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for block in blocks(document):
        if "np.save(" in block.text:
            # What the commands below it read.
            exec(compile(block.text, str(block), "exec"), {"__name__": "readme"})
        for line in block.commands if block.language == "console" and block.not_run is None else ():
            program, *arguments = shlex.split(line)
            if program != "make":
                assert program == "tensornet-compress", f"{block}: {line!r} is neither run nor marked as not run"
                command = " ".join(arguments[:2]) if arguments[0] == "bench" else arguments[0]
                if "--memory" in arguments:
                    # This process has run the suite before, and holds what that left.
                    arguments[arguments.index("--memory") + 1] = "64GiB"
                result = CliRunner().invoke(app, [*arguments, *SMALLER[command]])
                assert result.exit_code == 0, f"{block}: {line}\n{result.output}"


def test_every_command_is_shown_in_the_readme() -> None:
    shown = {line.split()[1] for b in blocks(README) for line in b.commands if line.startswith("tensornet-compress")}
    assert shown >= {command.name or command.callback.__name__ for command in app.registered_commands if command.callback}


def test_blocks_are_run_or_say_why_not() -> None:
    for block in all_blocks():
        assert block.language in LANGUAGES, f"{block}: unknown language {block.language!r}"
        if block.language == "json":
            json.loads(block.text)
        if block.not_run is not None:
            assert block.not_run in NOT_RUN, f"{block}: {block.not_run!r} is not one of {list(NOT_RUN)}"
            assert block.commands
            assert all(re.match(NOT_RUN[block.not_run], line) for line in block.commands), f"{block}: {block.commands}"


def test_no_fence_is_overlooked() -> None:
    for document in DOCUMENTS:
        assert document.read_text(encoding="utf-8").count("```") == 2 * len(blocks(document)), document


def test_make_targets_and_benchmarks_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for document in DOCUMENTS:
        text = " ".join(document.read_text(encoding="utf-8").split())
        for target in re.findall(r"(?:\$|`)\s?make (\w+)", text):
            assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), f"{document.name}: make {target}"
        for script in re.findall(r"python (benchmarks/[\w/]+\.py)", text):
            assert (ROOT / script).is_file(), f"{document.name}: {script}"


def test_links_lead_somewhere() -> None:
    for document in DOCUMENTS:
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[\w-]+)?\)", document.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (document.parent / target).exists(), f"{document.name}: {target}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: d.name)
def test_tables_and_figures_are_those_of_the_committed_results(document: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import tables

    text = document.read_text(encoding="utf-8")
    assert tables.filled(text) == text, f"{document.name} is stale; run python benchmarks/tables.py --write"


@pytest.mark.parametrize("name", ["README.md", "results.md"])
def test_figures_in_the_prose_are_traced_to_a_result(name: str) -> None:
    (document,) = (document for document in DOCUMENTS if document.name == name)
    prose = re.sub(r"```.*?```|<!-- table .*?<!-- /table -->", "", document.read_text(encoding="utf-8"), flags=re.DOTALL)
    prose = re.sub(r"\b\d{4}\.\d{5}\b", "", prose)  # papers
    prose = re.sub(r"<!-- =.*?-->", "<!-- =-->", prose)  # rows that figures are taken from
    untraced = re.findall(r"(?<![\d.])\d+\.\d{3,}(?!\d|<!-- =)", prose)
    assert not untraced
    assert name != "README.md" or re.search(r"\d\.\d{3,}<!-- =", prose)

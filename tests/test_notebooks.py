"""The committed notebooks run, and what is committed of them is whole: outputs, no errors, nothing of the machine."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest

from tests.documents import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LARGEST = 1 << 20
# Folders of a machine, its names for memory, and colour codes of a traceback.
PRIVATE = re.compile(r"/(?:tmp|home|root|Users|work|usr|opt)/|site-packages|at 0x[0-9a-f]{6,}|\x1b\[")


def named(path: Path) -> str:
    return path.stem


def test_all_are_there() -> None:
    assert [path.name[0] for path in NOTEBOOKS] == ["1", "2", "3", "4", "5"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=named)
def test_committed_outputs_are_whole(path: Path) -> None:
    assert path.stat().st_size < LARGEST
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1)), "run notebooks/execute.py"
    outputs = [output for cell in cells for output in cell.outputs]
    assert sum(bool(cell.outputs) for cell in cells) >= len(cells) // 2
    assert any("image/png" in output.get("data", {}) for output in outputs)
    for output in outputs:
        assert output.output_type != "error"
        assert output.get("name") != "stderr", output.text
        text = output.get("text", "") + "".join(output.get("data", {}).get("text/plain", ""))
        assert not PRIVATE.search(text), text[:200]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=named)
def test_cells_are_short_and_explained(path: Path) -> None:
    cells = nbformat.read(path, as_version=4).cells
    assert cells[0].cell_type == "markdown"
    assert cells[0].source.startswith("# ")
    assert all(cell.source.count("\n") < 36 for cell in cells)
    assert sum(cell.cell_type == "markdown" for cell in cells) >= len(cells) // 3


@pytest.mark.model
@pytest.mark.parametrize("path", NOTEBOOKS, ids=named)
def test_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "notebooks"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    from execute import execute

    notebook = execute(path, tmp_path)
    assert all(output.output_type != "error" for cell in notebook.cells for output in cell.get("outputs", []))

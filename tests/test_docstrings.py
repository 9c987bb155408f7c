"""Examples in docstrings run and give what they show."""

from __future__ import annotations

import doctest
from importlib import import_module
from pathlib import Path

import pytest

from tests.documents import ROOT

FILES = [
    path.relative_to(ROOT)
    for path in sorted((ROOT / "tensornet_compress").rglob("*.py"))
    if ">>> " in path.read_text(encoding="utf-8")
]


@pytest.mark.parametrize("file", FILES, ids=str)
def test_examples_give_what_they_show(file: Path) -> None:
    result = doctest.testmod(import_module(".".join(file.with_suffix("").parts)))
    assert result.attempted > 0
    assert result.failed == 0

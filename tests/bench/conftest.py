"""What the benchmark tests share: nothing is installed, and every run is tiny."""

from __future__ import annotations

from pathlib import Path

import pytest

from tensornet_compress.bench.peer_packages import SIDE
from tests.models import random_text


@pytest.fixture(autouse=True)
def _nothing_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SIDE, "install", False)


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of words that the tiny tokenizer knows."""
    file = tmp_path_factory.mktemp("texts") / "words.txt"
    lines = [random_text(60, seed) for seed in range(120)]
    file.write_text("\n".join(lines), encoding="utf-8")
    return file

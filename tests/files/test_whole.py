"""A file appears whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from tensornet_compress.errors import TensorNetError
from tensornet_compress.files.whole import whole_file


def test_a_file_takes_its_place_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "new" / "a.txt"
    with whole_file(target) as file:
        file.write_text("whole")
        assert not target.exists()
    assert target.read_text() == "whole"
    assert [item.name for item in target.parent.iterdir()] == ["a.txt"]


def test_a_failed_write_leaves_what_was_there(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    target.write_text("before")
    with pytest.raises(UnicodeEncodeError), whole_file(target) as file:
        file.write_text("hal\ud800", encoding="utf-8")
    assert target.read_text() == "before"
    assert [item.name for item in tmp_path.iterdir()] == ["a.txt"]


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TensorNetError, match="is a folder; give a file name"), whole_file(tmp_path):
        pass

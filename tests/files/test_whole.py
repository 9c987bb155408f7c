"""A file appears whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tensornet_compress.errors import TensorNetError
from tensornet_compress.files.reading import read_tensors
from tensornet_compress.files.whole import whole_file, write_tensors


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


def test_files_of_equal_content_are_equal(tmp_path: Path) -> None:
    header = {name: name * 3 for name in "abcdefgh"} | {"quoted": '"\\\n\u00e9'}
    for number in range(8):
        write_tensors(tmp_path / str(number), {"x": torch.arange(3.0)}, header)
    assert len({(tmp_path / str(number)).read_bytes() for number in range(8)}) == 1
    assert {name: text for name, text in read_tensors(tmp_path / "0")[1].items() if name in header} == header

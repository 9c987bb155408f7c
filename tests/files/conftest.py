"""A saved folder."""

import pytest

import tensornet_compress as tnc
from tests.files.saved import compressed
from tests.models import tiny_llama, tiny_tokenizer


@pytest.fixture
def folder(tmp_path):
    model = tiny_llama(layers=1)
    compressed(model, targets=["q_proj", "up_proj"])
    return tnc.save(model, tmp_path / "out", tokenizer=tiny_tokenizer())

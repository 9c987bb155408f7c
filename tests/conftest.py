"""What all tests share: one thread, reproducible hypothesis examples, tiny models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

from tests import models

settings.register_profile(
    "suite", deadline=None, max_examples=25, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("search", deadline=None, max_examples=200, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("suite")


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    # Tiny factorisations are slower on several threads.
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory) -> Path:
    """A tiny saved Llama with its tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "llama"
    models.tiny_llama().save_pretrained(folder)
    models.tiny_tokenizer().save_pretrained(folder)
    return folder

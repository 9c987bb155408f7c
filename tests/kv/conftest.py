"""What the KV tests share."""

from __future__ import annotations

import pytest
import torch

from tests.kv.tiny_models import VOCABULARY


@pytest.fixture
def ids() -> torch.Tensor:
    """Random prompt ids, (2, 90)."""
    return torch.randint(1, VOCABULARY, (2, 90), generator=torch.Generator().manual_seed(2))

"""A tensor of zeros is said to be one, and costs next to nothing to find and to keep."""

from __future__ import annotations

import pytest
import torch

import tensornet_compress as tnc


@pytest.mark.parametrize("shape", [(24, 24, 24), (32, 48), (100,), (2,)])
@pytest.mark.parametrize("limit", [{"max_error": 0.1}, {"max_bytes": 64}, {"max_error": 0.0}])
def test_zeros_take_one_rank_and_are_called_so(shape: tuple[int, ...], limit: dict[str, float]) -> None:
    result = tnc.search(torch.zeros(shape), **limit)
    assert "every entry is zero" in result.reason
    assert result.error == 0.0
    assert torch.equal(result.best.to_dense(), torch.zeros(shape))
    assert len(result.best.spec.terms[0].topology.legs) <= len(shape)
    assert result.best.nbytes <= 64
    assert len(result.found) < 60

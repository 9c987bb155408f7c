"""A metric in a file is the metric."""

import pytest
import torch

from tensornet_compress.metric import KroneckerMetric, StoredMetric
from tests.generators import correlated_moment, random_tensor


@pytest.mark.parametrize("rows", [None, torch.rand(5, dtype=torch.float64) + 1, correlated_moment(5)])
@pytest.mark.parametrize("columns", [None, torch.rand(7) + 1, correlated_moment(7)])
@pytest.mark.parametrize("rate", [None, 0.25])
def test_what_is_read_is_what_was_written(rows, columns, rate, tmp_path):
    metric = KroneckerMetric(rows, columns, rate)
    loaded = StoredMetric.write(metric, tmp_path / "metric.safetensors").load()
    error = random_tensor((5, 7))
    assert loaded.rate == rate
    assert loaded.norm2(error) == pytest.approx(metric.norm2(error), rel=1e-12)
    for a, b in ((metric.rows, loaded.rows), (metric.columns, loaded.columns)):
        assert (a is None and b is None) or (torch.equal(a, b) and a.dtype == b.dtype)

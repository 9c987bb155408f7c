"""Bounds on single entries and on the peak signal-to-noise ratio."""

import numpy as np
import pytest
import torch

import tensornet_compress as tnc
from tensornet_compress.errors import TensorNetError
from tensornet_compress.searching.bounds import corrected

X = torch.linspace(0, 3, 32, dtype=torch.float64)
SMOOTH = torch.outer(X.sin(), (2 * X).cos()) + 0.2 * torch.outer(X, X)
OPTIONS = {"null": False, "time_budget": 2.0}


def spiky(dtype=torch.float32):
    torch.manual_seed(0)
    return (SMOOTH + (torch.rand(32, 32) > 0.98)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bound", [0.3, 0.01, 1e-4])
def test_no_entry_is_farther_off_than_the_bound_also_from_a_file(bound, dtype, tmp_path):
    field = spiky(dtype)
    result, network = tnc.search_within(field, max_abs=bound, **OPTIONS)
    tnc.save_network(network, tmp_path / "field.tnz")
    read = tnc.open_tensor(tmp_path / "field.tnz")
    assert (torch.from_numpy(read[...]) - field).abs().max() <= bound
    assert (torch.from_numpy(read[3:9, 5]) - field[3:9, 5]).abs().max() <= bound * (1 + 1e-5)
    assert network.nbytes <= corrected(result.best, field, bound).nbytes


def test_few_spikes_cost_few_bytes():
    rough = tnc.to_network(SMOOTH.float(), max_error=1e-4)
    field = rough.to_dense()
    assert corrected(rough, field, 1e-3) is rough
    field[3, 4] += 1
    assert corrected(rough, field, 1e-3).nbytes < rough.nbytes + 128


def test_signal_to_noise_ratio():
    field = SMOOTH.float()
    result, network = tnc.search_within(field, psnr=50.0, **OPTIONS)
    off = (network.to_dense() - field).double()
    reached = 20 * torch.log10((field.max() - field.min()) / off.square().mean().sqrt())
    assert 50.0 <= reached < 65.0
    assert network is result.best


@pytest.mark.parametrize(
    "bounds", [{}, {"max_abs": 0.1, "psnr": 30.0}, {"max_error": 0.1, "max_bytes": 100}, {"max_abs": 0.0}, {"max_abs": -1.0}]
)
def test_bad_bounds_are_refused(bounds):
    with pytest.raises(TensorNetError, match=r"exactly one|positive"):
        tnc.search_within(SMOOTH, **bounds)


def test_bounds_too_fine_for_corrections_are_refused():
    field = SMOOTH + torch.rand(32, 32, dtype=torch.float64)
    with pytest.raises(TensorNetError, match="too fine"):
        corrected(tnc.to_network(field, max_error=0.1), field, 1e-14)


def test_the_result_tells_of_the_network_that_keeps_the_bound():
    field = spiky()
    result, network = tnc.search_within(field.numpy(), max_abs=0.01, **OPTIONS)
    assert result.best is network
    assert result.choice.nbytes == network.nbytes
    assert result.error == pytest.approx(float((network.to_dense() - field).norm() / field.norm()), rel=1e-4)
    assert result.choice in result.found
    assert "no entry off by more than 0.01" in str(result)
    assert "PSNR of at least 40 dB" in str(tnc.search_within(field, psnr=40.0, **OPTIONS)[0])


@pytest.mark.parametrize("bounds", [{"max_abs": 0.1}, {"psnr": 30.0}, {"max_error": 0.1}])
def test_entries_that_are_no_numbers_are_named_whatever_the_bound(bounds):
    field = SMOOTH.clone()
    field[3, 4] = torch.nan
    with pytest.raises(TensorNetError, match="1 NaN"):
        tnc.search_within(field, **bounds)
    with pytest.raises(TensorNetError, match="array of object"):
        tnc.search_within(np.array([None, 1]), **bounds)


def test_equal_entries_have_no_signal_to_noise_ratio():
    with pytest.raises(TensorNetError, match=r"all of these are equal; give max_abs"):
        tnc.search_within(torch.ones(4, 4), psnr=30.0)

"""Arrays from files of other packages."""

import numpy as np
import pytest
import torch

from tensornet_compress.errors import TensorNetError
from tensornet_compress.inputs.tensors import read_tensor

DATA = np.arange(24, dtype=np.float32).reshape(2, 3, 4)


def same(file, data=DATA):
    tensor = read_tensor(str(file))
    return tensor.dtype == torch.float32 and np.array_equal(tensor.numpy(), data)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_brain_volumes(suffix, tmp_path):
    nibabel = pytest.importorskip("nibabel")
    nibabel.save(nibabel.Nifti1Image(DATA, np.eye(4)), tmp_path / f"volume{suffix}")
    assert same(tmp_path / f"volume{suffix}")


@pytest.mark.parametrize("suffix", [".h5", ".nc"])
def test_data_sets_by_name(suffix, tmp_path):
    h5py = pytest.importorskip("h5py")
    path = tmp_path / f"fields{suffix}"
    with h5py.File(path, "w") as file:
        file["deep/one"] = DATA
    assert same(path)
    assert same(f"{path}:deep/one")
    with h5py.File(path, "a") as file:
        file["two"] = 2 * DATA
    assert same(f"{path}:two", 2 * DATA)
    with pytest.raises(TensorNetError, match="deep/one, two"):
        read_tensor(str(path))


def test_zarr_arrays_and_groups(tmp_path):
    zarr = pytest.importorskip("zarr")
    zarr.save_array(str(tmp_path / "one.zarr"), DATA)
    assert same(tmp_path / "one.zarr")
    zarr.save_group(str(tmp_path / "many.zarr"), a=DATA, b=2 * DATA)
    assert same(f"{tmp_path / 'many.zarr'}:b", 2 * DATA)
    with pytest.raises(TensorNetError, match="NAME with one of"):
        read_tensor(str(tmp_path / "many.zarr"))


def test_damaged_files_are_refused(tmp_path):
    for name in ("a.nii.gz", "a.h5"):
        pytest.importorskip({"a.nii.gz": "nibabel", "a.h5": "h5py"}[name])
        (tmp_path / name).write_bytes(b"nothing of the kind")
        with pytest.raises(TensorNetError, match="cannot read"):
            read_tensor(str(tmp_path / name))

"""The codec by itself and below Zarr."""

import numpy as np
import pytest

from tensornet_compress.errors import TensorNetError

numcodecs = pytest.importorskip("numcodecs")


def field():
    x, y = np.linspace(0, 3, 24, dtype=np.float32), np.linspace(0, 1, 32, dtype=np.float32)
    return np.sin(x)[:, None] * np.cos(3 * y) + 0.1 * x[:, None] * y


def codec(**options):
    from tensornet_compress.integrations.numcodecs_codec import TensorNetCodec

    return TensorNetCodec(time_budget=1.0, **options)


@pytest.mark.parametrize(("name", "value"), [("max_error", 1e-3), ("max_abs", 1e-3), ("psnr", 60.0)])
def test_chunks_keep_the_bound(name, value):
    kept = codec(**{name: value})
    data = kept.encode(field())
    assert len(data) < field().nbytes
    again = numcodecs.get_codec(kept.get_config()).decode(data)
    off = again - field()
    out = np.empty_like(field())
    kept.decode(data, out)
    assert np.array_equal(out, again)
    errors = {
        "max_error": np.linalg.norm(off) / np.linalg.norm(field()),
        "max_abs": np.abs(off).max(),
        "psnr": value**2 / (20 * np.log10(np.ptp(field()) / np.sqrt((off**2).mean()))),
    }
    assert errors[name] <= value * 1.001


def test_zarr_reads_and_writes_it(tmp_path):
    zarr = pytest.importorskip("zarr")
    array = zarr.create_array(
        tmp_path / "field.zarr", shape=(24, 32), chunks=(24, 16), dtype="f4", zarr_format=2, compressors=codec(max_abs=1e-3)
    )
    array[:] = field()
    assert np.abs(zarr.open(tmp_path / "field.zarr")[:] - field()).max() <= 1e-3


def test_what_it_cannot_keep_is_refused():
    with pytest.raises(TensorNetError, match="one of"):
        codec()
    with pytest.raises(TensorNetError, match="int64"):
        codec(max_error=0.1).encode(np.arange(4))


@pytest.mark.parametrize("bound", [{"max_abs": -1.0}, {"max_error": 0.0}, {"max_abs": float("nan")}])
def test_bounds_that_nothing_keeps_are_refused_at_once(bound):
    with pytest.raises(TensorNetError, match="positive and finite"):
        codec(**bound)

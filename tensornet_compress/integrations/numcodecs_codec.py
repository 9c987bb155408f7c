"""A codec of numcodecs, with which Zarr and xarray keep chunks as networks."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numcodecs.abc import Codec
from numcodecs.compat import ensure_bytes, ndarray_copy
from numcodecs.registry import register_codec

from tensornet_compress.errors import TensorNetError
from tensornet_compress.files import load_network, save_network
from tensornet_compress.searching import search_within

_FLOATS = (np.float16, np.float32, np.float64)


class TensorNetCodec(Codec):
    """Chunks of floating-point numbers as the networks that ``search_within`` finds for them; lossy, within the bound.

    Every chunk is searched for itself, for ``time_budget`` seconds at most, so chunks should be large. One of ``max_error``,
    ``max_abs`` and ``psnr``; chunks that are all of one value, or hold NaN, are for other codecs.

    Raises:
        TensorNetError: as ``search_within``; integers.
    """

    codec_id: ClassVar[str] = "tensornet"

    def __init__(
        self,
        max_error: float | None = None,
        max_abs: float | None = None,
        psnr: float | None = None,
        time_budget: float = 5.0,
        seed: int = 0,
    ):
        if len([bound for bound in (max_error, max_abs, psnr) if bound is not None]) != 1:
            raise TensorNetError(f"give one of max_error={max_error!r}, max_abs={max_abs!r} and psnr={psnr!r}")
        if any(bound is not None and not 0 < bound < float("inf") for bound in (max_error, max_abs)):
            raise TensorNetError(f"bounds are positive and finite, was given max_error={max_error!r}, max_abs={max_abs!r}")
        self.max_error, self.max_abs, self.psnr = max_error, max_abs, psnr
        self.time_budget, self.seed = time_budget, seed

    def encode(self, buf: Any) -> bytes:
        """A chunk (an array of floating-point numbers of any shape) -> the file that ``save_network`` writes."""
        chunk = np.asarray(buf)
        if chunk.dtype not in _FLOATS:
            raise TensorNetError(f"the codec keeps float16, float32 and float64, was given {chunk.dtype}")
        tensor = torch.from_numpy(np.array(chunk, order="C"))
        bounds = {"max_error": self.max_error, "max_abs": self.max_abs, "psnr": self.psnr}
        _, network = search_within(tensor, **bounds, time_budget=self.time_budget, seed=self.seed, null=False)
        with tempfile.TemporaryDirectory() as folder:
            save_network(network, Path(folder) / "chunk")
            return (Path(folder) / "chunk").read_bytes()

    def decode(self, buf: Any, out: Any = None) -> Any:
        """The file -> the chunk, or into ``out``."""
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "chunk").write_bytes(ensure_bytes(buf))
            dense = load_network(Path(folder) / "chunk").to_dense().numpy()
        return dense if out is None else ndarray_copy(dense, out)


register_codec(TensorNetCodec)

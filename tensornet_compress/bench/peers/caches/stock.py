"""The quantised caches that transformers ships, on the packages quanto and hqq: their own layers quantise and dequantise."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from time import time
from typing import Any

from torch import Tensor

from tensornet_compress.bench.cache_case import CACHE_METHODS, CacheCase, CacheMethod, States, nominal
from tensornet_compress.bench.side import SIDE
from tensornet_compress.kv.rope import Rotary

GROUP = 64
STALE_SECONDS = 900


def ready(backend: str) -> None:
    """Make a backend usable by transformers, which looks for it once, before the side folder was on the path.

    Raises:
        Unavailable: the backend cannot be imported or installed.
    """
    module = SIDE.module(backend)
    if backend == "quanto":
        drop_stale_lock(Path(module.__file__).parent / "library" / "extensions" / "cpp" / "build" / "lock")
    from transformers import cache_utils
    from transformers.utils import import_utils

    for name in ("is_hqq_available", "is_optimum_available", "is_optimum_quanto_available", "is_quanto_greater"):
        forget: Any = getattr(getattr(import_utils, name), "cache_clear", None)
        if forget is not None:
            forget()
    if backend == "hqq" and not hasattr(cache_utils, "HQQQuantizer"):
        cache_utils.HQQQuantizer = module.Quantizer


def drop_stale_lock(lock: Path) -> None:
    """quanto builds an extension at its first use. A build that was killed leaves its lock, for which all later ones would
    wait for ever; a lock of a quarter of an hour is nobody's."""
    if lock.is_file() and time() - lock.stat().st_mtime > STALE_SECONDS:
        lock.unlink(missing_ok=True)


class Stock:
    """Layers of transformers' ``QuantizedCache`` (quanto or hqq), groups of 64, on rotated keys."""

    def __init__(self, backend: str, bits: int, rotary: Rotary):
        ready(backend)
        from transformers.cache_utils import HQQQuantizedLayer, QuantoQuantizedLayer

        self.name, self.bits, self.rotary = f"QuantizedCache {backend} int{bits}", bits, rotary
        if backend == "hqq":
            self.layer: Any = HQQQuantizedLayer(nbits=bits, axis_key=1, axis_value=1)
        else:
            self.layer = QuantoQuantizedLayer(nbits=bits)

    def _recode(self, x: Tensor, axis: int) -> Tensor:
        self.layer.keys = x
        decoded: Tensor = self.layer._dequantize(self.layer._quantize(x[None].contiguous(), axis=axis))[0].float()
        return decoded

    def recode(self, keys: States, values: States, positions: Tensor) -> tuple[States, States, float]:
        """See ``CachePeer``."""
        axis = self.layer.axis_key
        out = [self.rotary.unrotate(self._recode(self.rotary.rotate(k, positions), axis), positions) for k in keys]
        return out, [self._recode(v, self.layer.axis_value) for v in values], self.bits + 32 / GROUP


def stock(backend: str, case: CacheCase, bits: float) -> Stock:
    """The widest codes that a rate allows: the backends have 8 (hqq only), 4 and 2 bits."""
    offered = (8, 4, 2) if backend == "hqq" else (4, 2)
    code, _ = nominal(bits, [(code, GROUP) for code in offered], lambda c, g: c + 32 / g)
    return Stock(backend, code, case.rotary)


CACHE_METHODS.add(CacheMethod("quantized-quanto", partial(stock, "quanto"), explanation="transformers' QuantizedCache, quanto"))
CACHE_METHODS.add(CacheMethod("quantized-hqq", partial(stock, "hqq"), explanation="transformers' QuantizedCache, hqq"))

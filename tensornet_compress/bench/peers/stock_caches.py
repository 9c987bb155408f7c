"""The quantised caches that transformers ships, on the packages quanto and hqq: their own layers quantise and dequantise."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from time import time
from typing import Any

from torch import Tensor

from tensornet_compress.bench.cache_case import CACHE_METHODS, CacheCase, CacheCoder, nominal
from tensornet_compress.bench.peer_packages import SIDE
from tensornet_compress.bench.registry import Method

GROUP = 64
STALE_SECONDS = 900


def ready(backend: str) -> None:
    """Make a backend usable by transformers, which looks for it once, before the side folder was on the path. Raises
    ``Unavailable``: the backend cannot be imported or installed."""
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


def quantised(backend: str, case: CacheCase, bits: float) -> CacheCoder:
    """Layers of transformers' ``QuantizedCache``, groups of 64, with the widest codes that a rate allows: the backends have 8
    (hqq only), 4 and 2 bits."""
    code, _ = nominal(bits, [(code, GROUP) for code in ((8, 4, 2) if backend == "hqq" else (4, 2))], lambda c, g: c + 32 / g)
    ready(backend)
    from transformers.cache_utils import HQQQuantizedLayer, QuantoQuantizedLayer

    layer: Any = (
        HQQQuantizedLayer(nbits=code, axis_key=1, axis_value=1) if backend == "hqq" else QuantoQuantizedLayer(nbits=code)
    )

    def coded(axis: int, states: Tensor) -> Tensor:
        layer.keys = states
        decoded: Tensor = layer._dequantize(layer._quantize(states[None].contiguous(), axis=axis))[0].float()
        return decoded

    both = partial(coded, layer.axis_key), partial(coded, layer.axis_value)
    return case.rounded(f"QuantizedCache {backend} int{code}", code + 32 / GROUP, *both)


CACHE_METHODS.add(Method("quantized-quanto", partial(quantised, "quanto"), "transformers' QuantizedCache, quanto"))
CACHE_METHODS.add(Method("quantized-hqq", partial(quantised, "hqq"), "transformers' QuantizedCache, hqq"))

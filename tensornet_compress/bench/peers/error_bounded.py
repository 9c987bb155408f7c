"""SZ3 and ZFP, the compressors of fields with a bound on the error of each entry, at equal measured relative error.

Both are given the bound of fewest bytes for which the error that is asked for is kept. ``seconds`` are those of one
compression and decompression at that bound. Of SZ3 the better of its two predictors is taken.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from time import process_time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tensornet_compress.bench.peer_packages import SIDE, Unavailable
from tensornet_compress.bench.registry import Method
from tensornet_compress.bench.search_case import SEARCH_METHODS, SearchCase, Stored

Array = NDArray[np.float32]
Coder = Callable[[Array, float], tuple[int, Array]]
"""(field, bound of each entry) -> (bytes, what is decoded)."""
_EIGHTHS = (-8, 80)
"""Narrowest and widest bound, in eighths of an octave over the root mean square error that is asked for."""
_AROUND, _FINER = 1.3, 48


def sz3(algorithm: str, field: Array, bound: float) -> tuple[int, Array]:
    """One compression by SZ3."""
    pysz: Any = SIDE.module("sz3")
    config = pysz.szConfig(field.shape)
    config.errorBoundMode, config.absErrorBound = pysz.szErrorBoundMode.ABS, bound
    config.cmprAlgo = getattr(pysz.szAlgorithm, algorithm)
    coded, _ = pysz.sz.compress(field, config)
    return coded.nbytes, pysz.sz.decompress(coded, field.dtype, field.shape)[0]


def zfp(field: Array, bound: float) -> tuple[int, Array]:
    """One compression by ZFP."""
    zfpy: Any = SIDE.module("zfp")
    coded = zfpy.compress_numpy(field, tolerance=bound)
    return len(coded), zfpy.decompress_numpy(coded)


def bounded(coders: dict[str, Coder], case: SearchCase, error: float) -> Stored:
    """The fewest bytes of any coder that keep the relative error. Raises ``Unavailable`` where none does."""
    field = case.tensor.numpy()
    if field.ndim > 4:
        raise Unavailable(f"fields have at most 4 axes, this one {field.ndim}")
    norm = float(np.linalg.norm(field))
    found = [best for name, coder in coders.items() if (best := _fewest(name, coder, field, error, norm)) is not None]
    if not found:
        raise Unavailable("no bound keeps the error")
    return min(found, key=lambda stored: stored.nbytes)


def _fewest(name: str, coder: Coder, field: Array, error: float, norm: float) -> Stored | None:
    """Of one coder: bounds in steps of an eighth of an octave, then finer ones around the best of these and beyond the widest
    that keeps the error, as neither errors nor bytes fall evenly with the bound."""
    kept: list[Stored] = []

    def tried(bound: float) -> bool:
        began = process_time()
        nbytes, decoded = coder(field, bound)
        seconds = process_time() - began
        off = float(np.linalg.norm(decoded - field)) / norm
        if off <= error:
            kept.append(Stored(nbytes, off, values={"seconds": seconds}, settings={"bound": bound, "coder": name}))
        return off <= error

    bounds = error * norm / field.size**0.5 * np.exp2(np.arange(*_EIGHTHS) / 8)
    widest = max((bound for bound in bounds.tolist() if tried(bound)), default=None)
    if widest is None:
        return None
    best = min(kept, key=lambda stored: stored.nbytes).settings["bound"]
    for bound in np.geomspace(best / _AROUND, widest * _AROUND, _FINER).tolist():
        tried(bound)
    return min(kept, key=lambda stored: stored.nbytes)


_PREDICTORS: dict[str, Coder] = {name: partial(sz3, name) for name in ("INTERP_LORENZO", "LORENZO_REG")}
SEARCH_METHODS.add(Method("sz3", partial(bounded, _PREDICTORS), "SZ3, the better of interpolation and Lorenzo-regression"))
SEARCH_METHODS.add(Method("zfp", partial(bounded, {"tolerance": zfp}), "ZFP with a tolerance"))

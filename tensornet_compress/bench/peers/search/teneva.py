"""teneva's TT-SVD over the digits of the axes in native order, its cores in our number formats."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from tensornet_compress.bench.search_case import SEARCH_METHODS, SearchCase, SearchMethod, Stored
from tensornet_compress.bench.side import SIDE, Unavailable
from tensornet_compress.coding import format_nbytes, parse_format
from tensornet_compress.options.offered import SEARCH_CORE_FORMATS, fine_digits
from tensornet_compress.options.rounding import rounding_error

_SLACK = (1.0, 0.9, 0.75)
_HOPELESS = 1.3


def tensor_train(case: SearchCase) -> Stored:
    """The smallest train, over all formats, that was measured to keep the error.

    Raises:
        Unavailable: none keeps it in fewer bytes than 1.3 times fp32.
    """
    teneva: Any = SIDE.module("teneva")
    tensorization = fine_digits(tuple(case.tensor.shape))
    modes = tensorization.apply(case.tensor)
    norm = float(modes.double().norm())
    bonds = max(1, modes.ndim - 1)
    best: Stored | None = None
    for name in SEARCH_CORE_FORMATS:
        fmt = parse_format(name)
        for slack in _SLACK:
            allowed = (slack * case.max_error) ** 2 - rounding_error(fmt) * modes.ndim
            if allowed <= 0:
                continue
            cores = teneva.svd(modes.double().numpy(), e=float(np.sqrt(allowed / bonds)) * norm)
            nbytes = sum(format_nbytes(fmt, tuple(core.shape)) for core in cores)
            if nbytes > _HOPELESS * 4 * case.tensor.numel() or (best is not None and nbytes >= best.nbytes):
                break
            decoded = [fmt.decode(fmt.encode(core), tuple(core.shape), torch.float32) for core in _tensors(cores)]
            dense = torch.from_numpy(teneva.full([core.double().numpy() for core in decoded])).float()
            error = float((dense - modes).norm() / norm)
            if error <= case.max_error:
                ranks = [int(core.shape[-1]) for core in cores[:-1]]
                best = Stored(nbytes, error, settings={"format": name, "ranks": ranks, "modes": list(modes.shape)})
                break
    if best is None:
        raise Unavailable(f"no train keeps the error in fewer bytes than {_HOPELESS} times fp32")
    return best


def _tensors(cores: list[Any]) -> list[Tensor]:
    return [torch.from_numpy(np.ascontiguousarray(core)).float() for core in cores]


SEARCH_METHODS.add(SearchMethod("teneva", tensor_train, explanation="teneva's TT-SVD over the digits, cores in our formats"))

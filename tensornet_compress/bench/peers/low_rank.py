"""Truncated SVD in one metric or another: plain, FWSVD (2207.00112), ASVD (2312.05821), SVD-LLM (2403.07378) and KFAC-SVD.

Every layer gets the same share of bytes, as in these papers. Factors are kept in bf16, as their authors do, or for one entry
as 8-bit integers, which buys twice the rank.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor

from tensornet_compress.bench.registry import Method
from tensornet_compress.bench.weight_case import WEIGHT_METHODS, Approximation, WeightCase, by_layer, parts_of, require_rank_one
from tensornet_compress.coding import format_nbytes, parse_format
from tensornet_compress.decompose import MatrixSpectrum, matrix_spectrum
from tensornet_compress.metric import euclidean
from tensornet_compress.nn import Target


def truncate(metric: str, fmt: str, case: WeightCase, target: Target, matrix: Tensor, nbytes: int) -> Approximation:
    """The best two factors in a metric that fit in ``nbytes``. Raises ``Unavailable`` where even rank 1 does not."""
    number_format = parse_format(fmt)
    rows, columns = matrix.shape

    def cost(rank: int) -> int:
        return format_nbytes(number_format, (rows, rank)) + format_nbytes(number_format, (rank, columns))

    rank = min(rows, columns)
    while rank > 1 and cost(rank) > nbytes:
        rank -= 1
    require_rank_one(cost(rank), nbytes, matrix.numel())
    # Every size and format truncates the same factorisation.
    spectra: dict[str, MatrixSpectrum] = case.latest("spectra", metric, dict)
    if target.name not in spectra:
        spectra[target.name] = matrix_spectrum(matrix, case.metrics(metric).get(target.name, euclidean()))
    stored, factors = [], []
    for core in spectra[target.name].cores(rank):
        parts = number_format.encode(core.contiguous())
        stored += list(parts.values())
        factors.append(number_format.decode(parts, tuple(core.shape), matrix.dtype))
    return Approximation(factors[0] @ factors[1], parts_of(factors=stored), "two cores", fmt, (rank,))


for _name, _metric, _fmt, _explanation in (
    ("svd", "euclidean", "bf16", "truncated SVD of each weight, factors in bf16"),
    ("fwsvd", "row-fisher", "bf16", "FWSVD: rows weighed by the Fisher information, factors in bf16"),
    ("asvd", "diagonal", "bf16", "ASVD: columns scaled by the size of the activations, factors in bf16"),
    ("svd-llm", "input", "bf16", "SVD-LLM: whitened by the second moment of the inputs, factors in bf16"),
    ("svd-llm-int8", "input", "int8g64", "SVD-LLM with factors in 8-bit integers, groups of 64"),
    ("kfac-svd", "kronecker", "bf16", "KFAC-SVD: Kronecker-factored Fisher metric, factors in bf16"),
):
    WEIGHT_METHODS.add(Method(_name, by_layer(partial(truncate, _metric, _fmt)), _explanation))

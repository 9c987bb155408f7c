"""Dense tensor + spec + metric -> cores."""

from tensornet_compress.decompose.als import refine_cores
from tensornet_compress.decompose.linalg import singular_values, svd
from tensornet_compress.decompose.matrix import MatrixSpectrum, matrix_spectrum, stable_pivots
from tensornet_compress.decompose.quantise import ErrorFeedback
from tensornet_compress.decompose.ranks import (
    bond_spectra,
    feasible_ranks,
    ranks_for_bytes,
    ranks_for_error,
    ranks_nbytes,
    tails,
    unfolding,
)
from tensornet_compress.decompose.realise import alternate_terms, column_feedback, fit_network, realise
from tensornet_compress.decompose.rounding import round_cores
from tensornet_compress.decompose.to_network import to_network
from tensornet_compress.decompose.tree import decompose_tree

__all__ = [
    "ErrorFeedback",
    "MatrixSpectrum",
    "alternate_terms",
    "bond_spectra",
    "column_feedback",
    "decompose_tree",
    "feasible_ranks",
    "fit_network",
    "matrix_spectrum",
    "ranks_for_bytes",
    "ranks_for_error",
    "ranks_nbytes",
    "realise",
    "refine_cores",
    "round_cores",
    "singular_values",
    "stable_pivots",
    "svd",
    "tails",
    "to_network",
    "unfolding",
]

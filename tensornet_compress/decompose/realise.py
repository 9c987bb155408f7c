"""A tensor and a spec -> the network: the one deterministic function that every compression ends in.

Applying a plan again to the original model calls it again, and gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tensornet_compress.coding import CodedFormat, FloatFormat, IntFormat, NumberFormat, PivotFormat
from tensornet_compress.decompose.als import refine_cores
from tensornet_compress.decompose.linalg import require_finite, working_dtype
from tensornet_compress.decompose.matrix import MatrixSpectrum, matrix_spectrum
from tensornet_compress.decompose.one_step import one_step_parts
from tensornet_compress.decompose.pivots import refit_rows, stable_pivots
from tensornet_compress.decompose.quantise import ROUNDS, ErrorFeedback
from tensornet_compress.decompose.tree import tree_cores
from tensornet_compress.errors import TensorNetError
from tensornet_compress.metric import KroneckerMetric, euclidean
from tensornet_compress.tensor import NetworkSpec, TensorNetwork, TermSpec
from tensornet_compress.tensor.network import part_name

_ITERATIONS = 3


def realise(
    tensor: Tensor,
    spec: NetworkSpec,
    metric: KroneckerMetric | None = None,
    sweeps: int = 1,
    spectrum: MatrixSpectrum | None = None,
    feedback: ErrorFeedback | None = None,
) -> TensorNetwork:
    """The network of ``spec`` nearest to ``tensor`` in ``metric`` (Euclidean by default).

    One core is rounded with error feedback; two cores cut (first axis | others) have a closed form, and the first of them may
    be kept by pivots; any other tree is decomposed in the Euclidean norm and refined by ``sweeps`` of ALS in the metric.
    Integer cores are rounded one after the other, each with the cores still free fitted to what was rounded before. Terms of a
    sum are fitted to what the earlier ones left. Ranks that the tensor cannot have are an error: the spec must be what the
    file will hold.

    Raises:
        TensorNetError: shapes differ, the tensor is empty or not finite, or a rank is too high.
    """
    if tuple(tensor.shape) != spec.shape:
        raise TensorNetError(f"a spec for shape {spec.shape} was given a tensor of shape {tuple(tensor.shape)}")
    require_finite(tensor, "tensor")
    metric = metric or euclidean()
    rest = tensor.detach().to(working_dtype(tensor.dtype))
    networks = []
    for number, term in enumerate(spec.terms):
        parts = _realise_term(rest, term, metric, sweeps, spectrum if number == 0 else None, feedback)
        network = TensorNetwork(spec if len(spec.terms) == 1 else spec.model_copy(update={"terms": (term,)}), parts)
        networks.append(network)
        if number < len(spec.terms) - 1:
            rest = rest - network.to_dense(rest.dtype)
    return networks[0] if len(networks) == 1 else TensorNetwork.sum(networks)


def _realise_term(
    tensor: Tensor,
    term: TermSpec,
    metric: KroneckerMetric,
    sweeps: int,
    spectrum: MatrixSpectrum | None,
    feedback: ErrorFeedback | None,
) -> dict[str, Tensor]:
    if len(term.formats) == 1:
        return _dense_parts(tensor, term, metric, feedback)
    if is_matrix_cut(term) and not isinstance(term.formats[1], PivotFormat):
        return _matrix_parts(tensor, term, metric, spectrum, feedback)
    if any(isinstance(fmt, PivotFormat) for fmt in term.formats):
        raise TensorNetError(
            "pivots are stored for the first of two cores that cut rows from columns in native order, not for "
            f"{term.topology.legs} with formats {[fmt.name for fmt in term.formats]}"
        )
    return _tree_parts(tensor, term, metric, sweeps)


def is_matrix_cut(term: TermSpec) -> bool:
    """True for two cores that cut the first axis of an unpermuted tensor from all others."""
    positions = term.topology.positions
    return term.layout.is_native and term.topology.legs == ((0,), tuple(range(1, positions)))


def _dense_parts(tensor: Tensor, term: TermSpec, metric: KroneckerMetric, feedback: ErrorFeedback | None) -> dict[str, Tensor]:
    laid_out = term.layout.apply(tensor)
    arranged = laid_out.permute(term.topology.legs[0]).contiguous()
    fmt = term.formats[0]
    if isinstance(fmt, CodedFormat):
        matrix = arranged.reshape(len(arranged), -1) if arranged.ndim else arranged.reshape(1, 1)
        return {part_name(0, 0, part): value for part, value in one_step_parts(matrix, fmt, metric).items()}
    feedback = feedback or _rounding_feedback(metric, fmt)
    if feedback is not None and term.layout.is_native and arranged.ndim == 2:
        parts = feedback.encode(arranged, fmt)
    else:
        parts = fmt.encode(arranged)
    return {part_name(0, 0, part): value for part, value in parts.items()}


def column_feedback(metric: KroneckerMetric, rounds: int = ROUNDS) -> ErrorFeedback | None:
    """Error feedback for cores along the columns of the metric; None when these are Euclidean or diagonal."""
    if metric.columns is None or metric.columns.ndim == 1:
        return None
    return ErrorFeedback(metric.columns, rounds=rounds)


def _rounding_feedback(metric: KroneckerMetric, fmt: NumberFormat) -> ErrorFeedback | None:
    """``column_feedback`` where the format takes it: other numbers are rounded to nearest, and need no factors."""
    return column_feedback(metric) if isinstance(fmt, IntFormat) else None


def _matrix_parts(
    tensor: Tensor,
    term: TermSpec,
    metric: KroneckerMetric,
    spectrum: MatrixSpectrum | None,
    feedback: ErrorFeedback | None,
) -> dict[str, Tensor]:
    """Round the right core first, fit the left one to it in closed form, then round that in the metric it is left with."""
    matrix = tensor.reshape(tensor.shape[0], -1)
    rank = term.ranks[0]
    _require_rank(rank, min(matrix.shape), 0)
    spectrum = spectrum or matrix_spectrum(matrix, metric)
    left, right = spectrum.cores(rank)
    left_format = term.formats[0]
    if isinstance(left_format, PivotFormat):
        return _pivot_parts(matrix, left, right, term, metric, feedback)
    right_parts, rounded = _right_parts(right, term, metric, feedback)
    weighted = metric_columns(metric, rounded)
    gram = weighted @ rounded.T
    level = float(gram.diagonal().mean())
    # Beside each row's own square, so that rows far smaller than others are fitted as well as these.
    gram = gram + torch.diag(1e-9 * gram.diagonal().clamp_min(1e-20 * level))
    if level > 0:
        left = torch.linalg.solve(gram, weighted @ matrix.double().T).T.to(matrix.dtype)
    if isinstance(left_format, FloatFormat) or level <= 0:
        left_parts = left_format.encode(left)
    else:
        left_parts = ErrorFeedback(gram, damping=1e-6).encode(left, left_format)
    return _named(left_parts, right_parts)


def _pivot_parts(
    matrix: Tensor, left: Tensor, right: Tensor, term: TermSpec, metric: KroneckerMetric, feedback: ErrorFeedback | None
) -> dict[str, Tensor]:
    """Rows of the truncated matrix as the right core; the left one combines the others from them, fitted to their rounding."""
    pivot_format = term.formats[0]
    assert isinstance(pivot_format, PivotFormat)
    pivots, combined = stable_pivots(left)
    right_parts, rounded = _right_parts(left[pivots] @ right, term, metric, feedback)
    fitted = refit_rows(matrix, combined, rounded, metric)
    return _named(pivot_format.assemble(fitted, pivots), right_parts)


def _right_parts(
    right: Tensor, term: TermSpec, metric: KroneckerMetric, feedback: ErrorFeedback | None
) -> tuple[dict[str, Tensor], Tensor]:
    """Stored parts of the right core, and what they decode to, float64 (rank, n)."""
    shape, fmt = term.core_shape(1), term.formats[1]
    feedback = feedback or _rounding_feedback(metric, fmt)
    parts = feedback.encode(right, fmt) if feedback is not None and len(shape) == 2 else fmt.encode(right.reshape(shape))
    return parts, fmt.decode(parts, shape, torch.float32).reshape(term.ranks[0], -1).double()


def _named(left_parts: dict[str, Tensor], right_parts: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        part_name(0, core, part): value for core, parts in enumerate((left_parts, right_parts)) for part, value in parts.items()
    }


def metric_columns(metric: KroneckerMetric, rows: Tensor) -> Tensor:
    """``V C`` for rows V (k, n)."""
    return KroneckerMetric(columns=metric.columns).apply(rows)


def _tree_parts(tensor: Tensor, term: TermSpec, metric: KroneckerMetric, sweeps: int) -> dict[str, Tensor]:
    cores, ranks = tree_cores(term.layout.apply(tensor), term.topology, term.ranks)
    for bond, (used, wanted) in enumerate(zip(ranks, term.ranks)):
        _require_rank(wanted, used, bond)
    if metric.rows is not None or metric.columns is not None:
        cores, _ = refine_cores(cores, term, tensor, metric, sweeps=sweeps, iterations=_ITERATIONS)
    return _rounded(cores, term, tensor, metric, sweeps)


def _rounded(
    cores: Sequence[Tensor], term: TermSpec, tensor: Tensor, metric: KroneckerMetric, sweeps: int
) -> dict[str, Tensor]:
    """Round core after core, largest first, and refit the largest of those still free after each."""
    work = list(cores)
    parts: dict[str, Tensor] = {}
    pending = sorted(range(len(work)), key=lambda core: -work[core].numel())
    while pending:
        core = pending.pop(0)
        fmt = term.formats[core]
        encoded = fmt.encode(work[core])
        work[core] = fmt.decode(encoded, tuple(work[core].shape), work[core].dtype)
        parts |= {part_name(0, core, part): value for part, value in encoded.items()}
        if pending and sweeps and not isinstance(fmt, FloatFormat):
            work, _ = refine_cores(work, term, tensor, metric, sweeps=1, iterations=_ITERATIONS, free=pending[:1])
    return parts


def _require_rank(wanted: int, possible: int, bond: int) -> None:
    if wanted > possible:
        raise TensorNetError(f"bond {bond} asks for rank {wanted}, the tensor allows at most {possible}; lower it in the spec")

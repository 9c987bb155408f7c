"""A tensor and a spec -> the network: the one deterministic function that every compression ends in.

Applying a plan again to the original model calls it again, and gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tensornet_compress.coding import CodedFormat, EntropyCoded, FloatFormat, IntFormat, NumberFormat, PivotFormat
from tensornet_compress.decompose.als import refine_cores
from tensornet_compress.decompose.linalg import require_finite, working_dtype
from tensornet_compress.decompose.matrix import MatrixSpectrum, matrix_spectrum, refit_rows, stable_pivots
from tensornet_compress.decompose.one_step import Canceller, one_step_parts
from tensornet_compress.decompose.quantise import ROUNDS, ErrorFeedback
from tensornet_compress.decompose.tree import core_metric, decompose_tree
from tensornet_compress.errors import TensorNetError
from tensornet_compress.metric import KroneckerMetric, euclidean
from tensornet_compress.tensor import NetworkSpec, TensorNetwork, TermSpec
from tensornet_compress.tensor.network import part_name

_ITERATIONS = 3
Parts = dict[str, Tensor]
"""Stored parts of one core, or of all cores of a term under their flat names."""


def realise(
    tensor: Tensor,
    spec: NetworkSpec,
    metric: KroneckerMetric | None = None,
    sweeps: int = 1,
    spectrum: MatrixSpectrum | None = None,
    feedback: ErrorFeedback | None = None,
    canceller: Canceller | None = None,
    cores: Sequence[Tensor] | None = None,
) -> TensorNetwork:
    """The network of ``spec`` nearest to ``tensor`` in ``metric`` (Euclidean by default).

    One core is rounded with error feedback; two cores cut (first axis | others) have a closed form, and the first of them may
    be kept by pivots; any other tree is decomposed in the Euclidean norm and refined by ``sweeps`` of ALS in the metric.
    Integer cores are rounded one after the other, each with the cores not rounded yet fitted to what was rounded before. Terms
    of a sum are fitted to what the earlier ones left. Ranks that the tensor cannot have are an error: the spec must be what the
    file will hold; only the bytes of entropy-coded cores are filled in. ``spectrum``, ``feedback``, ``canceller`` and, of a
    tree, the ``cores`` that it is decomposed in save time where they are known.

    >>> import torch
    >>> import tensornet_compress as tnc
    >>> tensor = torch.arange(64.0).reshape(8, 8)
    >>> spec = tnc.to_network(tensor, ranks=2).spec
    >>> torch.allclose(tnc.realise(tensor, spec).to_dense(), tensor, atol=1e-4)
    True

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
        parts = _realise_term(rest, term, metric, sweeps, spectrum if number == 0 else None, feedback, canceller, cores)
        network = TensorNetwork(spec.model_copy(update={"terms": (_sized(term, parts),)}), parts)
        networks.append(network)
        if number < len(spec.terms) - 1:
            rest = rest - network.to_dense(rest.dtype)
    return networks[0] if len(networks) == 1 else TensorNetwork.sum(networks)


def alternate_terms(
    tensor: Tensor, spec: NetworkSpec, metric: KroneckerMetric | None = None, rounds: int = 4, sweeps: int = 1
) -> tuple[TensorNetwork, list[float]]:
    """The network of a ``spec`` with several terms, and its squared error in the metric after ``realise`` and each round.

    A round realises every term anew on the tensor less the other terms (CALDERA 2405.18886, LQER 2402.02446 for an integer base
    with a low-rank correction). Rounding is not a projection, so a round may lose: the best network is kept.

    Raises:
        TensorNetError: fewer than two terms, or anything that ``realise`` refuses.
    """
    if len(spec.terms) < 2 or rounds < 0:
        raise TensorNetError(f"terms alternate in a sum of two or more; was given {len(spec.terms)} terms and {rounds} rounds")
    metric = metric or euclidean()
    feedback = column_feedback(metric)
    best = realise(tensor, spec, metric, sweeps=sweeps, feedback=feedback)
    wide = tensor.detach().float()
    terms = [best.single(number) for number in range(len(spec.terms))]

    def error() -> float:
        rest = wide - sum((term.to_dense(wide.dtype) for term in terms), start=wide.new_zeros(()))
        return metric.norm2(rest.reshape(wide.shape[0], -1))

    errors = [error()]
    for _ in range(rounds):
        for number in range(len(terms)):
            others = sum((term.to_dense(wide.dtype) for i, term in enumerate(terms) if i != number), start=wide.new_zeros(()))
            terms[number] = realise(wide - others, terms[number].spec, metric, sweeps=sweeps, feedback=feedback)
        errors.append(error())
        if errors[-1] <= min(errors):
            best = TensorNetwork.sum(terms)
    return best, errors


def fit_network(
    tensor: Tensor,
    spec: NetworkSpec,
    metric: KroneckerMetric | None = None,
    sweeps: int = 1,
    canceller: Canceller | None = None,
) -> TensorNetwork:
    """What is stored for a ``spec`` in a compression: ``realise``, and for a sum the best of ``alternate_terms``."""
    if len(spec.terms) == 1:
        return realise(tensor, spec, metric, sweeps=sweeps, canceller=canceller)
    return alternate_terms(tensor, spec, metric, sweeps=sweeps)[0]


def column_feedback(metric: KroneckerMetric, rounds: int = ROUNDS) -> ErrorFeedback | None:
    """Error feedback for cores along the columns of the metric; None when these are Euclidean or diagonal."""
    if metric.columns is None or metric.columns.ndim == 1:
        return None
    return ErrorFeedback(metric.columns, rounds=rounds)


def _realise_term(
    tensor: Tensor,
    term: TermSpec,
    metric: KroneckerMetric,
    sweeps: int,
    spectrum: MatrixSpectrum | None,
    feedback: ErrorFeedback | None,
    canceller: Canceller | None,
    cores: Sequence[Tensor] | None,
) -> Parts:
    if len(term.formats) == 1:
        return _dense_parts(tensor, term, metric, feedback, canceller)
    if is_matrix_cut(term) and not isinstance(term.formats[1], PivotFormat):
        return _matrix_parts(tensor, term, metric, spectrum, feedback)
    if any(isinstance(fmt, PivotFormat) for fmt in term.formats):
        raise TensorNetError(
            "pivots are stored for the first of two cores that cut rows from columns in native order, not for "
            f"{term.topology.legs} with formats {[fmt.name for fmt in term.formats]}"
        )
    return _tree_parts(tensor, term, metric, sweeps, cores)


def _sized(term: TermSpec, parts: Parts) -> TermSpec:
    """The term with the bytes that its entropy-coded cores came to."""
    formats = list(term.formats)
    for core, fmt in enumerate(formats):
        if isinstance(fmt, EntropyCoded):
            name = part_name(0, core)
            formats[core] = fmt.of({key.removeprefix(name): part for key, part in parts.items() if key.startswith(f"{name}_")})
    return term.model_copy(update={"formats": tuple(formats)})


def is_matrix_cut(term: TermSpec) -> bool:
    """True for two cores that cut the first axis of an unpermuted tensor from all others."""
    positions = term.topology.positions
    return term.layout.is_native and term.topology.legs == ((0,), tuple(range(1, positions)))


def _rounded(core: Tensor, fmt: NumberFormat, metric: KroneckerMetric, feedback: ErrorFeedback | None) -> Parts:
    """A core whose last axes are those of the metric's columns, as stored: with error feedback if it is a matrix."""
    if isinstance(fmt, CodedFormat):
        return one_step_parts(core.reshape(len(core), -1), fmt, KroneckerMetric(None, metric.columns, metric.rate))
    if core.ndim != 2 or not isinstance(fmt, IntFormat):
        return fmt.encode(core)
    feedback = feedback or column_feedback(metric)
    return fmt.encode(core) if feedback is None else feedback.encode(core, fmt)


def _dense_parts(
    tensor: Tensor, term: TermSpec, metric: KroneckerMetric, feedback: ErrorFeedback | None, canceller: Canceller | None
) -> Parts:
    core = term.layout.apply(tensor).permute(term.topology.legs[0]).contiguous()
    fmt = term.formats[0]
    if isinstance(fmt, CodedFormat):
        matrix = core.reshape(len(core), -1) if core.ndim else core.reshape(1, 1)
        return _named(one_step_parts(matrix, fmt, metric, canceller))
    return _named(_rounded(core, fmt, metric, feedback) if term.layout.is_native else fmt.encode(core))


def _matrix_parts(
    tensor: Tensor, term: TermSpec, metric: KroneckerMetric, spectrum: MatrixSpectrum | None, feedback: ErrorFeedback | None
) -> Parts:
    """Round the right core first, fit the left one to it in closed form, then round that in the metric it is left with."""
    matrix = tensor.reshape(tensor.shape[0], -1)
    rank = term.ranks[0]
    _require_rank(rank, min(matrix.shape), 0)
    left, right = (spectrum or matrix_spectrum(matrix, metric)).cores(rank)
    left_format, right_format, shape = *term.formats, term.core_shape(1)
    if isinstance(left_format, PivotFormat):
        # Rows of the truncated matrix are the right core; the left one combines the others from them.
        pivots, combined = stable_pivots(left)
        right = left[pivots] @ right
    right_parts = _rounded(right.reshape(shape), right_format, metric, feedback)
    right = right_format.decode(right_parts, shape, torch.float32).reshape(rank, -1).double()
    if isinstance(left_format, PivotFormat):
        return _named(left_format.assemble(refit_rows(matrix, combined, right, metric), pivots), right_parts)
    weighted = metric.apply_columns(right)
    gram = weighted @ right.T
    level = float(gram.diagonal().mean())
    if level <= 0:
        return _named(left_format.encode(left), right_parts)
    # Beside each row's own square, so that rows far smaller than others are fitted as well as these.
    gram = gram + torch.diag(1e-9 * gram.diagonal().clamp_min(1e-20 * level))
    left = torch.linalg.solve(gram, weighted @ matrix.double().T).T.to(matrix.dtype)
    if isinstance(left_format, FloatFormat):
        return _named(left_format.encode(left), right_parts)
    if isinstance(left_format, CodedFormat):
        left_metric = KroneckerMetric(metric.rows, gram, metric.rate)
        return _named(one_step_parts(left, left_format, left_metric, damping=1e-6), right_parts)
    return _named(ErrorFeedback(gram, damping=1e-6).encode(left, left_format), right_parts)


def _tree_parts(tensor: Tensor, term: TermSpec, metric: KroneckerMetric, sweeps: int, known: Sequence[Tensor] | None) -> Parts:
    """Decompose, refine, then round core after core, largest first, and refit the largest of those still exact after each."""
    cores, ranks = (
        decompose_tree(term.layout.apply(tensor), term.topology, term.ranks) if known is None else (list(known), term.ranks)
    )
    for bond, (used, wanted) in enumerate(zip(ranks, term.ranks)):
        _require_rank(wanted, used, bond)
    if metric.rows is not None or metric.columns is not None:
        cores, _ = refine_cores(cores, term, tensor, metric, sweeps=sweeps, iterations=_ITERATIONS)
    parts: list[Parts] = [{} for _ in cores]
    seen = list(cores)
    pending = sorted(range(len(cores)), key=lambda core: -cores[core].numel())
    while pending:
        core = pending.pop(0)
        fmt = term.formats[core]
        if isinstance(fmt, CodedFormat):
            own = core_metric(term.topology, seen, core, metric)
            matrix = cores[core].reshape(len(cores[core]), -1) if cores[core].ndim else cores[core].reshape(1, 1)
            parts[core] = one_step_parts(matrix, fmt, own, damping=0.0, least=0.0)
        else:
            parts[core] = fmt.encode(cores[core])
        cores[core] = fmt.decode(parts[core], tuple(cores[core].shape), cores[core].dtype)
        if pending and sweeps and not isinstance(fmt, FloatFormat):
            cores, _ = refine_cores(cores, term, tensor, metric, sweeps=1, iterations=_ITERATIONS, only=pending[:1])
    return _named(*parts)


def _named(*cores: Parts) -> Parts:
    """Parts of all cores under their flat names."""
    return {part_name(0, core, part): value for core, parts in enumerate(cores) for part, value in parts.items()}


def _require_rank(wanted: int, possible: int, bond: int) -> None:
    if wanted > possible:
        raise TensorNetError(f"bond {bond} asks for rank {wanted}, the tensor allows at most {possible}; lower it in the spec")

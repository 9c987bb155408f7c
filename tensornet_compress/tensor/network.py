"""TensorNetwork: a spec and its numbers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache, partial

import torch
from torch import Tensor

from tensornet_compress.coding import PivotFormat, pack_permutation
from tensornet_compress.errors import TensorNetError
from tensornet_compress.tensor.contraction import Program, plan_contraction
from tensornet_compress.tensor.ordering import FibreOrder
from tensornet_compress.tensor.spec import DTYPES, NetworkSpec, TermSpec, index_sizes

Expected = dict[str, tuple[tuple[int, ...], torch.dtype]]
"""Name of a stored tensor -> its shape and dtype."""


def part_name(term: int, core: int, part: str = "") -> str:
    """Flat name of a stored part: ``core0``, ``core1_q``, ``t1_core0_scale``."""
    return f"{_prefix(term)}core{core}{part}"


def order_name(term: int, axis: int) -> str:
    """Flat name of a packed fibre order."""
    return f"{_prefix(term)}order{axis}"


def _prefix(term: int) -> str:
    return f"t{term}_" if term else ""


def expected_parts(spec: NetworkSpec) -> Expected:
    """The stored parts of all cores of a network of this spec."""
    return {
        part_name(t, core, part): description
        for t, term in enumerate(spec.terms)
        for core, fmt in enumerate(term.formats)
        for part, description in fmt.parts(term.core_shape(core)).items()
    }


def expected_tensors(spec: NetworkSpec) -> Expected:
    """Everything that a file holds of a network of this spec: the parts of cores, and packed fibre orders."""
    orders = {order_name(t, order.axis): ((order.nbytes,), torch.uint8) for t, order in _charged_orders(spec)}
    return expected_parts(spec) | orders


def _charged_orders(spec: NetworkSpec) -> list[tuple[int, FibreOrder]]:
    """The fibre orders that a file holds, with the number of their term."""
    orders = [(t, order) for t, term in enumerate(spec.terms) for order in term.layout.fibre_orders]
    return [(t, order) for t, order in orders if not order.absorbed]


def check_stored(spec: NetworkSpec, stored: Mapping[str, Tensor]) -> None:
    """Refuse stored parts (without packed orders) that are not what ``spec`` describes.

    Raises:
        TensorNetError: a part is missing, unknown, has another shape, or holds what its format cannot mean.
    """
    expected = expected_parts(spec)
    if set(expected) != set(stored):
        missing, extra = sorted(set(expected) - set(stored)), sorted(set(stored) - set(expected))
        raise TensorNetError(f"stored parts do not fit the spec: missing {missing}, unknown {extra}")
    for name, (shape, _) in expected.items():
        if tuple(stored[name].shape) != shape:
            raise TensorNetError(f"part {name!r} has shape {tuple(stored[name].shape)}, the spec says {shape}")
    for t, term in enumerate(spec.terms):
        for core, fmt in enumerate(term.formats):
            if isinstance(fmt, PivotFormat):
                shape = term.core_shape(core)
                parts = {part: stored[part_name(t, core, part)] for part in fmt.parts(shape)}
                if not parts["_pivots"].is_meta:
                    fmt.check(parts, shape)


def decode_core(term: TermSpec, term_index: int, core: int, stored: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
    """Core ``core`` of a term from flat stored parts."""
    shape = term.core_shape(core)
    fmt = term.formats[core]
    parts = {part: stored[part_name(term_index, core, part)] for part in fmt.parts(shape)}
    return fmt.decode(parts, shape, dtype)


def contract_term(term: TermSpec, cores: Sequence[Tensor]) -> Tensor:
    """Cores of a term -> its dense tensor of the original shape."""
    return term.layout.invert(contraction_of(term).run(cores))


def contraction_of(term: TermSpec) -> Program:
    """The program that contracts the cores of a term to its laid-out tensor."""
    return _rebuild(term.topology.all_labels, term.layout.dims, term.ranks)


@lru_cache(maxsize=1024)
def _rebuild(labels: tuple[tuple[str, ...], ...], dims: tuple[int, ...], ranks: tuple[int, ...]) -> Program:
    output = tuple(f"p{position}" for position in range(len(dims)))
    return plan_contraction(labels, output, index_sizes(dims, ranks))


class TensorNetwork:
    """A spec and the stored (encoded) parts of its cores.

    ``stored`` holds flat names as in ``expected_parts``: packed orders are not among them, as they follow from the spec.

    >>> import torch
    >>> import tensornet_compress as tnc
    >>> network = tnc.to_network(torch.outer(torch.arange(4.0), torch.ones(6)), ranks=1)
    >>> list(network.stored), network.nbytes, network.core(0).shape
    (['core0', 'core1'], 40, torch.Size([4, 1]))
    >>> network.to_dense()[:, 0]
    tensor([0., 1., 2., 3.])
    """

    def __init__(self, spec: NetworkSpec, stored: Mapping[str, Tensor]):
        """Check that ``stored`` is what ``spec`` describes.

        Raises:
            TensorNetError: a part is missing, unknown, has another shape, or holds what the format cannot mean.
        """
        check_stored(spec, stored)
        self.spec = spec
        self.stored = dict(stored)

    @classmethod
    def from_cores(cls, spec: NetworkSpec, cores: Sequence[Sequence[Tensor]]) -> TensorNetwork:
        """Encode float cores, one sequence per term."""
        stored: dict[str, Tensor] = {}
        for t, (term, term_cores) in enumerate(zip(spec.terms, cores, strict=True)):
            for c, (fmt, core) in enumerate(zip(term.formats, term_cores, strict=True)):
                if tuple(core.shape) != term.core_shape(c):
                    raise TensorNetError(f"core {c} has shape {tuple(core.shape)}, the spec says {term.core_shape(c)}")
                stored |= {part_name(t, c, part): value for part, value in fmt.encode(core).items()}
        return cls(spec, stored)

    @classmethod
    def sum(cls, networks: Iterable[TensorNetwork]) -> TensorNetwork:
        """One network whose terms are those of all given networks: their tensors add."""
        terms: list[TermSpec] = []
        stored: dict[str, Tensor] = {}
        specs = []
        for network in networks:
            specs.append(network.spec)
            for t, term in enumerate(network.spec.terms):
                stored |= network._parts_of(t, len(terms))
                terms.append(term)
        if not specs or len({spec.shape for spec in specs}) != 1:
            raise TensorNetError(f"only networks of one shape add, were given {[spec.shape for spec in specs]}")
        return cls(NetworkSpec(shape=specs[0].shape, dtype=specs[0].dtype, terms=tuple(terms)), stored)

    def single(self, term: int) -> TensorNetwork:
        """One term as a network of its own."""
        spec = self.spec.model_copy(update={"terms": (self.spec.terms[term],)})
        return TensorNetwork(spec, self._parts_of(term, 0))

    def _parts_of(self, term: int, number: int) -> dict[str, Tensor]:
        """Stored parts of a term, named as those of term ``number``."""
        spec = self.spec.terms[term]
        return {
            part_name(number, core, part): self.stored[part_name(term, core, part)]
            for core, fmt in enumerate(spec.formats)
            for part in fmt.parts(spec.core_shape(core))
        }

    def core(self, core: int, term: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
        """A decoded core."""
        return decode_core(self.spec.terms[term], term, core, self.stored, dtype)

    def cores(self, term: int = 0, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        """All decoded cores of a term."""
        return [self.core(core, term, dtype) for core in range(len(self.spec.terms[term].formats))]

    def to_dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """The tensor that the network stands for, shape ``spec.shape``; computed in at least float32."""
        target = dtype or DTYPES[self.spec.dtype]
        working = torch.float64 if target == torch.float64 else torch.float32
        parts = [contract_term(term, self.cores(t, working)) for t, term in enumerate(self.spec.terms)]
        return torch.stack(parts).sum(0).to(target) if len(parts) > 1 else parts[0].to(target)

    def packed_orders(self) -> dict[str, Tensor]:
        """The packed fibre orders under their flat names."""
        return {order_name(t, order.axis): pack_permutation(order.permutation) for t, order in _charged_orders(self.spec)}

    def stored_tensors(self) -> dict[str, Tensor]:
        """Everything that goes to a file under its flat name: encoded cores and packed orders."""
        return self.stored | self.packed_orders()

    @property
    def nbytes(self) -> int:
        """Bytes of the stored tensors: equals ``spec.nbytes`` and what the file holds."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.stored_tensors().values())

    def __str__(self) -> str:
        itemsize = DTYPES[self.spec.dtype].itemsize
        size = "x".join(map(str, self.spec.shape))
        dense = torch.Size(self.spec.shape).numel() * itemsize
        lines = [f"TensorNetwork {size} {self.spec.dtype}: {self.nbytes:,} B, ratio {self.nbytes / dense:.4f} of the original"]
        for t, term in enumerate(self.spec.terms):
            lines.extend(_term_lines(t, term))
        return "\n".join(lines)

    __repr__ = __str__


def _term_lines(number: int, term: TermSpec) -> list[str]:
    sizes = term.sizes()
    show = partial(map, lambda label: f"{label}={sizes[label]}")
    modes = " x ".join(map(str, term.layout.dims))
    lines = [f"  term {number}: modes {modes}" + (f" in order {term.layout.mode_order}" if len(term.layout.dims) > 2 else "")]
    for core, fmt in enumerate(term.formats):
        labels = ", ".join(show(term.topology.core_labels(core)))
        lines.append(f"    core {core} [{labels}]  {fmt.name}  {term.core_nbytes[core]:,} B")
    for bond, (a, b) in enumerate(term.topology.edges):
        lines.append(f"    {a} --{term.ranks[bond]}-- {b}")
    for order in term.layout.fibre_orders:
        lines.append(f"    order of axis {order.axis}: {order.nbytes:,} B" + (" (absorbed)" if order.absorbed else ""))
    return lines

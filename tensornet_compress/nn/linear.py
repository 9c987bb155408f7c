"""TNLinear: ``y = W x + b`` with W a network, contracted by a program planned for the batch size."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tensornet_compress.coding import FloatFormat, PivotFormat
from tensornet_compress.errors import TensorNetError
from tensornet_compress.nn.kinds import loaded, module_kind, turned
from tensornet_compress.nn.module import BATCH_BUCKETS, NetworkModule
from tensornet_compress.tensor import NetworkSpec, Program, TensorNetwork, TermSpec, plan_contraction


class TNLinear(NetworkModule):
    """A linear layer (..., in) -> (..., out) whose weight (out, in) is a network.

    It stands for ``nn.Linear`` and for transformers' ``Conv1D`` (whose weight is kept transposed; ``materialize`` gives the
    original class back).
    """

    axes = ("out", "in")

    def __init__(
        self,
        spec: NetworkSpec,
        stored: dict[str, Tensor] | None = None,
        bias: Tensor | None = None,
        conv1d: bool = False,
    ):
        super().__init__(spec, stored, bias)
        self.out_features, self.in_features = spec.shape
        self.conv1d = conv1d
        if conv1d:
            self.nf, self.nx = spec.shape
        self._chains = [_is_matrix_chain(term) for term in spec.terms]
        self._plain = _is_plain(spec)
        self._pivoted = _is_pivoted(spec)
        self._pivot_order: Tensor | None = None
        if self._pivoted:
            self._read_pivots()
            self.register_load_state_dict_post_hook(_read_pivots_again)
        self._programs = [
            [] if chain else [(bucket, self._plan(term, bucket)) for bucket in BATCH_BUCKETS]
            for term, chain in zip(spec.terms, self._chains)
        ]
        self._orders = [
            [_order_index(term, axis, inverse=axis == 0) for axis in (0, 1)] if not chain else [None, None]
            for term, chain in zip(spec.terms, self._chains)
        ]

    @classmethod
    def from_network(cls, network: TensorNetwork, bias: Tensor | None = None, conv1d: bool = False) -> TNLinear:
        """A layer from a network of shape (out, in)."""
        return cls(network.spec, dict(network.stored), bias, conv1d=conv1d)

    @classmethod
    def from_linear(cls, linear: Any, network: TensorNetwork) -> TNLinear:
        """Replace an ``nn.Linear`` or ``Conv1D`` by a network for its (out, in) weight; bias and device are kept."""
        return cls._in_place_of(linear, network, conv1d=module_kind(linear) == "conv1d")

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - as torch calls it
        """(..., in) -> (..., out)."""
        x = input
        if x.is_nested:
            return torch.nested.as_nested_tensor([self(part) for part in x.unbind()])
        if self._plain and self._held is None:
            parameters: Any = self._parameters
            right, bias = parameters["core1"], parameters["bias"]
            if right.dtype == x.dtype and (bias is None or bias.dtype == x.dtype):
                return F.linear(F.linear(x, right), parameters["core0"], bias)
        if self._pivoted and self._held is None:
            return self._from_pivots(x)
        y = self._of_term(x, 0)
        for number in range(1, len(self._chains)):
            y = y + self._of_term(x, number)
        return self._plus_bias(y)

    def _of_term(self, x: Tensor, number: int) -> Tensor:
        return self._through(x, number) if self._chains[number] else self._contract(number, x)

    def _through(self, x: Tensor, number: int) -> Tensor:
        """One matrix after the other; those in coded numbers are not decoded."""
        held = None if self._held is None else self.cores(x.dtype)[number]
        for core in reversed(range(len(self.spec.terms[number].formats))):
            if held is not None:
                x = F.linear(x, held[core])
            elif (product := self.times_codes(x, number, core)) is not None:
                x = product
            else:
                x = F.linear(x, self.decoded_core(number, core, x.dtype))
        return x

    def _read_pivots(self) -> None:
        """Unpack where each output lies when the pivots come first; a few bytes per output, kept beside what is stored."""
        term = self.spec.terms[0]
        fmt, packed = term.formats[0], self._buffers["core0_pivots"]
        assert isinstance(fmt, PivotFormat)
        assert packed is not None
        if not packed.is_meta:
            self._pivot_order = fmt.positions({"_pivots": packed}, term.core_shape(0)).int()

    def _from_pivots(self, x: Tensor) -> Tensor:
        """Outputs of the pivots are those of the right core; the others are combined from them."""
        parameters: Any = self._parameters
        assert self._pivot_order is not None
        at_pivots = F.linear(x, parameters["core1"].to(x.dtype))
        others = F.linear(at_pivots, parameters["core0"].to(x.dtype))
        return self._plus_bias(torch.cat([at_pivots, others], -1).index_select(-1, self._pivot_order.to(x.device)))

    def _contract(self, number: int, x: Tensor) -> Tensor:
        cores = self.cores(x.dtype)[number]
        term = self.spec.terms[number]
        tensorization = term.layout.tensorization
        row_order, column_order = self._orders[number]
        batch = x.shape[:-1]
        flat = x.reshape(-1, self.in_features)
        if column_order is not None:
            flat = flat.index_select(1, column_order.to(flat.device))
        padded_out, padded_in = tensorization.padded_shape
        if padded_in != self.in_features:
            flat = F.pad(flat, (0, padded_in - self.in_features))
        program = self._program(number, flat.shape[0])
        y = program.run([flat.reshape(-1, *tensorization.radices[1]), *cores]).reshape(-1, padded_out)[:, : self.out_features]
        if row_order is not None:
            y = y.index_select(1, row_order.to(y.device))
        return y.reshape(*batch, self.out_features)

    def _plan(self, term: TermSpec, batch: int) -> Program:
        rows, columns = (tuple(f"p{p}" for p in term.layout.axis_positions(axis)) for axis in (0, 1))
        inputs = [("n", *columns), *(term.topology.core_labels(core) for core in range(len(term.formats)))]
        # The larger of the dense weight and twice the larger of input and output.
        bound = max(self.out_features * self.in_features, 2 * batch * max(self.out_features, self.in_features))
        return plan_contraction(inputs, ("n", *rows), term.sizes() | {"n": batch}, bound, last=0)

    @property
    def weight(self) -> Tensor:
        """The contracted weight as the replaced module kept it; computed at each access."""
        return loaded(turned(super().weight, "conv1d" if self.conv1d else "linear"))

    @weight.setter
    def weight(self, value: Tensor) -> None:
        # PEFT assigns a layer its own weight when it takes an adapter off.
        if not torch.equal(value, self.weight):
            raise TensorNetError(
                "the weight of a network is computed from its cores; replace the layer by tnc.TNLinear.from_linear(dense, "
                "tnc.realise(weight, layer.spec))"
            )

    def materialize(self) -> nn.Module:
        """The dense layer of the original class (``nn.Linear`` or ``Conv1D``), in the original dtype."""
        layer: Any
        if self.conv1d:
            from transformers.pytorch_utils import Conv1D

            # On the meta device its constructor draws no random numbers.
            with torch.device("meta"):
                layer = Conv1D(self.out_features, self.in_features)
        else:
            layer = nn.Linear(self.in_features, self.out_features, self._parameters["bias"] is not None, device="meta")
        return self._made_dense(layer)

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, {self.spec.describe()}, bias={self._parameters['bias'] is not None}"


def _is_matrix_chain(term: TermSpec) -> bool:
    """True when the cores are plain matrices to apply one after the other: dense (out, in), or (out, r) and (r, in)."""
    return term.layout.is_native and term.topology.legs in (((0, 1),), ((0,), (1,)))


def _is_plain(spec: NetworkSpec) -> bool:
    """True for two float matrices of one format: the common case, which runs without any look-up."""
    term = spec.terms[0]
    same_float = isinstance(term.formats[0], FloatFormat) and len(set(term.formats)) == 1
    return len(spec.terms) == 1 and same_float and _is_matrix_chain(term) and len(term.formats) == 2


def _is_pivoted(spec: NetworkSpec) -> bool:
    """True for two floating point cores of which the first holds the identity, which is then not multiplied with."""
    term = spec.terms[0]
    if len(spec.terms) != 1 or not _is_matrix_chain(term) or len(term.formats) != 2:
        return False
    return isinstance(term.formats[0], PivotFormat) and isinstance(term.formats[1], FloatFormat)


def _read_pivots_again(layer: TNLinear, _keys: Any) -> None:
    layer._read_pivots()


def _order_index(term: TermSpec, axis: int, inverse: bool) -> Tensor | None:
    order = term.layout.fibre_order(axis)
    if order is None:
        return None
    return (order.inverse() if inverse else order).index()

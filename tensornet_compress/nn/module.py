"""What every replacement module shares: a network kept as plain parameters and buffers under flat names."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor, nn

from tensornet_compress.coding import CodedFormat
from tensornet_compress.coding.coded_format import RESIDENT_PARTS
from tensornet_compress.tensor import NetworkSpec, TensorNetwork, contract_term, expected_parts
from tensornet_compress.tensor.network import part_name


class NetworkModule(nn.Module):
    """Holds a network: float parts are parameters (trainable), packed integers are buffers.

    Cores stay in their stored number format and are decoded to the input's dtype at each call; ``decoded`` keeps them
    decoded for a while, which trades memory for speed.
    """

    def __init__(self, spec: NetworkSpec, stored: dict[str, Tensor] | None = None):
        super().__init__()
        self.spec = spec
        self._held: dict[torch.dtype, list[list[Tensor]]] | None = None
        for name, (shape, dtype) in expected_parts(spec).items():
            tensor = stored[name] if stored is not None else torch.empty(shape, dtype=dtype)
            if tensor.is_floating_point():
                self.register_parameter(name, nn.Parameter(tensor))
            else:
                self.register_buffer(name, tensor)
        if stored is not None:
            self._make_resident()

    def _coded_cores(self) -> Iterator[tuple[int, int, CodedFormat]]:
        """Term, core and format of the cores in entropy-coded integers."""
        for t, term in enumerate(self.spec.terms):
            for core, fmt in enumerate(term.formats):
                if isinstance(fmt, CodedFormat):
                    yield t, core, fmt

    def _make_resident(self) -> None:
        """Decode entropy-coded integers, once, to what products use; these buffers are not saved."""
        for t, core, fmt in self._coded_cores():
            name = part_name(t, core)
            resident = fmt.resident({"_coded": getattr(self, name + "_coded")}, self.spec.terms[t].core_shape(core))
            for part, tensor in resident.items():
                self.register_buffer(name + part, tensor, persistent=False)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *rest)
        if any(f"{prefix}{part_name(t, core)}_coded" in state_dict for t, core, _ in self._coded_cores()):
            self._make_resident()

    @property
    def resident_nbytes(self) -> int:
        """Bytes of memory that the module's tensors take, with what is kept decoded beside the stored parts."""
        tensors = [*self.parameters(recurse=False), *self.buffers(recurse=False)]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def core_parts(self, term: int, core: int) -> dict[str, Tensor]:
        """What ``decode`` of a core's format takes, by the names of its parts."""
        name, fmt = part_name(term, core), self.spec.terms[term].formats[core]
        parts = RESIDENT_PARTS if isinstance(fmt, CodedFormat) else fmt.parts(self.spec.terms[term].core_shape(core))
        return {part: getattr(self, name + part) for part in parts}

    def stored(self) -> dict[str, Tensor]:
        """The stored parts under their flat names."""
        parts = {name: getattr(self, name) for name in expected_parts(self.spec)}
        return {name: part.detach() for name, part in parts.items()}

    def network(self) -> TensorNetwork:
        """The module's weight as a ``TensorNetwork`` (sharing memory)."""
        return TensorNetwork(self.spec, self.stored())

    def share_network(self, other: NetworkModule) -> Self:
        """Use the very parameters of ``other``, so that a tied head stays tied."""
        for name in self.stored():
            delattr(self, name)
            part = getattr(other, name)
            if isinstance(part, nn.Parameter):
                self.register_parameter(name, part)
            else:
                self.register_buffer(name, part)
        for t, core, _ in self._coded_cores():
            for part in RESIDENT_PARTS:
                self.register_buffer(part_name(t, core) + part, getattr(other, part_name(t, core) + part), persistent=False)
        return self

    @property
    def nbytes(self) -> int:
        """Bytes that the network takes now, in the dtypes the module holds."""
        return self.network().nbytes

    def cores(self, dtype: torch.dtype) -> list[list[Tensor]]:
        """Decoded cores, one list per term; differentiable with respect to float parts."""
        if self._held is not None:
            if dtype not in self._held:
                with torch.no_grad():
                    self._held[dtype] = self._decode(dtype)
            return self._held[dtype]
        return self._decode(dtype)

    def _decode(self, dtype: torch.dtype) -> list[list[Tensor]]:
        return [
            [fmt.decode(self.core_parts(t, core), term.core_shape(core), dtype) for core, fmt in enumerate(term.formats)]
            for t, term in enumerate(self.spec.terms)
        ]

    def dense_weight(self, dtype: torch.dtype) -> Tensor:
        """The contracted weight of shape ``spec.shape``; differentiable."""
        dense = [contract_term(term, cores) for term, cores in zip(self.spec.terms, self.cores(dtype))]
        return dense[0] if len(dense) == 1 else torch.stack(dense).sum(0)

    @property
    def weight(self) -> Tensor:
        """The contracted weight; computed at each access."""
        return self.dense_weight(self.compute_dtype)

    @property
    def compute_dtype(self) -> torch.dtype:
        """Dtype of the module that was replaced."""
        return getattr(torch, self.spec.dtype)

    def extra_repr(self) -> str:
        return self.spec.describe()


@contextmanager
def decoded(model: nn.Module) -> Iterator[None]:
    """Keep decoded cores of every network module in memory: faster decoding of many short steps, no longer small.

    Inside the context the cores do not follow changes of the parameters.
    """
    modules = [module for module in model.modules() if isinstance(module, NetworkModule)]
    for module in modules:
        module._held = {}
    try:
        yield
    finally:
        for module in modules:
            module._held = None

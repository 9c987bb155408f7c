"""What all replacements of modules share: a network kept as plain parameters and buffers under flat names."""

from __future__ import annotations

from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from tensornet_compress.coding import CodedFormat, EntropyCoded, IntFormat
from tensornet_compress.coding.codes import Codes
from tensornet_compress.errors import TensorNetError
from tensornet_compress.kernels.coded_linear import coded_linear, looped_linear, may_loop
from tensornet_compress.kernels.loops import Loops, loops_for
from tensornet_compress.nn.kinds import layer_weight, loaded, shell
from tensornet_compress.tensor import NetworkSpec, Program, TensorNetwork, contract_term, expected_parts
from tensornet_compress.tensor.network import part_name

DECODES: ContextVar[bool] = ContextVar("decodes", default=True)
"""Whether modules that are made decode their entropy-coded parts at once."""
COMPUTED = "_weight_was_computed"
"""Set on what takes the place of a layer that computed its weight from others: its state has other names."""
_HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks", "_is_full_backward_hook",
)  # fmt: skip
# Numbers of vectors that programs are planned for.
BATCH_BUCKETS = (1, 16, 128, 1024)


_USUAL = set(nn.Module().__dict__) | {"in_features", "out_features", "output_padding", "nf", "nx"}
"""Attributes that a layer of torch or transformers has anyway."""


class _PlacedLoops(NamedTuple):
    """Loops over the codes of a core, and where its parts lay when they were made."""

    loops: Loops
    names: list[str]
    places: list[tuple[Any, ...]]


class NetworkModule(nn.Module):
    """Holds a network: float parts are parameters (trainable), packed integers are buffers.

    Matrices of coded numbers are multiplied with as they are (``times_codes``), other cores are decoded to the input's dtype at
    each call; ``decoded`` keeps them decoded for a while, which trades memory for speed.
    """

    axes: tuple[str, ...] = ()

    def __init__(self, spec: NetworkSpec, stored: dict[str, Tensor] | None = None, bias: Tensor | None = None):
        """``bias`` (outputs,) belongs to the module, not to the network.

        Raises:
            TensorNetError: the network has not the axes of such a module's weight.
        """
        super().__init__()
        if len(spec.shape) != len(self.axes):
            raise TensorNetError(f"{type(self).__name__} needs a weight ({', '.join(self.axes)}), the network has {spec.shape}")
        self.spec = spec
        # Looked up at each call; as constants they are nothing for torch.compile to follow.
        self._shapes = [[term.core_shape(core) for core in range(len(term.formats))] for term in spec.terms]
        self._programs: list[list[tuple[int, Program]]] = []
        self._held: dict[torch.dtype, list[list[Tensor]]] | None = None
        self._loops: dict[tuple[int, int], _PlacedLoops] = {}
        for name, (shape, dtype) in expected_parts(spec).items():
            tensor = stored[name] if stored is not None else torch.empty(shape, dtype=dtype)
            if tensor.is_floating_point():
                self.register_parameter(name, nn.Parameter(tensor))
            else:
                self.register_buffer(name, tensor)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias))
        if stored is not None and DECODES.get():
            self._make_resident()

    @classmethod
    def _in_place_of(cls, module: nn.Module, network: TensorNetwork, **options: Any) -> Self:
        """Mode, device and bias are those of the module that is replaced.

        Raises:
            TensorNetError: the network is not of the shape of the module's weight.
        """
        weight, bias = layer_weight(module), getattr(module, "bias", None)
        if network.spec.shape != tuple(weight.shape):
            given, wanted = network.spec.shape, tuple(weight.shape)
            raise TensorNetError(f"a {type(module).__name__} with weight {wanted} cannot take a network of shape {given}")
        if bias is not None:
            options["bias"] = bias.detach().clone()
        layer = cls(network.spec, stored=dict(network.stored), **options).stand_for(module)
        return layer.train(module.training).to(weight.device)

    def stand_for(self, module: nn.Module) -> Self:
        """Tell of itself what an original does that has a class or attributes of its own, and become of that class again when
        made dense; hooks stay."""
        own = not type(module).__module__.startswith(("torch.nn.modules.", "transformers.pytorch_utils"))
        usual = _USUAL | set(getattr(module, "__constants__", ()))
        if own or any(name not in usual and name[0] != "_" for name in module.__dict__):
            self.__dict__["_original"] = shell(module)
        # The very dicts: who holds a handle can still take his hook off.
        self.__dict__.update({name: module.__dict__[name] for name in _HOOKS})
        self.__dict__[COMPUTED] = module.__dict__.get(COMPUTED, False)
        return self

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            original = self.__dict__.get("_original")
            if original is None or name.startswith("_"):
                raise
            return getattr(original, name)

    def _made_dense(self, layer: Any) -> nn.Module:
        """A dense layer, made on the meta device, with this module's weight, bias and mode."""
        if (original := self.__dict__.get("_original")) is not None:
            layer = shell(original).to(self._parameters_device())
        layer.weight = nn.Parameter(self.weight.detach().contiguous())
        if (bias := self._parameters["bias"]) is not None:
            layer.bias = nn.Parameter(bias.detach().clone())
        layer.__dict__.update({name: self.__dict__[name] for name in _HOOKS})
        if self.__dict__.get(COMPUTED):
            layer.__dict__[COMPUTED] = True
        return layer.train(self.training)

    def _parameters_device(self) -> torch.device:
        return next(tensor.device for tensor in (*self.parameters(recurse=False), *self.buffers(recurse=False)))

    def _program(self, number: int, count: int) -> Program:
        """The program of a term for a number of vectors."""
        programs = self._programs[number]
        return next((program for bucket, program in programs if count <= bucket), programs[-1][1])

    def _plus_bias(self, y: Tensor) -> Tensor:
        bias = self._parameters["bias"]
        return y if bias is None else y + bias.to(y.dtype)

    def _coded_cores(self) -> Iterator[tuple[int, int, EntropyCoded]]:
        """Term, core and format of the entropy-coded cores."""
        for t, term in enumerate(self.spec.terms):
            for core, fmt in enumerate(term.formats):
                if isinstance(fmt, EntropyCoded):
                    yield t, core, fmt

    def _make_resident(self) -> None:
        """Decode entropy-coded parts, once, to what products use; these buffers are not saved. Those that are yet to be
        loaded (on the meta device) wait for it."""
        for t, core, fmt in self._coded_cores():
            name = part_name(t, core)
            if getattr(self, name + fmt.coded_part).is_meta:
                continue
            coded = {fmt.coded_part: getattr(self, name + fmt.coded_part)}
            resident = fmt.resident(coded, self._shapes[t][core])
            for part, tensor in resident.items():
                self.register_buffer(name + part, tensor, persistent=False)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *rest)
        if any(f"{prefix}{part_name(t, core)}{fmt.coded_part}" in state_dict for t, core, fmt in self._coded_cores()):
            self._make_resident()

    @property
    def resident_nbytes(self) -> int:
        """Bytes of memory that the module's tensors take, with what is kept decoded beside the stored parts."""
        tensors = [*self.parameters(recurse=False), *self.buffers(recurse=False)]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def core_parts(self, term: int, core: int) -> dict[str, Tensor]:
        """What ``decode`` of a core's format takes, by the names of its parts."""
        name, fmt = part_name(term, core), self.spec.terms[term].formats[core]
        parts = fmt.resident_parts if isinstance(fmt, EntropyCoded) else fmt.parts(self._shapes[term][core])
        if isinstance(fmt, EntropyCoded) and name + fmt.resident_parts[0] not in self._buffers:
            # transformers looks at weights before it tells that all are loaded.
            self._make_resident()
        return {part: self._tensor(name + part) for part in parts}

    def _tensor(self, name: str) -> Tensor:
        """A parameter or buffer, without the search that reading an attribute of a module is."""
        parameter = self._parameters.get(name)
        tensor = self._buffers[name] if parameter is None else parameter
        assert tensor is not None
        return tensor

    def times_codes(self, x: Tensor, term: int, core: int) -> Tensor | None:
        """``x W'`` with a core (first axis | all others) in coded numbers, which is not decoded: (..., width) -> (..., m).
        ``None`` where it is not in such numbers, or its scales learn."""
        quick = not torch.is_grad_enabled() and may_loop(x)
        kept = self._loops.get((term, core)) if quick else None
        if kept is not None and kept.places == self._places(kept.names):
            return looped_linear(x, kept.loops)
        codes = self._codes(term, core)
        if codes is None:
            return None
        loops = loops_for(codes) if quick else None
        if loops is None:
            return coded_linear(x, codes)
        names = [part_name(term, core) + part for part in self.core_parts(term, core)]
        self._loops[term, core] = _PlacedLoops(loops, names, self._places(names))
        return looped_linear(x, loops)

    def _places(self, names: list[str]) -> list[tuple[Any, ...]]:
        """All that loops depend on: where parts lie and how. None of it outlives a move, a cast or another tensor in place."""
        return [
            (part.data_ptr(), part.numel(), part.dtype, part.is_contiguous(), part.is_cpu) for part in map(self._tensor, names)
        ]

    def _codes(self, term: int, core: int) -> Codes | None:
        fmt, shape = self.spec.terms[term].formats[core], self._shapes[term][core]
        if not isinstance(fmt, IntFormat | CodedFormat):
            return None
        codes = fmt.operands(self.core_parts(term, core), shape)
        learns = torch.is_grad_enabled() and codes.scale.requires_grad
        return codes if len(codes.scale) == shape[0] and not learns else None

    def __getstate__(self) -> dict[str, Any]:
        # Addresses are nothing to copies.
        return {**self.__dict__, "_loops": {}}

    def decoded_core(self, term: int, core: int, dtype: torch.dtype) -> Tensor:
        """A core, decoded; differentiable with respect to float parts."""
        return self.spec.terms[term].formats[core].decode(self.core_parts(term, core), self._shapes[term][core], dtype)

    def stored(self) -> dict[str, Tensor]:
        """The stored parts under their flat names."""
        parts = {name: getattr(self, name) for name in expected_parts(self.spec)}
        return {name: part.detach() for name, part in parts.items()}

    def network(self) -> TensorNetwork:
        """The module's weight as a ``TensorNetwork`` (sharing memory)."""
        return TensorNetwork(self.spec, self.stored())

    def share_network(self, other: NetworkModule) -> Self:
        """Use the very parameters of ``other``, so that a tied head stays tied."""
        for own, others in ((self._parameters, other._parameters), (self._buffers, other._buffers)):
            own.update({name: part for name, part in others.items() if name != "bias"})  # type: ignore[misc]
        self._non_persistent_buffers_set |= other._non_persistent_buffers_set
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
            [self.decoded_core(t, core, dtype) for core in range(len(term.formats))] for t, term in enumerate(self.spec.terms)
        ]

    def dense_weight(self, dtype: torch.dtype) -> Tensor:
        """The contracted weight of shape ``spec.shape``; differentiable."""
        dense = [contract_term(term, cores) for term, cores in zip(self.spec.terms, self.cores(dtype))]
        return dense[0] if len(dense) == 1 else torch.stack(dense).sum(0)

    @property
    def weight(self) -> Tensor:
        """The contracted weight; computed at each access."""
        return loaded(self.dense_weight(self.compute_dtype))

    @property
    def compute_dtype(self) -> torch.dtype:
        """Dtype of the module that was replaced."""
        return getattr(torch, self.spec.dtype)

    def extra_repr(self) -> str:
        return self.spec.describe()

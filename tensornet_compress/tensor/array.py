"""An array that stays a network: slices, sums and inner products contract only what they ask for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tensornet_compress.errors import TensorNetError
from tensornet_compress.tensor.contraction import Labels, Program, plan_contraction
from tensornet_compress.tensor.network import TensorNetwork
from tensornet_compress.tensor.spec import TermSpec


@dataclass(frozen=True)
class _Axis:
    """What is asked of an axis: all of it (``index`` None), or its entries ``index`` (int64), which ``summed`` adds up.

    ``cover``: contract with all entries that share a most significant digit with one that is asked for, and choose
    afterwards; otherwise the digits of every entry are looked up in the cores. Which is less work depends on the order of
    modes.
    """

    index: Tensor | None = None
    summed: bool = False
    cover: bool = False


_Operand = tuple[Tensor, Labels]


class TensorArray:
    """A network read like an array of NumPy: ``x[10:20, :, 3]``, ``x.sum(axis=0)``, ``np.asarray(x)``.

    Cores are decoded once. Of a network in one core, and of entry-wise corrections, every slice needs all numbers.

    >>> import numpy as np, torch, tensornet_compress as tnc
    >>> x = torch.linspace(0, 1, 64)
    >>> array = TensorArray(tnc.to_network(torch.outer(x.sin(), x.cos()).reshape(64, 8, 8), max_error=1e-6))
    >>> array.shape, array.dtype, array[3:5, :, 2].shape
    ((64, 8, 8), dtype('float32'), (2, 8))
    >>> bool(np.allclose(array[3:5, :, 2], np.asarray(array)[3:5, :, 2], atol=1e-5))
    True
    >>> bool(np.isclose(array.mean(), np.asarray(array).mean()))
    True
    """

    def __init__(self, network: TensorNetwork):
        self.network, self.shape = network, network.spec.shape
        self.dtype = np.dtype("float32" if network.spec.dtype == "bfloat16" else network.spec.dtype)
        self._cores: list[list[Tensor]] | None = None

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of entries."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Stored bytes: cores and packed orders."""
        return self.network.nbytes

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError("len() of an array without axes")
        return self.shape[0]

    def __repr__(self) -> str:
        return f"TensorArray {self.shape} {self.dtype}, {self.nbytes:,} bytes: {self.network.spec.describe()}"

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError("an array that is a network is decoded, so it cannot be had without a copy")
        return self[...].astype(dtype or self.dtype, copy=False)

    def __getitem__(self, key: Any) -> np.ndarray:
        """As an array of NumPy, for whole numbers, slices, ``...`` and lists of whole numbers or booleans on one axis.

        Raises:
            TensorNetError: any other key.
            IndexError: an index outside the array, or too many of them.
        """
        asked, dropped = self._asked(key)
        dense = self._contract(asked, torch.float64 if self.dtype == np.float64 else torch.float32)
        return dense.numpy().astype(self.dtype, copy=False).squeeze(tuple(dropped))

    def sum(
        self, axis: int | Sequence[int] | None = None, dtype: Any = None, out: None = None, keepdims: bool = False
    ) -> np.ndarray | np.floating:
        """Sums over all axes, or some of them, without forming the array; in double precision. ``np.sum`` calls it.

        Raises:
            TensorNetError: ``out``, which nothing is written to.
        """
        if out is not None:
            raise TensorNetError("sums of a network are new arrays; leave out=... out")
        summed = self._axes(axis)
        every = [_Axis(torch.arange(size), summed=True) if a in summed else _Axis() for a, size in enumerate(self.shape)]
        total: np.ndarray = self._contract(every, torch.float64).numpy()
        if keepdims:
            total = total.reshape([1 if a in summed else size for a, size in enumerate(self.shape)])
        total = total if dtype is None else total.astype(dtype)
        return total[()] if total.ndim == 0 else total

    def mean(
        self, axis: int | Sequence[int] | None = None, dtype: Any = None, out: None = None, keepdims: bool = False
    ) -> np.ndarray | np.floating:
        """As ``sum``, over the number of entries that it adds up."""
        found = self.sum(axis, None, out, keepdims) / prod(self.shape[a] for a in self._axes(axis))
        return found if dtype is None else found.astype(dtype)

    def inner(self, other: TensorArray | np.ndarray | Tensor) -> float:
        """The sum of products of entries, with another network (of any layout) or a dense array of the same shape.

        Raises:
            TensorNetError: the shapes differ.
        """
        if tuple(other.shape) != self.shape:
            raise TensorNetError(f"an inner product needs equal shapes, was given {self.shape} and {tuple(other.shape)}")
        if isinstance(other, TensorArray):
            mine = list(zip(self.network.spec.terms, self._decoded(torch.float64)))
            theirs = list(zip(other.network.spec.terms, other._decoded(torch.float64)))
            return sum(_pair(*one, *two) for one in mine for two in theirs)
        dense = torch.as_tensor(np.asarray(other)).double()
        total = 0.0
        for term, cores in zip(self.network.spec.terms, self._decoded(torch.float64)):
            operands = [(core, term.topology.core_labels(c)) for c, core in enumerate(cores)]
            laid = (term.layout.apply(dense), tuple(f"p{p}" for p in range(len(term.layout.dims))))
            total += _run([*operands, laid], ()).item()
        return total

    def norm(self) -> float:
        """The square root of the sum of squares."""
        return max(self.inner(self), 0.0) ** 0.5

    def _decoded(self, dtype: torch.dtype) -> list[list[Tensor]]:
        if self._cores is None or (dtype == torch.float64 and self._cores[0][0].dtype != dtype):
            terms = range(len(self.network.spec.terms))
            self._cores = [self.network.cores(term, dtype) for term in terms]
        return [[core.to(dtype) for core in cores] for cores in self._cores]

    def _contract(self, asked: Sequence[_Axis], dtype: torch.dtype) -> Tensor:
        terms = zip(self.network.spec.terms, self._decoded(dtype))
        dense, *others = (_contract_term(term, cores, asked) for term, cores in terms)
        return sum(others, start=dense)

    def _axes(self, axis: int | Sequence[int] | None) -> set[int]:
        wanted = range(self.ndim) if axis is None else [axis] if isinstance(axis, int) else axis
        if any(not -self.ndim <= a < self.ndim for a in wanted):
            raise IndexError(f"axis {axis} of an array with {self.ndim} axes")
        return {a % self.ndim for a in wanted}

    def _asked(self, key: Any) -> tuple[list[_Axis], list[int]]:
        """What a key asks of each axis, and the axes that it drops."""
        keys = list(key) if isinstance(key, tuple) else [key]
        ellipses = [number for number, item in enumerate(keys) if item is Ellipsis]
        if len(keys) - len(ellipses) > self.ndim or len(ellipses) > 1:
            raise IndexError(f"{len(keys)} indices for an array with {self.ndim} axes")
        at = ellipses[0] if ellipses else len(keys)
        missing = self.ndim - (len(keys) - len(ellipses))
        keys = [*keys[:at], *[slice(None)] * missing, *keys[at + 1 :]]
        asked, dropped, lists = [], [], 0
        for axis, (item, size) in enumerate(zip(keys, self.shape)):
            if isinstance(item, slice):
                steps = range(*item.indices(size))
                asked.append(_Axis() if steps == range(size) else _Axis(torch.tensor(list(steps), dtype=torch.int64)))
                continue
            array = np.asarray(item)
            lists += array.ndim
            known = array.dtype.kind in "iu" or not array.size or (array.dtype == bool and array.ndim == 1)
            if not known or array.ndim > 1 or lists > 1:
                raise TensorNetError(f"the index {item!r} is not known here; decode first: np.asarray(x)[...]")
            if array.dtype == bool:
                if len(array) != size:
                    raise IndexError(f"{len(array)} booleans for an axis of {size}")
                array = np.flatnonzero(array)
            index = torch.from_numpy(array.astype(np.int64).reshape(-1))
            if len(index) and not (-size <= int(index.min()) and int(index.max()) < size):
                raise IndexError(f"index {item!r} for an axis of {size}")
            asked.append(_Axis(index % size))
            dropped += [axis] if array.ndim == 0 else []
        if lists and dropped:
            raise TensorNetError("a list beside single numbers is not known here; give slices such as 3:4 in their place")
        return asked, dropped


def _pair(one: TermSpec, cores: list[Tensor], two: TermSpec, others: list[Tensor]) -> float:
    """The inner product of two terms: digits are summed over where both write an axis in the same ones, entries otherwise."""
    radices, theirs, shape = one.layout.tensorization.radices, two.layout.tensorization.radices, one.layout.shape
    asked = [
        _Axis()
        if radices[axis] == theirs[axis]
        and prod(radices[axis]) == size
        and one.layout.fibre_order(axis) == two.layout.fibre_order(axis)
        else _Axis(torch.arange(size))
        for axis, size in enumerate(shape)
    ]
    operands: list[_Operand] = []
    for side, (term, mine) in enumerate(((one, cores), (two, others))):
        positions = [term.layout.axis_positions(axis) for axis in range(len(shape))]
        digits = {f"p{p}": f"digit {d} of {axis}" for axis, places in enumerate(positions) for d, p in enumerate(places)}
        for tensor, labels in _operands(term, mine, asked):
            names = tuple(digits.get(label, label if label[0] == "x" else f"{label} of {side}") for label in labels)
            operands.append((tensor, names))
    return float(_run(operands, ()).item())


def _contract_term(term: TermSpec, cores: list[Tensor], asked: Sequence[_Axis]) -> Tensor:
    """The entries that are asked for, axes in order, summed ones left out."""
    picked = [axis for axis, wish in enumerate(asked) if wish.index is not None and not wish.summed]
    ways = [list(asked)]
    if any(len(term.layout.tensorization.radices[axis]) > 1 for axis in picked):
        ways.append([_Axis(w.index, cover=True) if a in picked else w for a, w in enumerate(asked)])
    plans = []
    for way in ways:
        operands = _operands(term, cores, way)
        output = _output(term, way)
        plans.append((_plan(operands, output), operands, way))
    program, operands, way = min(plans, key=lambda plan: plan[0].multiply_adds)
    return _arranged(term, program.run([tensor for tensor, _ in operands]), way)


def _operands(term: TermSpec, cores: list[Tensor], asked: Sequence[_Axis]) -> list[_Operand]:
    """Cores with the digits of what is asked for, in the place of all their digits."""
    operands = []
    for number, core in enumerate(cores):
        labels = term.topology.core_labels(number)
        for axis, wish in enumerate(asked):
            if wish.index is not None:
                core, labels = _pick(term, core, labels, axis, wish)
        operands.append((core, labels))
    return operands


def _pick(term: TermSpec, core: Tensor, labels: Labels, axis: int, wish: _Axis) -> _Operand:
    positions = term.layout.axis_positions(axis)
    legs = {place: positions.index(int(label[1:])) for place, label in enumerate(labels) if _is_leg(label, positions)}
    assert wish.index is not None
    if not legs:
        return core, labels
    if wish.summed and prod(term.layout.tensorization.radices[axis]) == term.layout.shape[axis]:
        return core.sum(tuple(legs)), tuple(label for place, label in enumerate(labels) if place not in legs)
    digits = term.layout.tensorization.digits(axis, _placed(term, axis, wish.index))
    if wish.cover:
        first = next((place for place, digit in legs.items() if digit == 0), None)
        return (core if first is None else core.index_select(first, digits[0].unique())), labels
    rest = [place for place in range(core.ndim) if place not in legs]
    looked_up = core.permute(*legs, *rest)[tuple(digits[digit] for digit in legs.values())]
    return looked_up, (f"x{axis}", *(labels[place] for place in rest))


def _is_leg(label: str, positions: Iterable[int]) -> bool:
    return label[0] == "p" and int(label[1:]) in positions


def _placed(term: TermSpec, axis: int, index: Tensor) -> Tensor:
    """Where entries of an axis lie once its fibres are put in order."""
    order = term.layout.fibre_order(axis)
    return index if order is None else order.inverse().index()[index]


def _output(term: TermSpec, asked: Sequence[_Axis]) -> Labels:
    labels: list[str] = []
    for axis, wish in enumerate(asked):
        if wish.index is None or wish.cover:
            labels += [f"p{p}" for p in term.layout.axis_positions(axis)]
        elif not wish.summed:
            labels.append(f"x{axis}")
    return tuple(labels)


def _arranged(term: TermSpec, tensor: Tensor, asked: Sequence[_Axis]) -> Tensor:
    """Digits of whole and covered axes -> their entries, without padding and in their own order."""
    done = 0
    for axis, wish in enumerate(asked):
        if wish.summed:
            continue
        if wish.index is None or wish.cover:
            digits = len(term.layout.tensorization.radices[axis])
            tensor = tensor.flatten(done, done + digits - 1)
            place = _placed(term, axis, torch.arange(term.layout.shape[axis]) if wish.index is None else wish.index)
            if wish.cover:
                rest = prod(term.layout.tensorization.radices[axis][1:])
                first = torch.div(place, rest, rounding_mode="floor")
                place = torch.searchsorted(first.unique(), first) * rest + place % rest
            if wish.cover or tensor.shape[done] != len(place) or term.layout.fibre_order(axis) is not None:
                tensor = tensor.index_select(done, place)
        done += 1
    return tensor


def _plan(operands: Sequence[_Operand], output: Labels) -> Program:
    sizes = {label: size for tensor, labels in operands for label, size in zip(labels, tensor.shape)}
    return plan_contraction([labels for _, labels in operands], output, sizes, quick=True)


def _run(operands: Sequence[_Operand], output: Labels) -> Tensor:
    return _plan(operands, output).run([tensor for tensor, _ in operands])

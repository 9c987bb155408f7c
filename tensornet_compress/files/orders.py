"""Fibre orders travel as packed tensors; the manifest's specs only say that they exist."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from tensornet_compress.coding import unpack_permutation
from tensornet_compress.nn.plan import Plan
from tensornet_compress.tensor import FibreOrder, NetworkSpec, TermSpec
from tensornet_compress.tensor.network import order_name


def without_permutations(plan: Plan) -> Plan:
    """The plan with stored permutations left out."""
    return _map_specs(plan, lambda _name, spec: spec_without_permutations(spec))


def with_permutations(plan: Plan, read: Callable[[str], Tensor]) -> Plan:
    """The plan with permutations unpacked from tensors; ``read`` gives a tensor by its full name."""
    return _map_specs(plan, lambda name, spec: spec_with_permutations(spec, lambda order: read(f"{name}.{order}")))


def spec_without_permutations(spec: NetworkSpec) -> NetworkSpec:
    """The spec with stored permutations left out."""
    return _map_orders(spec, lambda _number, _term, order: order.model_copy(update={"permutation": ()}))


def spec_with_permutations(spec: NetworkSpec, read: Callable[[str], Tensor]) -> NetworkSpec:
    """The spec with permutations unpacked from tensors; ``read`` gives a tensor by its name in the network."""

    def unpack(number: int, term: TermSpec, order: FibreOrder) -> FibreOrder:
        packed = read(order_name(number, order.axis))
        return order.model_copy(update={"permutation": unpack_permutation(packed, term.layout.shape[order.axis])})

    return _map_orders(spec, unpack)


def _map_specs(plan: Plan, change: Callable[[str, NetworkSpec], NetworkSpec]) -> Plan:
    layers = {name: layer.model_copy(update={"spec": change(name, layer.spec)}) for name, layer in plan.layers.items()}
    return plan.model_copy(update={"layers": layers})


def _map_orders(spec: NetworkSpec, change: Callable[[int, TermSpec, FibreOrder], FibreOrder]) -> NetworkSpec:
    terms = []
    for number, term in enumerate(spec.terms):
        orders = tuple(o if o.absorbed else change(number, term, o) for o in term.layout.fibre_orders)
        terms.append(term.model_copy(update={"layout": term.layout.model_copy(update={"fibre_orders": orders})}))
    return spec.model_copy(update={"terms": tuple(terms)})

"""Fibre orders travel as packed tensors; the manifest's specs only say that they exist."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from tensornet_compress.layout import FibreOrder, unpack_permutation
from tensornet_compress.network import NetworkSpec, TermSpec
from tensornet_compress.network.network import order_name
from tensornet_compress.plan import Plan


def without_permutations(plan: Plan) -> Plan:
    """The plan with stored permutations left out."""
    return _map_orders(plan, lambda _name, _number, _term, order: order.model_copy(update={"permutation": ()}))


def with_permutations(plan: Plan, read: Callable[[str], Tensor]) -> Plan:
    """The plan with permutations unpacked from tensors; ``read`` gives a tensor by its full name."""

    def unpack(layer: str, number: int, term: TermSpec, order: FibreOrder) -> FibreOrder:
        packed = read(f"{layer}.{order_name(number, order.axis)}")
        return order.model_copy(update={"permutation": unpack_permutation(packed, term.layout.shape[order.axis])})

    return _map_orders(plan, unpack)


def _map_orders(plan: Plan, change: Callable[[str, int, TermSpec, FibreOrder], FibreOrder]) -> Plan:
    layers = {}
    for name, layer in plan.layers.items():
        terms = []
        for number, term in enumerate(layer.spec.terms):
            orders = tuple(o if o.absorbed else change(name, number, term, o) for o in term.layout.fibre_orders)
            terms.append(_with_orders(term, orders))
        spec: NetworkSpec = layer.spec.model_copy(update={"terms": tuple(terms)})
        layers[name] = layer.model_copy(update={"spec": spec})
    return plan.model_copy(update={"layers": layers})


def _with_orders(term: TermSpec, orders: tuple[FibreOrder, ...]) -> TermSpec:
    return term.model_copy(update={"layout": term.layout.model_copy(update={"fibre_orders": orders})})

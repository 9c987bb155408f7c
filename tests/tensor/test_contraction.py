import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tensornet_compress.tensor import plan_contraction
from tests.generators import SEEDS, named_topologies, random_tensor


@st.composite
def contractions(draw):
    """Operands of a tree network with a batched input vector, as layers contract them."""
    positions = draw(st.integers(1, 4))
    topology = draw(named_topologies(positions))
    sizes = {f"p{p}": draw(st.integers(1, 4)) for p in range(positions)}
    sizes |= {f"b{b}": draw(st.integers(1, 3)) for b in range(len(topology.edges))} | {"n": draw(st.integers(1, 5))}
    summed = draw(st.sets(st.integers(0, positions - 1)))
    inputs = [("n", *(f"p{p}" for p in sorted(summed)))] + [topology.core_labels(c) for c in range(len(topology.legs))]
    output = ("n", *(f"p{p}" for p in range(positions) if p not in summed))
    return inputs, output, sizes


def operands_of(inputs, sizes, seed=0):
    return [random_tensor(tuple(sizes[x] for x in labels), seed + i) for i, labels in enumerate(inputs)]


def torch_einsum(inputs, output, operands):
    letters = {label: chr(97 + i) for i, label in enumerate(dict.fromkeys(x for labels in inputs for x in labels))}
    equation = ",".join("".join(letters[x] for x in labels) for labels in inputs)
    return torch.einsum(equation + "->" + "".join(letters[x] for x in output), *operands)


@given(contractions(), SEEDS, st.sampled_from([None, 1, 20]), st.booleans())
def test_programs_equal_one_einsum(case, seed, bound, deferred):
    inputs, output, sizes = case
    operands = operands_of(inputs, sizes, seed)
    program = plan_contraction(inputs, output, sizes, bound, last=0 if deferred else None)
    wanted = torch_einsum(inputs, output, operands)
    assert torch.allclose(program.run(operands), wanted, atol=1e-9 * max(1.0, float(wanted.abs().max())))
    assert all(step.equation.count(",") <= 1 for step in program.steps)


@given(contractions())
def test_the_bound_holds_where_some_order_allows_it(case):
    """Contracting without a bound but for size shows what is possible."""
    inputs, output, sizes = case
    smallest = plan_contraction(inputs, output, sizes, max_intermediate=0).largest_intermediate
    cheapest = plan_contraction(inputs, output, sizes)
    for bound in (smallest, smallest + 1, cheapest.largest_intermediate):
        program = plan_contraction(inputs, output, sizes, max_intermediate=bound)
        assert program.largest_intermediate <= max(bound, smallest)
        assert program.multiply_adds >= cheapest.multiply_adds
    unbounded = plan_contraction(inputs, output, sizes, max_intermediate=10**9)
    assert unbounded.multiply_adds == cheapest.multiply_adds


@given(contractions(), SEEDS)
def test_the_announced_intermediates_are_the_real_ones(case, seed):
    inputs, output, sizes = case
    program = plan_contraction(inputs, output, sizes)
    stack = operands_of(inputs, sizes, seed)
    largest = 0
    for number, step in enumerate(program.steps):
        chosen = [stack.pop(i) for i in sorted({step.left, step.right}, reverse=True)][::-1]
        stack.append(torch.einsum(step.equation, *chosen))
        if number < len(program.steps) - 1:
            largest = max(largest, stack[-1].numel())
    assert program.largest_intermediate == largest
    assert len(stack) == 1


def test_a_bound_changes_the_order_when_it_must():
    """At a large batch the cheapest order of a train keeps (batch x rank) vectors; a small bound forbids them."""
    inputs = [("n", "p1"), ("p0", "b0"), ("b0", "p1")]
    sizes = {"n": 1000, "p0": 8, "p1": 8, "b0": 4}
    free = plan_contraction(inputs, ("n", "p0"), sizes, last=0)
    bounded = plan_contraction(inputs, ("n", "p0"), sizes, max_intermediate=64, last=0)
    assert free.largest_intermediate > 64
    assert bounded.largest_intermediate == 64
    assert bounded.multiply_adds >= free.multiply_adds
    operands = operands_of(inputs, sizes)
    assert torch.allclose(free.run(operands), bounded.run(operands), atol=1e-9)


def test_multiply_adds_by_hand():
    program = plan_contraction([("a", "b"), ("b", "c")], ("a", "c"), {"a": 3, "b": 4, "c": 5})
    assert program.multiply_adds == 60
    assert program.largest_intermediate == 0
    chain = plan_contraction([("a", "b"), ("b", "c"), ("c", "d")], ("a", "d"), {"a": 2, "b": 10, "c": 10, "d": 2})
    assert chain.multiply_adds == 2 * 10 * 10 + 2 * 10 * 2
    assert chain.largest_intermediate == 20


def test_the_batch_decides_the_order():
    """One vector goes through the cores; very many are worth building the small weight for."""
    inputs = [("n", "p1"), ("p0", "b0"), ("b0", "p1")]

    def first_step_has_input(batch):
        sizes = {"n": batch, "p0": 4, "p1": 4, "b0": 64}
        return 0 in (plan_contraction(inputs, ("n", "p0"), sizes, last=0).steps[0].left,)

    assert first_step_has_input(1)
    assert not first_step_has_input(10_000)


@given(contractions(), SEEDS)
def test_gradients_flow_to_every_operand(case, seed):
    inputs, output, sizes = case
    operands = [operand.requires_grad_() for operand in operands_of(inputs, sizes, seed)]
    program = plan_contraction(inputs, output, sizes)
    assert torch.autograd.gradcheck(lambda *cores: program.run(cores), operands, fast_mode=True)


@pytest.mark.parametrize("cores", [1, 2, 6])
def test_programs_compile_without_graph_breaks(cores):
    inputs = [(f"b{i}", f"p{i}", f"b{i + 1}") for i in range(cores)]
    sizes = {f"b{i}": 1 if i in (0, cores) else 3 for i in range(cores + 1)} | {f"p{i}": 2 for i in range(cores)}
    output = tuple(f"p{i}" for i in range(cores))
    program = plan_contraction(inputs, output, sizes)
    operands = operands_of(inputs, sizes)
    compiled = torch.compile(lambda *values: program.run(values), fullgraph=True, dynamic=True, backend="eager")
    assert torch.allclose(compiled(*operands), program.run(operands))

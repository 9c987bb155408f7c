"""Attention over coded tokens in one go: what softmax attention over the decoded ones gives."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from tensornet_compress.coding.planes import UNIT, PlaneLayout, Planes
from tensornet_compress.kernels.plane_attention import CodedTokens, attended, attends

BITS = (0, 1, 2, 3, 4, 5, 6, 8)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def coded(batch: int, heads: int, width: int, units: tuple[int, ...], few: int, recent: int, seed: int) -> CodedTokens:
    layout, tokens = PlaneLayout.of(torch.tensor(BITS)), UNIT * sum(units)
    generator = torch.Generator().manual_seed(seed)
    codes = torch.stack([torch.randint(0, 1 << b, (batch, tokens), generator=generator) for b in BITS], -1)
    planes = Planes(tuple(layout.pack(part) for part in codes.split([UNIT * count for count in units], 1)))
    rows = 0.03 * drawn(layout.count + 1, heads * width, seed=seed + 1)
    return CodedTokens(
        layout, planes, rows, drawn(batch, heads, few, width, seed=seed + 2), drawn(batch, heads, recent, width, seed=seed + 3)
    )


def decoded(side: CodedTokens, left_out: Tensor, heads: int) -> Tensor:
    """(batch, heads, tokens, width) in double precision."""
    fields = torch.cat([side.layout.unpack(chunk) for chunk in side.planes.chunks], -1).double()
    whole = fields.mT @ side.rows[:-1].double() + side.rows[-1].double()
    whole = whole.unflatten(-1, (heads, -1)).transpose(1, 2).clone()
    for b, places in enumerate(left_out):
        whole[b, :, places] = side.sinks[b].double()
    return torch.cat([whole, side.tail.double()], 2)


def both(batch: int, heads: int, queries: int, units: tuple[int, ...], few: int, recent: int) -> tuple[Tensor, Tensor]:
    query = drawn(batch, heads, queries, 24, seed=9)
    keys, values = (coded(batch, heads, 24, units, few, recent, seed) for seed in (0, 20))
    left_out = torch.stack([torch.randperm(UNIT * sum(units))[:few] for _ in range(batch)])
    assert attends(query, keys.planes, values.planes)
    wanted = scaled_dot_product_attention(
        query.double(), *(decoded(side, left_out, heads) for side in (keys, values)), scale=1.0, enable_gqa=False
    )
    return attended(query, left_out, keys, values), wanted


@pytest.mark.parametrize("queries", [1, 3, 7])
@pytest.mark.parametrize("units", [(1,), (2, 1), (9, 16, 3)])
@pytest.mark.parametrize(("few", "recent"), [(0, 1), (4, 70)])
def test_gives_the_attention_of_the_decoded_tokens(queries: int, units: tuple[int, ...], few: int, recent: int) -> None:
    found, wanted = both(2, 3, queries, units, few, recent)
    torch.testing.assert_close(found.double(), wanted, atol=1e-5, rtol=1e-5)


def test_scores_far_apart_neither_overflow_nor_vanish() -> None:
    keys, values = (coded(1, 1, 8, (3,), 0, 2, seed) for seed in (0, 20))
    left_out = torch.zeros(1, 0, dtype=torch.int64)
    for size in (1e-3, 30.0, 3e3, -3e3):
        query = size * torch.ones(1, 1, 1, 8)
        wanted = scaled_dot_product_attention(
            query.double(), *(decoded(side, left_out, 1) for side in (keys, values)), scale=1.0
        )
        torch.testing.assert_close(attended(query, left_out, keys, values).double(), wanted, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("where", ["query", "tail", "rows"])
def test_what_is_not_a_number_is_told(where: str) -> None:
    keys, values = (coded(1, 1, 8, (2,), 2, 5, seed) for seed in (0, 20))
    query = torch.ones(1, 1, 1, 8)
    {"query": query, "tail": keys.tail, "rows": keys.rows}[where].view(-1)[0] = float("nan")
    assert attended(query, torch.tensor([[0, 70]]), keys, values).isnan().all()


def test_threads_do_not_change_a_bit() -> None:
    before, found = torch.get_num_threads(), []
    torch.manual_seed(0)
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            torch.manual_seed(0)
            found.append(both(1, 3, 4, (40, 5), 4, 30)[0])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


def test_others_are_left_to_products() -> None:
    keys, values = (coded(1, 2, 8, units, 0, 1, 0).planes for units in ((2, 1), (3,)))
    assert not attends(drawn(1, 2, 1, 8), keys, values)
    assert not attends(drawn(1, 2, 100, 8), keys, keys)
    assert not attends(drawn(1, 2, 1, 8).double(), keys, keys)
    assert not attends(drawn(1, 2, 1, 8), Planes(()), Planes(()))

"""Groups of units by mutual information."""

from __future__ import annotations

import pytest
import torch

from tensornet_compress.decompose.groups import (
    consecutive_groups,
    joint_bits,
    pair_information,
    search_groups,
    unit_channels,
)
from tests.kv.test_tree import UNITS, WIDTH, covariance_of_pairs


def test_pairs_are_found() -> None:
    pairs = [(0, 5), (1, 3), (2, 4)]
    covariance = covariance_of_pairs(pairs)
    information = pair_information(covariance, 0.05, WIDTH)
    assert {tuple(sorted((u, int(information[u].argmax())))) for u in range(UNITS)} == set(pairs)
    groups, bits = search_groups(covariance, 0.05, WIDTH, 2)
    assert {tuple(sorted(group)) for group in groups} == set(pairs)
    native = sum(joint_bits(covariance, 0.05, unit_channels(g, WIDTH)) for g in consecutive_groups(UNITS, 2))
    assert min(bits.values()) < native == bits["native"]


def test_without_structure_the_native_order_stays() -> None:
    groups, _ = search_groups(torch.eye(UNITS * WIDTH), 0.1, WIDTH, 2)
    assert groups == consecutive_groups(UNITS, 2) == [[0, 1], [2, 3], [4, 5]]


def test_mutual_information_of_a_known_pair() -> None:
    """Two scalars of correlation r share -1/2 log2(1 - r^2) bits."""
    r, noise = 0.8, 1e-6
    found = pair_information(torch.tensor([[1.0, r], [r, 1.0]]), noise, 1)
    assert found[0, 1].item() == pytest.approx(-0.5 * torch.log2(torch.tensor(1 - r * r)).item(), rel=1e-3)


def test_uneven_groups_are_even_as_can_be() -> None:
    assert [len(g) for g in consecutive_groups(10, 4)] == [3, 4, 3]

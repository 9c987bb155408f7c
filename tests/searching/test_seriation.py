"""Orders without kinks: fibres that run past each other are told apart, and nothing is made worse."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from tensornet_compress.searching.seriation import kinks, path_fibres, smooth_fibres, spectral_fibres, squared_distances
from tests.generators import SEEDS, random_tensor


def reflected_wave(size: int) -> torch.Tensor:
    """A wave between two walls that is nearly, not quite, its own mirror image."""
    x, t = torch.linspace(0, 1, size, dtype=torch.float64)[:, None], torch.linspace(0, 2, 96, dtype=torch.float64)[None]
    return torch.sin(9 * (x - 0.49).abs() + 7 * t) + torch.cos(5 * (x - 0.49) ** 2 - 4 * t) + 0.05 * torch.sin(3 * x + t)


def test_a_wave_and_its_reflection_are_told_apart():
    wave = reflected_wave(96)
    shuffle = np.random.default_rng(0).permutation(96)
    distances = squared_distances(wave[shuffle], 0)
    path = path_fibres(distances, spectral_fibres(distances))
    leaps = np.abs(np.diff(shuffle[path])) != 1
    assert leaps.sum() > 20, "the shortest path goes to and fro: there is something to mend"
    found = shuffle[smooth_fibres(distances, path)]
    assert (np.abs(np.diff(found)) != 1).sum() <= 2


@given(st.integers(1, 20), SEEDS)
def test_an_order_of_all_fibres_with_no_more_kinks(count, seed):
    distances = squared_distances(random_tensor((count, 6), seed), 0)
    path = np.random.default_rng(seed).permutation(count).tolist()
    found = smooth_fibres(distances, path)
    assert sorted(found) == list(range(count))
    assert kinks(distances, found) <= kinks(distances, path) * (1 + 1e-9) + 1e-9


@given(SEEDS)
def test_kinks_are_second_differences(seed):
    rows = random_tensor((7, 4), seed)
    expected = float((rows[:-2] - 2 * rows[1:-1] + rows[2:]).square().sum())
    assert np.isclose(kinks(squared_distances(rows, 0), list(range(7))), expected)

"""The share of a correction: against a search over shares on the tokens left out, and on shifts that are pure noise."""

import pytest
import torch

from tensornet_compress.compressing.shift import ShiftMoments, crossed_share
from tensornet_compress.errors import TensorNetError
from tests.generators import random_tensor


def halves_of(inputs, lacking, clip=None):
    halves = [ShiftMoments(), ShiftMoments()]
    for number, part in enumerate(zip(inputs.split(len(inputs) // 2), lacking.split(len(inputs) // 2))):
        halves[number].add(*part, clip)
    return halves


def test_the_share_is_the_best_one_on_tokens_left_out():
    inputs, weight = random_tensor((120, 10)), random_tensor((6, 10), 1)
    lacking = 0.3 * inputs @ random_tensor((10, 10), 2) + random_tensor((120, 10), 3)
    share = crossed_share(halves_of(inputs, lacking), weight, 0.1)

    def error(share):
        total = 0.0
        for fit, judge in ((slice(0, 60), slice(60, 120)), (slice(60, 120), slice(0, 60))):
            x, d = inputs[fit], lacking[fit]
            gram = x.T @ x / 60
            shift = (d.T @ x / 60) @ torch.linalg.inv(gram + 0.1 * gram.diagonal().mean() * torch.eye(10, dtype=gram.dtype))
            total += float(((lacking[judge] - share * inputs[judge] @ shift.T) @ weight.T).square().sum())
        return total

    best = min((error(step / 1000), step / 1000) for step in range(1001))[1]
    assert share == pytest.approx(best, abs=2e-3)
    assert 0.05 < share < 1


def test_a_true_shift_is_taken_and_noise_is_not():
    inputs, weight = random_tensor((4000, 8)), random_tensor((5, 8), 1)
    assert crossed_share(halves_of(inputs, inputs @ random_tensor((8, 8), 2)), weight, 1e-6) == pytest.approx(1.0, abs=1e-3)
    noise = random_tensor((60, 30), 5)
    assert crossed_share(halves_of(random_tensor((60, 30), 6), noise), random_tensor((5, 30), 7), 0.1) < 0.2


def test_halves_join_to_the_whole_and_one_half_gives_no_share():
    inputs, lacking = random_tensor((50, 6)), random_tensor((50, 6), 1)
    whole = ShiftMoments()
    whole.add(inputs, lacking, None)
    joined = ShiftMoments.joined(halves_of(inputs, lacking))
    torch.testing.assert_close(joined.second, whole.second)
    torch.testing.assert_close(joined.lack, whole.lack)
    assert crossed_share([whole], random_tensor((3, 6)), 0.1) == 0.0


def test_long_vectors_are_shortened():
    inputs = torch.cat([random_tensor((99, 4)), 1000 * random_tensor((1, 4), 2)])
    plain, clipped = ShiftMoments(), ShiftMoments()
    plain.add(inputs, inputs, None)
    clipped.add(inputs, inputs, 3.0)
    assert float(clipped.second.trace()) < 0.01 * float(plain.second.trace())


def test_zero_inputs_are_refused():
    moments = ShiftMoments()
    moments.add(torch.zeros(4, 3), torch.zeros(4, 3), None)
    with pytest.raises(TensorNetError, match="only zeros"):
        moments.regression(0.1)

"""Divergences against closed forms, in chunks as in one piece."""

import pytest
import torch
import torch.nn.functional as F

from tensornet_compress.calibrate import divergence, kl_divergence, output_divergence
from tensornet_compress.calibrate.divergence import token_divergence, total_divergence


def pair(tokens=7, width=11, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(tokens, width, generator=generator).to(dtype) for _ in range(2))


def test_divergence_by_hand():
    p, q = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 3.0]]).log_softmax(-1)
    wanted = float(F.kl_div(q, p.log_softmax(-1), log_target=True, reduction="batchmean"))
    assert output_divergence(p, q, logits=True) == pytest.approx(wanted, rel=1e-5)
    assert output_divergence(torch.eye(2), torch.eye(2).flip(0), logits=False) == pytest.approx(1.0)
    assert output_divergence(torch.eye(2), 3 * torch.eye(2), logits=False) == pytest.approx(0.0, abs=1e-6)


def test_kl_is_that_of_torch_token_by_token():
    p, q = (logits.log_softmax(-1) for logits in pair())
    torch.testing.assert_close(kl_divergence(p, q), F.kl_div(q, p, reduction="none", log_target=True).sum(-1))
    assert float(kl_divergence(p, q).min()) > 0
    assert not kl_divergence(p, p).any()


def test_logits_are_normalised_unless_they_are_said_to_be():
    reference, output = pair()
    unmoved = token_divergence(reference + 5, output - 3, logits=True)
    torch.testing.assert_close(unmoved, kl_divergence(reference.log_softmax(-1), output.log_softmax(-1)))
    rounded = reference.log_softmax(-1).half()
    taken = total_divergence(rounded, output, logits=True, normalised=True)
    torch.testing.assert_close(taken, kl_divergence(rounded.float(), output.log_softmax(-1)).sum())


@pytest.mark.parametrize("logits", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_have_the_values_and_gradients_of_one_piece(logits, dtype, monkeypatch):
    reference, output = pair(dtype=dtype)
    results = []
    for numbers in (1 << 25, 22):
        monkeypatch.setattr(divergence, "CHUNK_NUMBERS", numbers)
        leaf = output.clone().requires_grad_()
        total = total_divergence(reference, leaf, logits)
        total.backward()
        results.append((total.detach(), leaf.grad, token_divergence(reference, output, logits)))
    torch.testing.assert_close(results[1], results[0])
    torch.testing.assert_close(results[0][2].sum(), results[0][0])

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from tensornet_compress.errors import TensorNetError
from tensornet_compress.evaluate import Reference, compare_embeddings, evaluate_language, sentence_embeddings
from tests.models import batches, tiny_bert, tiny_llama, tiny_tokenizer

WINDOWS = torch.cat(batches(3, rows=2, length=12))


def other_llama():
    model = tiny_llama()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return model


@torch.no_grad()
def test_figures_equal_direct_computation():
    first, second = tiny_llama(), other_llama()
    quality = evaluate_language(second, WINDOWS, Reference(first, WINDOWS))
    p = first(WINDOWS).logits[:, :-1].log_softmax(-1)
    q = second(WINDOWS).logits[:, :-1].log_softmax(-1)
    entropy = F.cross_entropy(q.flatten(0, 1), WINDOWS[:, 1:].flatten())
    assert quality.tokens == WINDOWS[:, 1:].numel()
    assert quality.cross_entropy == pytest.approx(float(entropy), rel=1e-5)
    assert quality.perplexity == pytest.approx(math.exp(float(entropy)), rel=1e-5)
    assert quality.kl == pytest.approx(float(F.kl_div(q, p, log_target=True, reduction="sum")) / quality.tokens, rel=0.02)
    assert quality.top1 == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).float().mean()), abs=0.02)


def test_a_model_does_not_differ_from_itself():
    model = tiny_llama()
    quality = evaluate_language(model, WINDOWS, Reference(model, WINDOWS))
    assert quality.kl == pytest.approx(0.0, abs=1e-3)
    assert quality.top1 > 0.97
    assert evaluate_language(model, WINDOWS).kl is None


@pytest.mark.parametrize("batch", [1, 4, 100])
def test_the_batch_size_changes_nothing(batch):
    wanted = evaluate_language(tiny_llama(), WINDOWS)
    assert evaluate_language(tiny_llama(), WINDOWS, batch=batch).cross_entropy == pytest.approx(wanted.cross_entropy, rel=1e-5)


def test_modes_are_left_as_found():
    model = tiny_llama().train()
    model.lm_head.eval()
    before = [module.training for module in model.modules()]
    evaluate_language(model, WINDOWS, Reference(model, WINDOWS))
    assert [module.training for module in model.modules()] == before


def test_other_windows_than_those_of_the_reference_are_refused():
    model = tiny_llama()
    reference = Reference(model, WINDOWS)
    with pytest.raises(TensorNetError, match="other windows"):
        evaluate_language(model, WINDOWS.flip(0), reference)
    with pytest.raises(TensorNetError, match="batch size"):
        evaluate_language(model, WINDOWS, reference, batch=2)
    with pytest.raises(TensorNetError, match=r"\(3, 1\)"):
        evaluate_language(model, torch.zeros(3, 1, dtype=torch.int64))


SENTENCES = ["the bank of the river", "a bird sings", "the night falls on the house and the road", "rain"]


def test_sentences_do_not_depend_on_what_they_are_batched_with():
    model, tokenizer = tiny_bert(), tiny_tokenizer()
    together = sentence_embeddings(model, tokenizer, SENTENCES)
    alone = torch.cat([sentence_embeddings(model, tokenizer, [sentence]) for sentence in SENTENCES])
    assert torch.allclose(together, alone, atol=1e-5)
    assert torch.allclose(together.norm(dim=1), torch.ones(len(SENTENCES)))
    assert torch.allclose(sentence_embeddings(copy.deepcopy(model).train(), tokenizer, SENTENCES), together, atol=1e-6)


def test_cosines_by_hand():
    a, b = torch.eye(2), torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    quality = compare_embeddings(a, b)
    assert (quality.sentences, quality.mean_cosine, quality.least_cosine) == (2, 0.5, 0.0)


def test_a_reference_of_another_vocabulary_is_refused():
    reference = Reference(tiny_llama(), WINDOWS)
    reference.log_probabilities = [kept[..., :50] for kept in reference.log_probabilities]
    with pytest.raises(TensorNetError, match="predicts 64 tokens and the reference 50"):
        evaluate_language(tiny_llama(), WINDOWS, reference)

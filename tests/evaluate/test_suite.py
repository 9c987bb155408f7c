"""Scores of texts and the suite against direct computation, and the sets that the package brings."""

from itertools import pairwise

import pytest
import torch

from tensornet_compress.errors import TensorNetError
from tensornet_compress.evaluate import Suite, evaluate_language, score_texts
from tensornet_compress.inputs import agreement_pairs, heldout_articles, last_words, rare_words, wikipedia_articles
from tensornet_compress.inputs.texts import CALIBRATION_SHARE
from tests.models import batches, random_text, tiny_llama, tiny_tokenizer

WINDOWS = torch.cat(batches(2, rows=2, length=12))


def texts(count: int = 5) -> list[tuple[str, str]]:
    """Contexts and texts of several lengths, of words that the tiny tokenizer knows."""
    words = [random_text(4 + number, number).split(" ") for number in range(count)]
    return [(" ".join(some[: 2 + number % 2]), " " + " ".join(some[2 + number % 2 :])) for number, some in enumerate(words)]


@torch.no_grad()
def test_scores_equal_direct_computation():
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    for (context, text), score in zip(texts(), score_texts(model, tokenizer, texts())):
        ids = tokenizer(context + text, return_tensors="pt")["input_ids"]
        begin = len(tokenizer(context)["input_ids"])
        answers = model(ids).logits[0].log_softmax(-1)
        wanted = [answers[place - 1, ids[0, place]] for place in range(begin, ids.shape[1])]
        assert score.tokens == len(wanted)
        assert score.log_probability == pytest.approx(float(sum(wanted)), rel=1e-5)
        assert score.likeliest == all(answers[p - 1].argmax() == ids[0, p] for p in range(begin, ids.shape[1]))


def test_a_text_without_tokens_is_refused():
    with pytest.raises(TensorNetError, match="leaves no token to predict"):
        score_texts(tiny_llama(), tiny_tokenizer(), [(random_text(3, 0), "")])


def test_a_suite_gives_every_measure_and_knows_its_steps():
    model, tokenizer, steps = tiny_llama(), tiny_tokenizer(), []
    items = texts()
    suite = Suite({"one": WINDOWS}, items, [(c, t, other[1]) for (c, t), other in pairwise(items)], items)
    values = suite.measure(model, tokenizer, suite.reference(model), lambda: steps.append(1))
    assert len(steps) == suite.steps
    assert values["perplexity_one"] == pytest.approx(evaluate_language(model, WINDOWS).perplexity, rel=1e-5)
    assert values["kl_one"] == pytest.approx(0.0, abs=1e-3)
    scores = score_texts(model, tokenizer, items)
    assert values["last_words"] == sum(score.likeliest for score in scores) / len(items)
    assert values["rare_words"] == pytest.approx(-sum(s.log_probability for s in scores) / sum(s.tokens for s in scores))
    others = score_texts(model, tokenizer, [(c, other[1]) for (c, _), other in pairwise(items)])
    assert values["agreement"] == sum(s.log_probability > o.log_probability for s, o in zip(scores, others)) / 4


def test_domains_share_nothing_with_calibration_or_each_other():
    articles = wikipedia_articles()
    seen = set(articles[: int(len(articles) * CALIBRATION_SHARE)])
    prose, technical, python = map(heldout_articles, ("prose", "technical", "python"))
    assert len(technical) == 6
    assert set(prose) | set(technical) == set(articles) - seen
    assert not set(prose) & set(technical)
    assert not set(python) & set(articles)
    with pytest.raises(TensorNetError, match="unknown domain 'poems'"):
        heldout_articles("poems")


def test_last_words_stand_in_their_passages():
    passages = last_words()
    assert len(passages) == len(set(passages)) == 150
    held = "\n".join(heldout_articles("prose") + heldout_articles("technical"))
    for context, word in passages:
        assert word.strip().lower() in context.lower()
        assert context + word in held


def test_pairs_differ_in_number_alone_and_are_balanced():
    pairs = agreement_pairs()
    assert len(pairs) == len(set(pairs)) == 288
    for kind in range(4):
        contexts = [context.split(" ") for context, _, _ in pairs[72 * kind : 72 * (kind + 1)]]
        plural = [words[-2] == "these" if kind == 3 else words[1].endswith("s") for words in contexts]
        assert sum(plural) == 36
    assert all(right != wrong for _, right, wrong in pairs)


def test_rare_words_come_both_ways():
    items = rare_words()
    half = len(items) // 2
    for (defined, word), (named, meaning) in zip(items[:half], items[half:]):
        assert word.strip() in named
        assert meaning.strip() in defined

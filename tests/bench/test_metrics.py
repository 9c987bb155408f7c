"""Means over held-out documents, and their standard errors."""

from __future__ import annotations

from math import sqrt

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tensornet_compress.bench.metrics import Scores, evaluate, mean_and_error


@given(st.lists(st.floats(-10, 10), min_size=2, max_size=9), st.integers(1, 50))
def test_documents_of_one_length_have_the_standard_error_of_their_means(means: list[float], tokens: int) -> None:
    mean, error = mean_and_error([tokens * mean for mean in means], [tokens] * len(means))
    assert mean == pytest.approx(np.mean(means), abs=1e-9)
    assert error == pytest.approx(np.std(means, ddof=1) / sqrt(len(means)), abs=1e-9)


def test_long_documents_count_more_and_empty_ones_not_at_all() -> None:
    assert mean_and_error([3.0, 1.0, 0.0], [3, 1, 0]) == (1.0, 0.0)
    mean, error = mean_and_error([30.0, 0.0], [10, 1])
    assert mean == pytest.approx(30 / 11)
    assert error == pytest.approx(sqrt(2 * ((30 - 300 / 11) ** 2 + (30 / 11) ** 2)) / 11)


@pytest.mark.parametrize("documents", [0, 1])
def test_one_document_says_nothing_of_others(documents: int) -> None:
    assert mean_and_error([2.0] * documents, [4] * documents) == (0.5 * documents, None)


def test_every_metric_has_its_error_and_that_of_perplexity_is_in_its_own_units() -> None:
    torch.manual_seed(0)
    documents = [Scores(*torch.randn(2, 7, 5).log_softmax(-1), torch.randint(5, (7,))) for _ in range(4)]
    found = evaluate(documents, "weights")
    assert found.errors.keys() == found.values.keys()
    each = [evaluate([document], "weights") for document in documents]
    assert not each[0].errors
    for name in ("kl", "dce", "top1"):
        values = [one.values[name] for one in each]
        assert found.values[name] == pytest.approx(np.mean(values), rel=1e-5)
        assert found.errors[name] == pytest.approx(np.std(values, ddof=1) / 2, rel=1e-5)
    losses = [np.log(one.values["perplexity"]) for one in each]
    up = np.exp(np.mean(losses) + np.std(losses, ddof=1) / 2) - np.exp(np.mean(losses))
    assert found.errors["perplexity"] == pytest.approx(up, rel=1e-5)

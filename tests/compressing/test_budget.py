import pytest

import tensornet_compress as tnc


@pytest.mark.parametrize("fields", [{"bits_per_weight": 4.0}, {"ratio": 0.5}, {"nbytes": 1000}])
def test_one_limit_is_a_budget(fields):
    budget = tnc.Budget(**fields)
    assert tnc.Budget.from_json(budget.to_json()) == budget
    assert str(next(iter(fields.values())))[:1] in str(budget)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"bits_per_weight": 4.0, "ratio": 0.5},
        {"bits_per_weight": 0},
        {"bits_per_weight": -1},
        {"ratio": 0.0},
        {"nbytes": 0},
        {"bits": 4},
        {"bits_per_weight": float("nan")},
        {"bits_per_weight": float("inf")},
        {"ratio": "half"},
    ],
)
def test_anything_else_is_refused(fields):
    with pytest.raises(ValueError, match=r"(?i)budget"):
        tnc.Budget(**fields)

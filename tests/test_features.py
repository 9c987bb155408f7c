"""No family is silently wrong in any feature, and docs/architectures.md says what happens."""

import pytest

pytest.importorskip("transformers")

from tests.architectures import FAMILIES
from tests.features import FEATURES, PAGE, SLOW, cells_of, letters_of, row, shown

_PAGE = PAGE.read_text(encoding="utf-8")
_SLOW_ON = list(FAMILIES)[::11]


@pytest.mark.parametrize("name", FAMILIES)
def test_features_of_a_family_are_equal_or_refused_as_the_page_says(name):
    """Every other cell of the page, as on a chessboard: each family and each feature, in half the time."""
    place = list(FAMILIES).index(name)
    left = {feature for number, feature in enumerate(FEATURES) if (place + number) % 2}
    cells = row(name, without=left - set(SLOW) if name in _SLOW_ON else left | set(SLOW))
    assert not {feature: cell for feature, cell in cells.items() if cell.startswith("WRONG")}
    written = cells_of(_PAGE, name)
    assert shown(cells, letters_of(_PAGE)) == {feature: written[feature] for feature in cells}, (
        "stale page: run python -m tests.features"
    )


def test_the_page_speaks_of_at_least_forty_families_and_few_refusals():
    lines = [line for line in _PAGE.splitlines() if line.startswith("| ") and line.split(" | ")[1] in FAMILIES]
    assert len(lines) == len(FAMILIES) >= 40
    cells = [cell for line in lines for cell in line.strip("| ").split(" | ")[2:]]
    assert len(cells) == len(FAMILIES) * len(FEATURES)
    assert sum(len(cell) == 1 and cell.isalpha() for cell in cells) <= 0.05 * sum(cell != "–" for cell in cells)

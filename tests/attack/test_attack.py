"""A minute of the attack, of which ``make attack`` is the long form."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.attack.fuzz import BAD, fuzz
from tests.attack.inputs import inputs
from tests.attack.kills import kills


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_damaged_files_are_refused(tmp_path: Path) -> None:
    outcomes, told = fuzz(tmp_path, 130)
    assert not told
    assert outcomes["refused"] > 80
    assert not any(outcomes[name] for name in BAD)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_killed_writers_leave_old_or_new(tmp_path: Path) -> None:
    outcomes, told = kills(tmp_path, 65)
    assert not told
    assert outcomes == {"whole": 65}


def test_bad_inputs_end_with_one_line(tmp_path: Path) -> None:
    outcomes, told = inputs(tmp_path, 80)
    assert not told
    assert outcomes == {"one line": 80}

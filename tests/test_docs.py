"""What the docs say of commands, files and rooms holds for the code."""

from __future__ import annotations

import pytest

from tests.documents import ROOT


def test_the_page_of_commands_is_made_from_the_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import make_cli

    assert make_cli.PAGE.read_text(encoding="utf-8") == make_cli.page(), "docs/cli.md is stale; run python docs/make_cli.py"

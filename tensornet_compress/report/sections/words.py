"""The glossary."""

from __future__ import annotations

from collections.abc import Sequence

from tensornet_compress.report.glossary import glossary
from tensornet_compress.report.groups import Group
from tensornet_compress.report.parts import Section, Terms
from tensornet_compress.report.schema import Result


def words(result: Result, found: Sequence[Group]) -> Section | None:
    """What the words on the page mean."""
    return Section("words", "What the words mean", "", (Terms(glossary(result)),))

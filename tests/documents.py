"""The Markdown documents of the repository and the code blocks in them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
DOCUMENTS = (README, *sorted((ROOT / "docs").glob("*.md")))
_BLOCK = re.compile(
    r"(?:^<!-- not run: (?P<reason>.*?) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.DOTALL | re.MULTILINE
)


@dataclass(frozen=True)
class Block:
    """A fenced block: where it is, its language, its text, and why it is not run (None: it is)."""

    document: Path
    line: int
    language: str
    text: str
    not_run: str | None

    def __str__(self) -> str:
        return f"{self.document.name}:{self.line}"

    @property
    def commands(self) -> list[str]:
        """What a console block types, without comments."""
        return [line[2:].split("  #")[0].strip() for line in self.text.splitlines() if line.startswith("$ ")]


def blocks(document: Path) -> list[Block]:
    """All fenced blocks of a document, in order."""
    text = document.read_text(encoding="utf-8")
    return [
        Block(document, text.count("\n", 0, m.start("text")), m["language"], m["text"], m["reason"])
        for m in _BLOCK.finditer(text)
    ]


def all_blocks(language: str | None = None) -> list[Block]:
    """The blocks of all documents, of one language if given."""
    return [block for document in DOCUMENTS for block in blocks(document) if language in (None, block.language)]

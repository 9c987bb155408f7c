"""Texts that benchmarks calibrate and evaluate on: the two never share an article."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from tensornet_compress.bench.registry import Registry
from tensornet_compress.errors import TensorNetError
from tensornet_compress.files.reading import read_text
from tensornet_compress.inputs import token_windows, wikipedia_articles
from tensornet_compress.inputs.texts import CALIBRATION_SHARE, python_reference

Part = Literal["calibration", "heldout"]
_SENTENCE = (100, 400)


@dataclass(frozen=True)
class BenchText:
    """``articles``: the pieces of a part. A piece of one part is never in the other."""

    name: str
    articles: Callable[[Part], tuple[str, ...]]

    def windows(self, tokenizer: Any, part: Part, length: int, count: int) -> Tensor:
        """Token windows, int64 (count, length), from as many articles as there are.

        Raises:
            TensorNetError: the text is too short.
        """
        try:
            return token_windows(tokenizer, self.articles(part), length, count)
        except TensorNetError as error:
            raise TensorNetError(f"text {self.name!r}, {part}: {error}") from error

    def sentences(self, part: Part, count: int) -> list[str]:
        """Openings of long paragraphs, spread over the articles.

        Raises:
            TensorNetError: the text has no paragraph of 100 characters.
        """
        least, most = _SENTENCE
        lines = [line[:most] for article in self.articles(part) for line in article.split("\n") if len(line) > least]
        if not lines:
            raise TensorNetError(f"text {self.name!r} has no paragraph of more than {least} characters for {part}")
        return lines[:: max(1, len(lines) // count)][:count]


TEXTS: Registry[BenchText] = Registry("text")


def from_file(path: str) -> BenchText:
    """A text file: its first 60 % calibrate, the rest is held out.

    Raises:
        TensorNetError: no such file, or it is empty.
    """
    file = Path(path)
    if not file.exists():
        raise TensorNetError(f"no text file at {path!r}; give a file, or one of {', '.join(t.name for t in TEXTS)}")
    text = read_text(file)
    if not text.strip():
        raise TensorNetError(f"the text file {path!r} is empty")
    border = int(len(text) * CALIBRATION_SHARE)
    border += len(re.split(r"\s", text[border:], maxsplit=1)[0])  # to the next white space
    parts = {"calibration": (text[:border],), "heldout": (text[border:],)}
    return BenchText(path, lambda part: parts[part])


def find_text(name: str) -> BenchText:
    """A registered text, or a file of that name."""
    return TEXTS[name] if name in TEXTS else from_file(name)


def _wikipedia(part: Part) -> tuple[str, ...]:
    articles = wikipedia_articles()
    border = int(len(articles) * CALIBRATION_SHARE)
    return articles[:border] if part == "calibration" else articles[border:]


def _python_reference(part: Part) -> tuple[str, ...]:
    """Held-out text is the Python language reference; calibration stays on Wikipedia: a domain that it never saw."""
    if part == "calibration":
        return _wikipedia(part)
    return python_reference()


TEXTS.add(BenchText("wikipedia", _wikipedia))
TEXTS.add(BenchText("python-reference", _python_reference))

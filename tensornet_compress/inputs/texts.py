"""English text that ships inside a Python package, split so that evaluation never sees a calibration article."""

from __future__ import annotations

import bz2
import re
from collections.abc import Callable
from functools import cache
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from tensornet_compress.errors import TensorNetError
from tensornet_compress.inputs.models import package_folder

_WIKIPEDIA = "test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
_INNERMOST_TEMPLATE = re.compile(r"\{\{[^{}]*\}\}|\{\|[^{}]*\|\}")
_INNERMOST_LINK = re.compile(r"\[\[([^\[\]]*)\]\]")
_DROPPED = re.compile(
    r"<!--.*?-->|<ref[^>/]*/>|<ref.*?</ref>|<(math|gallery|code|pre|timeline)\b.*?</\1>|<[^>]+>|__[A-Z]+__", re.DOTALL
)
_MEDIA_LINK = re.compile(r"^(file|image|category|[a-z-]{2,12}):", re.IGNORECASE)
_LEAST_CHARACTERS = 4000
CALIBRATION_SHARE = 0.6
Domain = Literal["prose", "technical", "python"]
# How the held-out articles on anatomy, zoology, physics, astronomy and mathematics open.
_TECHNICAL = (
    "In chemistry and physics, the atomic number", "Anatomy is the branch", "Actinopterygii", "Amateur astronomy",
    "The ampere", "In mathematics and computer science, an algorithm",
)  # fmt: skip


@cache
def wikipedia_articles() -> tuple[str, ...]:
    """Plain text of the sample's articles of at least 4,000 characters, in file order (package ``gensim``)."""
    path = package_folder("gensim") / _WIKIPEDIA
    xml = bz2.decompress(path.read_bytes()).decode("utf-8")
    bodies = re.findall(r"<text xml:space=\"preserve\">(.*?)</text>", xml, flags=re.DOTALL)
    articles = (strip_wiki_markup(body) for body in bodies if not body.startswith("#REDIRECT"))
    return tuple(article for article in articles if len(article) >= _LEAST_CHARACTERS)


def strip_wiki_markup(source: str) -> str:
    """The prose of wiki source: without templates, tables, references, media links and headings; texts of links are kept."""
    text = source.replace("&lt;", "<").replace("&gt;", ">").replace("&quot;", '"').replace("&amp;", "&")
    text = _DROPPED.sub("", text.replace("&nbsp;", " "))
    text = _repeated(_INNERMOST_TEMPLATE, "", text)
    text = _repeated(_INNERMOST_LINK, _link_text, text)
    text = re.sub(r"\[https?://\S+\s*([^\]]*)\]", r"\1", text)
    text = re.sub(r"'{2,}", "", text)
    lines = (line.strip() for line in text.split("\n"))
    return "\n".join(line for line in lines if len(line) > 60 and not line.startswith(("=", "*", "#", "|", "!", ";", ":")))


def _repeated(pattern: re.Pattern[str], replacement: str | Callable[[re.Match[str]], str], text: str) -> str:
    """``text`` with the innermost matches replaced until there are none."""
    count = 1
    while count:
        text, count = pattern.subn(replacement, text)
    return text


def _link_text(match: re.Match[str]) -> str:
    target = match.group(1)
    return "" if _MEDIA_LINK.match(target) else target.rsplit("|", 1)[-1]


def token_windows(tokenizer: Any, articles: tuple[str, ...], length: int, count: int) -> Tensor:
    """``count`` windows of ``length`` tokens, int64 (count, length), taken from the articles in turn: the first window of each,
    then the second of each, so that few windows still cover many topics.

    Raises:
        TensorNetError: the articles hold fewer windows than asked for.
    """
    per_article = [tokenizer(article, return_tensors="pt", truncation=False)["input_ids"][0] for article in articles]
    chosen: list[Tensor] = []
    depth = 0
    while len(chosen) < count:
        layer = [ids[depth * length : (depth + 1) * length] for ids in per_article if len(ids) >= (depth + 1) * length]
        if not layer:
            longest = max((len(ids) for ids in per_article), default=0)
            raise TensorNetError(
                f"asked for {count} windows of {length} tokens, the text holds only {len(chosen)}; "
                f"its longest article has {longest} tokens"
            )
        chosen.extend(layer)
        depth += 1
    return torch.stack(chosen[:count])


def python_reference() -> tuple[str, ...]:
    """The Python language reference (``pydoc_data``), eight of its topics to a piece, in an order drawn once."""
    from pydoc_data.topics import topics

    names = sorted(topics)
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(0)).tolist()
    whole = [topics[names[i]] for i in order]
    return tuple("\n".join(whole[start : start + 8]) for start in range(0, len(whole), 8))


def heldout_articles(domain: Domain) -> tuple[str, ...]:
    """Texts that calibration never sees: English prose and technical articles of the Wikipedia sample, the Python reference.

    Raises:
        TensorNetError: no such domain.
    """
    if domain not in get_args(Domain):
        raise TensorNetError(f"unknown domain {domain!r}; choose from {', '.join(get_args(Domain))}")
    if domain == "python":
        return python_reference()
    articles = wikipedia_articles()
    held = articles[int(len(articles) * CALIBRATION_SHARE) :]
    return tuple(article for article in held if article.startswith(_TECHNICAL) == (domain == "technical"))


def domain_windows(tokenizer: Any, length: int = 512, count: int = 4) -> dict[str, Tensor]:
    """Windows of every held-out domain by name; int64 (count, length)."""
    return {name: token_windows(tokenizer, heldout_articles(name), length, count) for name in get_args(Domain)}


def calibration_windows(tokenizer: Any, length: int = 512, count: int = 32) -> Tensor:
    """Windows from the first 60 % of the articles; int64 (count, length)."""
    articles = wikipedia_articles()
    return token_windows(tokenizer, articles[: int(len(articles) * CALIBRATION_SHARE)], length, count)


def heldout_windows(tokenizer: Any, length: int = 512, count: int = 16) -> Tensor:
    """Windows from the articles that calibration never sees; int64 (count, length)."""
    articles = wikipedia_articles()
    return token_windows(tokenizer, articles[int(len(articles) * CALIBRATION_SHARE) :], length, count)

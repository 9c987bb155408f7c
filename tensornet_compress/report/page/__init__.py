"""One self-contained page from one result."""

from __future__ import annotations

import os
from base64 import b64encode
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from tensornet_compress.errors import MissingExtraError
from tensornet_compress.files.whole import whole_file
from tensornet_compress.report.schema import Result

if TYPE_CHECKING:
    from jinja2 import Template

_HERE = Path(__file__).parent


def write_report(result: Result, path: str | os.PathLike[str]) -> Path:
    """Write the page of ``result`` to ``path`` under a temporary name, then rename.

    The file needs nothing beside it and no network; its one script sorts tables. The same result gives the same bytes.

    Raises:
        TensorNetError: ``path`` is a folder.
        MissingExtraError: Jinja2 or matplotlib is missing.
    """
    with whole_file(path) as file:
        file.write_text(render(result), encoding="utf-8", newline="\n")
    return Path(path)


def render(result: Result) -> str:
    """The HTML text of a report.

    Raises:
        MissingExtraError: Jinja2 or matplotlib is missing.
    """
    template = _template()
    from tensornet_compress.report.page import layers, pictures, tables
    from tensornet_compress.report.page.groups import groups
    from tensornet_compress.report.page.headline import stories

    grouped = groups(result)
    makers = (
        *(tables.compare, pictures.fronts, layers.layers, pictures.ledger, pictures.spectra, pictures.networks),
        *(pictures.cache, pictures.timings, tables.skipped, tables.figures, tables.words, tables.reproduce),
    )
    sections = [section for maker in makers if (section := maker(result, grouped)) is not None]
    return template.render(result=result, stories=stories(grouped), sections=sections)


@cache
def _template() -> Template:
    try:
        import matplotlib  # noqa: F401
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
    except ImportError as error:
        told = f"reports need {error.name}; run: python -m pip install 'tensornet-compress[report]'"
        raise MissingExtraError(told) from error
    from markupsafe import Markup

    from tensornet_compress.report.page.numbers import moment, plain, texts

    environment = Environment(
        loader=FileSystemLoader(_HERE),
        autoescape=True,
        finalize=lambda value: plain(value) if type(value) is str else value,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"moment": moment, "kind": lambda block: type(block).__name__}
    style, script = ((_HERE / name).read_text(encoding="utf-8") for name in ("page.css", "sort.js"))
    # No script but this one runs, whatever names and notes hold.
    digest = b64encode(sha256(script.encode()).digest()).decode()
    environment.globals |= {"style": Markup(style), "script": Markup(script), "digest": Markup(digest)}
    environment.globals |= {"texts": texts()["sections"]}
    return environment.get_template("page.html.j2")

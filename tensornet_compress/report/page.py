"""One self-contained page from one result."""

from __future__ import annotations

import os
from functools import cache
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

    The file needs nothing beside it: no network, no scripts. The same result gives the same bytes.

    Raises:
        TensorNetError: ``path`` is a folder.
        MissingExtraError: Jinja2 or matplotlib is missing.
    """
    with whole_file(path) as file:
        file.write_text(render(result), encoding="utf-8", newline="\n")
    return Path(path)


def render(result: Result) -> str:
    """The HTML text of a report."""
    template = _template()
    from tensornet_compress.report.charts.svg import need_matplotlib
    from tensornet_compress.report.groups import groups
    from tensornet_compress.report.headline import stories
    from tensornet_compress.report.sections import SECTIONS

    need_matplotlib()
    found = groups(result)
    made = [section for maker in SECTIONS if (section := maker(result, found)) is not None]
    return template.render(result=result, stories=stories(result, found), sections=made)


@cache
def _template() -> Template:
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
    except ImportError as error:
        raise MissingExtraError("reports need Jinja2; run: python -m pip install 'tensornet-compress[report]'") from error
    from markupsafe import Markup

    from tensornet_compress.report.numbers import moment, plain

    environment = Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["plain"] = plain
    environment.filters["moment"] = moment
    environment.globals["style"] = Markup((_HERE / "page.css").read_text(encoding="utf-8"))
    return environment.get_template("page.html.j2")

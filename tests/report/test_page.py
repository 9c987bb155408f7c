"""The page: every section from a result that has everything, nothing from one that has not, and nothing from outside."""

from __future__ import annotations

import math
import re
from base64 import b64encode
from hashlib import sha256
from html.parser import HTMLParser
from pathlib import Path

import pytest

pytest.importorskip("matplotlib", reason="the extra `report` is not installed")
pytest.importorskip("jinja2", reason="the extra `report` is not installed")

from tensornet_compress.errors import TensorNetError
from tensornet_compress.report import Drawing, LayerCell, Row, Spectrum, render, write_report
from tests.report.synthetic import MEASURES, SECTIONS, everything, layers, result, row


class Reader(HTMLParser):
    """Tags, ids and text of a page, and whether every tag that was opened was closed."""

    VOID = ("meta", "br", "link", "img", "input", "hr")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    @property
    def ids(self) -> list[str | None]:
        return [value for _, name, value in self.attributes if name == "id"]


def test_every_section_is_there_and_the_page_is_well_formed() -> None:
    page = Reader(render(everything()))
    assert not page.open
    assert [name for name in page.ids if name in SECTIONS] == list(SECTIONS)
    assert len(page.ids) == len(set(page.ids))
    references = {value for _, name, value in page.attributes if name in ("href", "xlink:href")}
    assert {reference.removeprefix("#") for reference in references if reference} <= {str(name) for name in page.ids}


@pytest.mark.parametrize(
    ("rows", "missing"),
    [
        ((), set(SECTIONS) - {"words", "reproduce"}),
        ((row("auto", 4000, 0.1, True),), {"compare", "fronts", "layers", "ledger", "spectra", "networks", "cache", "skipped"}),
        ((row("gptq", 0, 0, values={}, skipped="no"),), set(SECTIONS) - {"skipped", "words", "reproduce"}),
        ((row("a", 4000, 0.1, True, layers=layers(1)),), {"compare", "ledger", "spectra", "networks", "cache", "skipped"}),
    ],
)
def test_sections_without_data_are_left_out(rows: tuple[Row, ...], missing: set[str]) -> None:
    page = Reader(render(result(*rows)))
    assert missing.isdisjoint(page.ids)
    assert {"words", "reproduce"} <= set(page.ids)


def test_the_same_result_gives_the_same_page(tmp_path: Path) -> None:
    first = write_report(everything(), tmp_path / "deep" / "a.html")
    again = write_report(everything(), tmp_path / "b.html")
    assert first.read_bytes() == again.read_bytes()
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["a.html"]
    with pytest.raises(TensorNetError, match="is a folder"):
        write_report(everything(), tmp_path)


def test_nothing_is_fetched_and_nothing_runs() -> None:
    text = render(everything())
    page = Reader(text)
    assert not re.search(r"https?:|//[a-z]", text)
    assert page.tags.count("script") == 1
    assert not {"link", "iframe", "img", "object", "embed", "form"} & set(page.tags)
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    assert "default-src 'none'" in text
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    assert f"script-src 'sha256-{b64encode(sha256(script.encode()).digest()).decode()}'" in text
    assert "@import" not in text


HOSTILE = "</title></style><script>alert(1)</script><img src=x onerror=alert(2)>\" ' {{ 7*7 }} $x^2$ \x00\x1b\u202e&amp;"


def test_hostile_names_stay_text() -> None:
    cell = LayerCell(
        name=f"model.0.{HOSTILE}", kind=HOSTILE, family=HOSTILE, formats=HOSTILE, bits_per_weight=4, nbytes=9, error=0.1
    )
    cells = tuple(cell.model_copy(update={"name": f"model.{block}.{HOSTILE}", "ranks": (3,)}) for block in range(5))
    more = {
        "subject": HOSTILE, "note": HOSTILE, "budget_unit": HOSTILE, "settings": {HOSTILE: [HOSTILE]}, "layers": cells,
        "ledger": {HOSTILE: 10}, "spectra": (Spectrum(title=HOSTILE, before=(1.0, 0.1), after=(1.0,)),),
        "drawings": (Drawing(title=HOSTILE, legs=((HOSTILE,), (HOSTILE,)), edges=((0, 1, 2),)),),
    }  # fmt: skip
    measures = {
        name: m.model_copy(update={"title": HOSTILE, "unit": HOSTILE, "explanation": HOSTILE}) for name, m in MEASURES.items()
    }
    rows = [row(HOSTILE, 4000, 0.1, True, **more), row("peer" + HOSTILE, 4000, 0.2, **more)]
    rows.append(row("skipped" + HOSTILE, 0, 0, values={}, skipped=HOSTILE, subject=HOSTILE))
    text = render(
        result(
            *rows, name=HOSTILE, command=HOSTILE, made=HOSTILE, version=HOSTILE, measures=measures, settings={HOSTILE: HOSTILE}
        )
    )
    page = Reader(text)
    assert not page.open
    assert page.tags.count("script") == 1
    assert "img" not in page.tags
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    assert "{{ 7*7 }}" in page.text
    assert "alert(1)" in page.text
    assert not set("\x00\x1b\u202e") & set(text)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_no_numbers_are_refused(value: float) -> None:
    with pytest.raises(ValueError, match="finite"):
        row("a", 1, 1, True, values={"kl": value})


@pytest.mark.parametrize("value", [0.0, -1.0, 1e300, 5e-324])
def test_odd_values_do_not_break_the_page(value: float) -> None:
    values = {"nbytes": value, "kl": value, "error": value, "seconds": value}
    rows = [row("a", 1, 1, True, values=values), row("b", 1, 1, values=values), row("b", 2000, 1)]
    rows.append(Row(task="search", subject="s", method="m", ours=True, budget=0.1, values=values))
    rows.append(Row(task="search", subject="s", method="n", budget=0.1, values=values))
    assert Reader(render(result(*rows))).text


def test_many_methods_and_subjects_stay_readable() -> None:
    rows = [row(f"peer {number}", 1000 * size, number / size, subject="one") for number in range(1, 20) for size in (2, 4)]
    for number in range(12):
        base = {"task": "search", "subject": f"tensor {number}", "budget": 0.1}
        rows.append(
            Row.model_validate(base | {"method": "ours", "ours": True, "values": {"nbytes": 100 + number, "seconds": 1}})
        )
        rows.append(Row.model_validate(base | {"method": "peer", "values": {"nbytes": 105}}))
    page = Reader(render(result(*rows)))
    assert "ours wins at 3 of 12 limits, a peer at 4, neither at 5" in page.text

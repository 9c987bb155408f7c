"""The page in a real browser: from disk, at the widths of a desk and of a phone, light and dark."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest

pytest.importorskip("matplotlib", reason="the extra `report` is not installed")
pytest.importorskip("jinja2", reason="the extra `report` is not installed")

from tensornet_compress.report import write_report
from tests.report.chromium import Page, browser, find_chromium
from tests.report.synthetic import SECTIONS, everything

Scheme = Literal["light", "dark"]
PROGRAM = find_chromium()
pytestmark = pytest.mark.skipif(PROGRAM is None, reason="no Chromium on this machine; apt-get install chromium chromium-driver")
VIEWS: list[tuple[int, Scheme]] = [(1280, "light"), (1280, "dark"), (390, "light"), (390, "dark")]
HIDDEN = """
[...document.querySelectorAll('section')].filter(s => s.getBoundingClientRect().height < 20).map(s => s.id)
"""
TOO_WIDE = """
[...document.querySelectorAll('main *')].filter(e => !e.closest('.scroll, nav, pre, svg')
  && e.getBoundingClientRect().right > document.documentElement.clientWidth + 1).map(e => e.outerHTML.slice(0, 90))
"""
SMALL_TEXT = """
[...document.querySelectorAll('svg text')].filter(e => { const [box, at] = [e.getBoundingClientRect(), e.getScreenCTM()];
  return box.width > 0 && parseFloat(getComputedStyle(e).fontSize) * Math.hypot(at.a, at.b) < 9 }).map(e => e.textContent)
"""
CUT_TEXT = """
[...document.querySelectorAll('svg')].filter(s => s.getBoundingClientRect().width > 0).flatMap(s => {
  const frame = s.getBoundingClientRect();
  return [...s.querySelectorAll('text')].filter(e => { const box = e.getBoundingClientRect();
    return box.left < frame.left - 3 || box.right > frame.right + 3
      || box.top < frame.top - 3 || box.bottom > frame.bottom + 3 }).map(e => e.textContent) })
"""
BROKEN_COLOURS = """
[...document.querySelectorAll('svg [style*="var("]')].filter(e => e.closest('svg').getBoundingClientRect().width > 0)
  .flatMap(e => [...e.getAttribute('style').matchAll(/var\\((--[\\w-]+)\\)/g)].map(m => m[1]))
  .filter(name => !getComputedStyle(document.documentElement).getPropertyValue(name))
"""
CONTRAST = """
(() => { const read = c => c.match(/[\\d.]+/g).map(Number).slice(0, 3).map(v => v / 255)
    .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  const light = c => { const [r, g, b] = read(c); return 0.2126 * r + 0.7152 * g + 0.0722 * b };
  const behind = e => { while (e && getComputedStyle(e).backgroundColor === 'rgba(0, 0, 0, 0)') e = e.parentElement;
    return getComputedStyle(e).backgroundColor };
  return [...document.querySelectorAll('h1, h2, p, td, th, dd, dt, a, b, li, figcaption')].filter(e => e.innerText.trim())
    .filter(e => { const [a, b] = [light(getComputedStyle(e).color), light(behind(e))];
      return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05) < 4.4 }).map(e => e.outerHTML.slice(0, 90)) })()
"""


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(everything(), tmp_path_factory.mktemp("page") / "report.html")


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    assert PROGRAM is not None
    with browser(PROGRAM) as opened:
        yield opened


@pytest.mark.parametrize(("width", "scheme"), VIEWS)
def test_the_page_is_whole_and_fits(page: Page, report: Path, width: int, scheme: Scheme) -> None:
    page.open(report, width, scheme)
    assert page.ask("document.documentElement.clientWidth") == width
    assert page.ask("document.documentElement.scrollWidth") <= width
    assert page.ask(TOO_WIDE) == []
    assert page.ask(HIDDEN) == []
    assert set(SECTIONS) <= set(page.ask("[...document.querySelectorAll('section')].map(s => s.id)"))
    assert page.ask(SMALL_TEXT) == []
    assert page.ask(CUT_TEXT) == []
    assert page.ask(BROKEN_COLOURS) == []
    assert page.ask(CONTRAST) == []
    assert page.complaints() == []
    assert page.requests() == [report.resolve().as_uri()]


def test_the_colour_scheme_is_followed(page: Page, report: Path) -> None:
    seen = []
    for scheme in ("light", "dark"):
        page.open(report, 1280, scheme)
        line = "document.querySelector('.wide svg text')"
        seen.append(
            [
                page.ask(f"getComputedStyle({what}).{how}")
                for what, how in (("document.body", "backgroundColor"), (line, "fill"))
            ]
        )
    assert seen[0][0] != seen[1][0]
    assert seen[0][1] != seen[1][1]


def test_each_width_shows_its_own_charts(page: Page, report: Path) -> None:
    shown = "[...document.querySelectorAll('.{}')].filter(e => e.getBoundingClientRect().height > 0).length"
    for width, visible, hidden in ((1280, "wide", "narrow"), (390, "narrow", "wide")):
        page.open(report, width, "light")
        assert page.ask(shown.format(visible)) > 8
        assert page.ask(shown.format(hidden)) == 0


def test_a_click_or_a_key_sorts_a_table_and_missing_numbers_come_last(page: Page, report: Path) -> None:
    page.open(report, 1280, "light")
    column = """(() => { const table = [...document.querySelectorAll('#figures table')].find(t => t.tBodies[0].rows.length > 3);
      const place = [...table.tHead.rows[0].cells].findIndex(c => c.classList.contains('n'));
      const head = table.tHead.rows[0].cells[place];
      if (PRESS) { head.querySelector('button').focus(); head.querySelector('button').click(); }
      return [head.getAttribute('aria-sort'), [...table.tBodies[0].rows].map(r => r.cells[place])
        .map(c => parseFloat((c.title || c.firstChild?.textContent || '').replace(/,/g, '')))] })()"""
    before, shown = page.ask(column.replace("PRESS", "false"))
    assert before is None
    numbers = [value for value in shown if value is not None]
    for order, descending in (("ascending", False), ("descending", True)):
        told, values = page.ask(column.replace("PRESS", "true"))
        assert told == order
        assert values[: len(numbers)] == sorted(numbers, reverse=descending)
        assert len(values) == len(shown)
    assert page.complaints() == []


def test_a_browser_that_complains_is_noticed(page: Page, tmp_path: Path) -> None:
    bad = tmp_path / "bad.html"
    bad.write_text("<script>console.error('no')</script><img src='missing.png'><p style='width: 2000px'>wide</p>")
    page.open(bad, 390, "light")
    assert page.complaints()
    assert len(page.requests()) == 2
    assert page.ask("document.documentElement.scrollWidth") > 390

"""The pages build as a site, and every link and anchor in them leads somewhere."""

import logging
import re
from pathlib import Path

import pytest

pytest.importorskip("mkdocs")

from mkdocs.commands.build import build
from mkdocs.config import load_config

ROOT = Path(__file__).parents[1]


def test_the_site_builds_without_a_warning(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("NO_MKDOCS_2_WARNING", "1")
    with caplog.at_level(logging.WARNING, "mkdocs"):
        build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path / "site")))
    assert not [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    pages = {page.name for page in (tmp_path / "site").glob("*.html")}
    assert {f"{page.stem}.html" for page in (ROOT / "docs").glob("*.md")} <= pages
    for page in (tmp_path / "site").glob("*.html"):
        for source in re.findall(r'(?:src|srcset)="(images/[^"]+)"', page.read_text(encoding="utf-8")):
            assert (tmp_path / "site" / source).is_file(), (page.name, source)
    assert 'src="images/' in (tmp_path / "site" / "index.html").read_text(encoding="utf-8")
    reference = (tmp_path / "site" / "reference.html").read_text(encoding="utf-8")
    import tensornet_compress as tnc

    shown = {path.rpartition(".")[2] for path in re.findall(r'id="(tensornet_compress\.[\w.]+)"', reference)}
    assert {name for name in tnc.__all__ if callable(getattr(tnc, name))} <= shown

"""A hook of mkdocs: pages that lie outside docs/ join the site, and links between them lead to where they are there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

import tensornet_compress as tnc

_ROOT = Path(__file__).parents[1]
_TITLES = {
    "compressing": "Compress a model",
    "integrations": "Folders, exports and other packages",
    "files": "Save and load",
    "nn": "Modules",
    "kv": "Caches",
    "searching": "Search the layout of a tensor",
    "decompose": "Decompose a tensor",
    "metric": "Metrics",
    "tensor": "Networks",
    "train": "Train",
    "errors": "Errors",
}
"""Headings of the reference, by the room of the package."""
_PLACES = {"README.md": "index.md", "SECURITY.md": "SECURITY.md", "CHANGELOG.md": "CHANGELOG.md"}


def on_files(files: Files, config: Any) -> Files:
    """Add the pages at the root of the project and the notebooks."""
    for name, place in _PLACES.items():
        files.append(File.generated(config, place, content=(_ROOT / name).read_text(encoding="utf-8")))
    for notebook in sorted((_ROOT / "notebooks").glob("*.ipynb")):
        files.append(File.generated(config, f"notebooks/{notebook.name}", abs_src_path=str(notebook)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links as they must be on the site, and the reference."""

    def moved(found: re.Match[str]) -> str:
        target = found[2]
        if page.file.src_uri in _PLACES.values():
            target = re.sub(r"^docs/", "", target)
        target = re.sub(r"^\.\./", "", target)
        target = re.sub(r"^README\.md", "index.md", target)
        if target == "notebooks":
            target = "notebooks/1_index_ordering.ipynb"
        # Files that are no pages are only named.
        known = target.startswith(("http", "#")) or target.partition("#")[0].endswith((".md", ".ipynb", ".svg", ".png"))
        return f"{found[1]}({target})" if known else found[1].strip("![]")

    if page.file.src_uri == "index.md":
        markdown = markdown.replace('"docs/images/', '"images/')
    markdown = markdown.replace("<!-- all names -->", _reference()) if page.file.src_uri == "reference.md" else markdown
    return re.sub(r"(!?\[[^\]]*\])\(([^)\s]+)\)", moved, markdown)


def _reference() -> str:
    """What mkdocstrings is to write of the public functions and classes, by the room that they are defined in."""
    rooms: dict[str, list[str]] = {}
    for name in sorted(tnc.__all__, key=str.lower):
        thing = getattr(tnc, name)
        if callable(thing) and getattr(thing, "__module__", "").startswith("tensornet_compress."):
            rooms.setdefault(thing.__module__.split(".")[1], []).append(f"{thing.__module__}.{thing.__qualname__}")
    titles = _TITLES | {room: room.capitalize() for room in rooms if room not in _TITLES}
    parts = []
    for room in sorted(rooms, key=list(titles).index):
        parts += [f"## {titles[room]}", *(f"::: {path}" for path in rooms[room])]
    return "\n\n".join(parts)

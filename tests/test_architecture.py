"""The rooms of the package are those of docs/architecture.md, and imports go only down its table."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import networkx as nx

from tests.documents import ROOT

PACKAGE = ROOT / "tensornet_compress"
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


def room_of(path: Path) -> str:
    """The folder or file directly under the package."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@cache
def imports() -> nx.DiGraph:
    """Room -> room, for every import anywhere in a room's files; edges carry the files."""
    graph: nx.DiGraph = nx.DiGraph()
    for path in PACKAGE.rglob("*.py"):
        if path == PACKAGE / "__init__.py":
            continue
        graph.add_node(room_of(path))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}: a relative import"
                inside = [f"{node.module}.{alias.name}" for alias in node.names]
                names = inside if node.module == PACKAGE.name else [node.module or ""]
            for name in names:
                package, *rest = name.split(".")
                if package == PACKAGE.name and rest and rest[0] != room_of(path):
                    graph.add_edge(room_of(path), rest[0], file=str(path.relative_to(ROOT)))
    return graph


def rows() -> dict[str, int]:
    """Room -> row of the table, counted from the top."""
    table = PAGE.split("| rooms |", 1)[1].split("\n\n", 1)[0].splitlines()[2:]
    return {name: number for number, row in enumerate(table) for name in re.findall(r"`(\w+)(?:/|\.py)`", row.split("|")[1])}


def test_every_room_is_on_the_page() -> None:
    missing = sorted(set(imports()) - set(rows()))
    assert not missing, f"docs/architecture.md has no row for {missing}"


def test_imports_go_only_down_the_table() -> None:
    row = rows()
    wrong = [f"{data['file']}: {a} -> {b}" for a, b, data in imports().edges(data=True) if row[a] >= row[b]]
    assert not wrong
    assert nx.is_directed_acyclic_graph(imports())


def test_no_files_import_each_other_in_a_circle() -> None:
    files: nx.DiGraph = nx.DiGraph()
    names = {".".join(path.with_suffix("").relative_to(ROOT).parts).removesuffix(".__init__") for path in PACKAGE.rglob("*.py")}
    for path in PACKAGE.rglob("*.py"):
        name = ".".join(path.with_suffix("").relative_to(ROOT).parts).removesuffix(".__init__")
        if name == PACKAGE.name:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith(f"{PACKAGE.name}."):
                found = [f"{node.module}.{alias.name}" for alias in node.names]
                files.add_edges_from((name, other if other in names else node.module) for other in found)
    files.remove_edges_from(list(nx.selfloop_edges(files)))
    circles = [sorted(part) for part in nx.strongly_connected_components(files) if len(part) > 1]
    assert not circles


def test_files_named_on_the_page_exist() -> None:
    for name in re.findall(r"`([\w/]+\.py)`", PAGE):
        assert (PACKAGE / name).is_file() or (ROOT / name).is_file(), name


def test_an_upward_import_would_be_seen() -> None:
    assert imports().has_edge("cli", "searching")
    assert not imports().has_edge("coding", "tensor")

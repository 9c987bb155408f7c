"""Colours of charts: names that the style sheet gives a light and a dark value.

matplotlib draws with a stand-in per name; the finished SVG refers to the CSS variable instead, so that one picture serves both
colour schemes.
"""

from __future__ import annotations

OURS = ("ours-1", "ours-2", "ours-3", "ours-4")
PEERS = ("peer-1", "peer-2", "peer-3", "peer-4", "peer-5", "peer-6", "peer-7", "peer-8")
INKS = ("ink", "muted", "line", "card", "before", "after", "keys", "values", "node", *OURS, *PEERS)
STAND_INS = {name: f"#f00d{number:02x}" for number, name in enumerate(INKS)}
MARKERS = (("o", "●"), ("s", "■"), ("^", "▲"), ("D", "◆"), ("v", "▼"), ("P", "✚"), ("X", "✖"), ("*", "★"))


def colour(name: str) -> str:
    """The stand-in of a colour, for matplotlib."""
    return STAND_INS[name]


def with_variables(svg: str) -> str:
    """``svg`` with every stand-in replaced by its CSS variable."""
    for name, stand_in in STAND_INS.items():
        svg = svg.replace(stand_in, f"var(--{name})")
    return svg

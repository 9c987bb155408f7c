"""A command's terminal as an animated picture, for the README.

    python benchmarks/recording.py docs/images/demo.svg "python benchmarks/demo.py" [--shown "make demo"]

The command runs in a terminal of its own; what it writes, and when, becomes an SVG that browsers play without a script. Pauses
are cut short; who asks the browser for less motion sees the last screen.
"""

from __future__ import annotations

import argparse
import os
import pty
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from time import perf_counter

import pyte

COLUMNS, LINES = 100, 26
LONGEST_PAUSE, LEAST_PAUSE, LAST = 0.5, 0.1, 8.0
WIDTH, HEIGHT, MARGIN = 8.4, 18, 14
COLOURS = {
    "default": "#d8dee9", "black": "#4c566a", "red": "#e06c75", "green": "#98c379", "brown": "#e5c07b", "blue": "#61afef",
    "magenta": "#c678dd", "cyan": "#56b6c2", "white": "#eceff4",
}  # fmt: skip
GROUND = "#1e2430"


@dataclass(frozen=True)
class Frame:
    """A screen for so many seconds. ``lines``: each as runs of (text, colour, bold)."""

    seconds: float
    lines: tuple[tuple[tuple[str, str, bool], ...], ...]


def recorded(command: Sequence[str]) -> Iterator[tuple[float, bytes]]:
    """What a command writes to a terminal, and seconds since its start."""
    began = perf_counter()
    child, terminal = pty.fork()
    if child == 0:
        os.environ |= {"TERM": "xterm-256color", "COLUMNS": str(COLUMNS), "LINES": str(LINES)}
        os.execvp(command[0], command)
    while True:
        try:
            written = os.read(terminal, 1 << 16)
        except OSError:  # the terminal is gone with the command
            break
        if not written:
            break
        yield perf_counter() - began, written
    if code := os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
        raise SystemExit(f"{shlex.join(command)} ended with {code}")


def frames(writes: Sequence[tuple[float, bytes]], shown: str) -> list[Frame]:
    """Screens that differ, under a prompt at which ``shown`` was typed."""
    screen = pyte.Screen(COLUMNS, LINES)
    stream = pyte.ByteStream(screen)
    stream.feed(f"$ {shown}\r\n".encode())
    made, held = [], LONGEST_PAUSE
    for (at, written), (following, _) in zip(writes, [*writes[1:], (writes[-1][0], b"")]):
        stream.feed(written)
        held += min(following - at, LONGEST_PAUSE)
        lines = tuple(_runs(screen, number) for number in range(LINES))
        if held >= LEAST_PAUSE and (not made or lines != made[-1].lines):
            made.append(Frame(held, lines))
            held = 0.0
    return [*made, Frame(LAST, tuple(_runs(screen, number) for number in range(LINES)))]


def _runs(screen: pyte.Screen, number: int) -> tuple[tuple[str, str, bool], ...]:
    """A line of the screen, characters of one look together."""
    runs: list[tuple[str, str, bool]] = []
    for column in range(COLUMNS):
        cell = screen.buffer[number][column]
        colour = COLOURS.get(cell.fg.removeprefix("bright"), f"#{cell.fg}")
        if runs and runs[-1][1:] == (colour, cell.bold):
            runs[-1] = (runs[-1][0] + cell.data, colour, cell.bold)
        else:
            runs.append((cell.data, colour, cell.bold))
    while runs and not runs[-1][0].strip():
        runs.pop()
    return tuple(runs)


def svg(film: Sequence[Frame], title: str) -> str:
    """The film as one picture: all screens below each other, of which a window shows one after the other."""
    wide, high = round(COLUMNS * WIDTH + 2 * MARGIN), LINES * HEIGHT + 2 * MARGIN
    whole, passed = sum(frame.seconds for frame in film), 0.0
    known: dict[tuple[tuple[str, str, bool], ...], str] = {}
    steps, screens = [], []
    for place, frame in enumerate(film):
        steps.append(f"{100 * passed / whole:.3f}%{{transform:translateY({-place * high}px)}}")
        passed += frame.seconds
        for number, line in enumerate(frame.lines):
            if line:
                name = known.setdefault(line, f"l{len(known)}")
                screens.append(f'<use href="#{name}" y="{place * high + MARGIN + number * HEIGHT}"/>')
    lines = "".join(f'<g id="{name}">{_line(line)}</g>' for line, name in known.items())
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide} {high}" width="{wide}" height="{high}" role="img">'
        f"<title>{escape(title)}</title><style>text{{font:14px ui-monospace,Menlo,Consolas,monospace;white-space:pre}}"
        f"@keyframes film{{{''.join(steps)}}}#film{{animation:film {whole:.2f}s step-end infinite}}"
        f"@media (prefers-reduced-motion:reduce){{#film{{animation:none;transform:translateY({-(len(film) - 1) * high}px)}}}}"
        f'</style><defs>{lines}</defs><rect width="100%" height="100%" rx="8" fill="{GROUND}"/>'
        f'<g id="film">{"".join(screens)}</g></svg>\n'
    )


def _line(runs: Sequence[tuple[str, str, bool]]) -> str:
    told, column = [], 0
    for text, colour, bold in runs:
        if word := text.strip():
            weight = ' font-weight="bold"' if bold else ""
            left = MARGIN + (column + text.index(word)) * WIDTH
            place = f'x="{left:.1f}" y="{HEIGHT - 4}" textLength="{len(word) * WIDTH:.1f}"'
            told.append(f'<text {place} fill="{colour}"{weight}>{escape(word)}</text>')
        column += len(text)
    return "".join(told)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", type=Path)
    parser.add_argument("command")
    parser.add_argument("--shown", help="what stands at the prompt in place of the command")
    arguments = parser.parse_args()
    shown = arguments.shown or arguments.command
    film = frames(list(recorded(shlex.split(arguments.command))), shown)
    arguments.picture.write_text(svg(film, f"Recording of {shown}"), encoding="utf-8")
    print(f"{arguments.picture}: {len(film)} screens, {arguments.picture.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()

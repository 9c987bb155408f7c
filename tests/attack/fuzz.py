"""Damaged files are read in a child process, each within time and memory; what comes of it is counted."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random

from tensornet_compress.errors import TensorNetError
from tensornet_compress.threads import limited_threads
from tests.attack.damage import RAW, forge, pieces
from tests.attack.kills import ended_by
from tests.attack.victims import VICTIMS, Victim

SECONDS, NBYTES = 10.0, 1 << 30
BAD = ("silently wrong", "traceback", "hang", "memory", "crash")
_BATCH = 60


def fuzz(place: Path, count: int, seed: int = 0) -> tuple[Counter[str], list[str]]:
    """Outcomes of ``count`` damaged files, shared out over all victims, and a line for each bad one."""
    # A forked process has none of the threads of its parent, and would wait for them.
    with limited_threads():
        return _shared_out(place, count, seed)


def _shared_out(place: Path, count: int, seed: int) -> tuple[Counter[str], list[str]]:
    outcomes: Counter[str] = Counter()
    told: list[str] = []
    names = sorted(VICTIMS)
    for number, name in enumerate(names):
        share = count // len(names) + (number < count % len(names))
        whole = place / f"{number}" / "whole"
        whole.parent.mkdir(parents=True)
        VICTIMS[name].write(whole, 0)
        wanted = VICTIMS[name].read(whole)
        for outcome, line in _outcomes(VICTIMS[name], whole, wanted, share, seed):
            outcomes[outcome] += 1
            if outcome in BAD:
                told.append(f"{name} {outcome}: {line}")
    return outcomes, told


def _outcomes(victim: Victim, whole: Path, wanted: str, count: int, seed: int) -> Iterator[tuple[str, str]]:
    first = 0
    while first < count:
        log = whole.with_name("log")
        log.write_text("")
        child = os.fork()
        if not child:
            try:
                with log.open("a", buffering=1) as file:
                    for number in range(first, min(first + _BATCH, count)):
                        file.write(json.dumps(_case(victim, whole, wanted, Random(f"{seed} {victim.name} {number}"))) + "\n")
            finally:
                os._exit(0)
        ended_by(child, 2 * SECONDS * _BATCH)
        done = [tuple(json.loads(line)) for line in log.read_text().splitlines()]
        yield from done
        first += len(done)
        if len(done) < min(_BATCH, count - first + len(done)):
            yield "crash", f"case {first} of seed {seed} ended its process"
            first += 1


def _case(victim: Victim, whole: Path, wanted: str, chance: Random) -> tuple[str, str]:
    place = whole.with_name("damaged")
    shutil.rmtree(place, ignore_errors=True) if place.is_dir() else place.unlink(missing_ok=True)
    shutil.copytree(whole, place) if whole.is_dir() else shutil.copy2(whole, place)
    forged = chance.random() < 0.45
    if forged:
        told = forge(place, chance)
    else:
        path = chance.choice(pieces(place))
        told = f"{path.name}: {chance.choice(RAW)(path, chance)}"
    return _judged(victim, place, wanted, told, forged)


def _judged(victim: Victim, place: Path, wanted: str, told: str, forged: bool) -> tuple[str, str]:
    Path("/proc/self/clear_refs").write_text("5")
    before, began, outcome = held("VmRSS"), time.monotonic(), "refused"
    signal.signal(signal.SIGALRM, _late)
    signal.alarm(int(SECONDS))
    try:
        found = victim.read(place)
        # Of a forgery all that can be asked is that it is read like anything else.
        outcome = "harmless" if found == wanted else "forged" if forged else "silently wrong"
    except TensorNetError as error:
        if "\n" in str(error) and "validation error" in str(error):
            outcome, told = "traceback", f"{told}: {error}"
    except TimeoutError:
        outcome = "hang"
    except BaseException as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        own = [frame for frame in traceback.extract_tb(error.__traceback__) if "tensornet_compress" in frame.filename]
        at = own[-1] if own else where
        outcome, told = (
            "traceback",
            f"{told}: {type(error).__name__}: {str(error)[:120]} at {Path(at.filename).name}:{at.lineno}",
        )
    finally:
        signal.alarm(0)
    if outcome != "hang" and time.monotonic() - began > SECONDS:
        outcome = "hang"
    if held("VmHWM") - before > NBYTES:
        outcome = "memory"
    return outcome, told


def held(name: str) -> int:
    """Bytes that this process holds, as the system tells it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def _late(*_: object) -> None:
    raise TimeoutError


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        counted, lines = fuzz(Path(folder), int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0)
    print(counted, *lines, sep="\n")

"""Jobs whose worker is killed; in a file that imports little, since workers import it."""

import os
import signal
from pathlib import Path


def dies_once(job: tuple[str, int]) -> int:
    """The square of a number; the first worker to meet 3 dies of it."""
    mark, number = Path(job[0]), job[1]
    if number == 3 and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return number * number


def dies(_job: int) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return 0

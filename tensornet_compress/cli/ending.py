"""How a command ends: exit codes and one line for signals, closed pipes, bad input and what nobody expected."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from types import FrameType
from typing import Any

from tensornet_compress.errors import TensorNetError

_OTHER, _BAD_INPUT, _INTERRUPTED, _CLOSED_PIPE, _TERMINATED = 1, 2, 130, 141, 143
# The extra that a package which may be missing belongs to.
_EXTRAS = {"transformers": "hf", "tokenizers": "hf", "accelerate": "hf", "jinja2": "report", "matplotlib": "report"}
debug = {"traceback": False}
"""Set by ``tensornet-compress --debug``."""


class Terminated(BaseException):
    """SIGTERM arrived; like ctrl-C, so that temporary files and workers are cleaned up on the way out."""


@contextmanager
def ending() -> Iterator[None]:
    """Around a whole command line: SIGTERM and ctrl-C end it with one line and exit codes 143 and 130, at any moment; a reader
    that closed its pipe ends it quietly with 141."""
    signal.signal(signal.SIGTERM, _terminate)
    try:
        try:
            yield
        finally:
            if sys.stdout is not None:  # closed by whoever called
                sys.stdout.flush()
    except Terminated as error:
        _leave("stopped by SIGTERM", _TERMINATED, error)
    except KeyboardInterrupt as error:
        _leave("interrupted", _INTERRUPTED, error)
    except BrokenPipeError as error:
        _leave_quietly(error)


def plain_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Bad input ends a command with exit code 2, anything unexpected with 1: each with one line, not with a traceback."""

    @wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except BrokenPipeError as error:
            _leave_quietly(error)
        except (TensorNetError, OSError) as error:
            _leave(f"error: {error}", _BAD_INPUT, error)
        except ModuleNotFoundError as error:
            extra = _EXTRAS.get(error.name or "")
            if extra is None:
                raise
            told = f"this needs {error.name}; run: python -m pip install 'tensornet-compress[{extra}]'"
            _leave(f"error: {told}", _BAD_INPUT, error)
        except KeyboardInterrupt as error:
            _leave("interrupted", _INTERRUPTED, error)
        except Terminated as error:
            _leave("stopped by SIGTERM", _TERMINATED, error)
        except Exception as error:
            if debug["traceback"] or type(error).__module__.startswith(("typer", "click")):
                raise
            told = f"error: unexpected {type(error).__name__}: {error}; see where with `tensornet-compress --debug ...`"
            _leave(told, _OTHER, error)

    return wrapped


def _leave(line: str, code: int, error: BaseException | None = None) -> None:
    told = "; ".join([line, *getattr(error, "__notes__", ())])
    print(" ".join(told.split()), file=sys.stderr)
    raise SystemExit(code) from error


def _leave_quietly(error: BrokenPipeError) -> None:
    # What is still in the buffer cannot be written either, and the interpreter would complain of that.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    raise SystemExit(_CLOSED_PIPE) from error


def _terminate(_signal: int, _frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # cleaning up must not be stopped once more
    raise Terminated

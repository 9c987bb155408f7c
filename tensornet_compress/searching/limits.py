"""What bounds a search: a relative error or a number of bytes, and a time; and one view of a tensor under these."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import inf
from numbers import Integral, Real
from time import perf_counter
from typing import Protocol

from tensornet_compress.errors import TensorNetError
from tensornet_compress.searching.store import SpectrumStore

_RESOLVED = 2.0**-49


class Priced(Protocol):
    """What is compared: predicted or measured."""

    @property
    def nbytes(self) -> int:
        """Stored bytes."""
        ...

    @property
    def error(self) -> float:
        """Relative error."""
        ...


_FINEST = 1e-30


class Limit:
    """What a network must keep, and which of two that keep it is better."""

    def __init__(self, max_error: float | None = None, max_bytes: int | None = None):
        """Raises ``TensorNetError`` unless exactly one sensible limit is given."""
        for label, value, kind in (("max_error", max_error, Real), ("max_bytes", max_bytes, Integral)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, kind)):
                raise TensorNetError(f"{label} must be {'a number' if kind is Real else 'an integer'}, was given {value!r}")
        if (max_error is None) == (max_bytes is None):
            raise TensorNetError(f"give exactly one of max_error and max_bytes; was given {max_error} and {max_bytes}")
        if max_error is not None and not (max_error == 0 or _FINEST <= max_error < inf):
            raise TensorNetError(f"max_error must be 0 or from {_FINEST} up and finite, was given {max_error}")
        if max_bytes is not None and max_bytes < 1:
            raise TensorNetError(f"max_bytes must be at least 1, was given {max_bytes}")
        self.max_error = None if max_error is None else float(max_error)
        self.max_bytes = None if max_bytes is None else int(max_bytes)

    def __str__(self) -> str:
        return f"error at most {self.max_error:g}" if self.max_error is not None else f"at most {self.max_bytes:,} bytes"

    @property
    def exact(self) -> bool:
        """Whether no network of floating point cores is expected to keep the limit."""
        return self.max_error is not None and self.max_error**2 <= _RESOLVED

    def allows(self, error: float, nbytes: int) -> bool:
        """Whether something of this error and size is within the limit."""
        if self.max_error is not None:
            return error <= self.max_error
        return self.max_bytes is not None and nbytes <= self.max_bytes

    def keeps(self, item: Priced) -> bool:
        """Whether a network is within the limit."""
        return self.allows(item.error, item.nbytes)

    def cost(self, item: Priced) -> float:
        """What should be small: bytes for an error limit, the error for a byte limit."""
        return item.nbytes if self.max_error is not None else item.error

    def sort_key(self, item: Priced, ordered: bool = False) -> tuple[float, bool, float]:
        """What is compared: the cost, then native order before searched ones, then the other quantity."""
        return self.cost(item), ordered, item.error if self.max_error is not None else item.nbytes


class Deadline:
    """A time to stop at, on the clock of ``perf_counter``; never unless given."""

    def __init__(self, at: float = inf):
        self.at, self.stopped = at, False

    def passed(self) -> bool:
        """Whether it is time to stop. Remembered in ``stopped``: what asked has left something undone."""
        self.stopped = self.stopped or perf_counter() >= self.at
        return self.stopped


NEVER = Deadline()


@dataclass(frozen=True)
class View:
    """A tensor cut in digits, as one pass of a search sees it: the spectra of its unfoldings, the limit and the deadline.

    ``allowed``: the squared norm that may be dropped where structures are compared before anything is predicted exactly.
    """

    store: SpectrumStore
    limit: Limit
    deadline: Deadline = NEVER
    allowed: float = 0.0

    def factors(self) -> list[tuple[tuple[int, ...], View]]:
        """Of an outer product the modes of each factor, and views of these; nothing where none is seen."""
        shares = [(modes, part, part.energy / max(self.store.energy, 1e-300)) for modes, part in self.store.factors()]
        return [(modes, replace(self, store=part, allowed=self.allowed * share)) for modes, part, share in shares]

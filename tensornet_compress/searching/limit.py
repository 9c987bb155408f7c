"""The limit of a search: a relative error or a number of bytes."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral, Real
from typing import Literal

from tensornet_compress.errors import TensorNetError
from tensornet_compress.searching.candidates import Candidate
from tensornet_compress.searching.entry_search import EntrySort
from tensornet_compress.searching.result import Found

Ordering = Literal["mode", "fibre", "entry"]
ORDERINGS: tuple[Ordering, ...] = ("mode", "fibre")
KNOWN_ORDERINGS: tuple[Ordering, ...] = (*ORDERINGS, "entry")
_PRECISION = 1e-6
_RESOLVED = 2.0**-49
_WRONG = 1.3


class Limit:
    """What a network must keep, and which of two that keep it is better."""

    def __init__(self, max_error: float | None, max_bytes: int | None):
        """Raises ``TensorNetError`` unless exactly one sensible limit is given."""
        for label, value, kind in (("max_error", max_error, Real), ("max_bytes", max_bytes, Integral)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, kind)):
                raise TensorNetError(f"{label} must be {'a number' if kind is Real else 'an integer'}, was given {value!r}")
        if (max_error is None) == (max_bytes is None):
            raise TensorNetError(f"give exactly one of max_error and max_bytes; was given {max_error} and {max_bytes}")
        if max_error is not None and not 0 <= max_error < float("inf"):
            raise TensorNetError(f"max_error must be 0 or more and finite, was given {max_error}")
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

    def keeps(self, found: Found) -> bool:
        """Whether a measured network is within the limit."""
        return self.allows(found.error, found.nbytes)

    def allows(self, error: float, nbytes: int) -> bool:
        """Whether something of this error and size is within the limit."""
        if self.max_error is not None:
            return error <= self.max_error
        return self.max_bytes is not None and nbytes <= self.max_bytes

    def best(self, items: Sequence[Found]) -> Found | None:
        """The best that is within the limit; ties go to native order."""
        kept = [item for item in items if self.keeps(item)]
        return min(kept, key=lambda item: self.cost(item.nbytes, item.error, item.ordered), default=None)

    def hopeless(self, candidate: Candidate, items: Sequence[Found]) -> bool:
        """Whether the best of ``items`` is smaller (or nearer) than the candidate by more than predictions are wrong by."""
        best = self.best(items)
        known = None if best is None else self.cost(best.nbytes, best.error)[0]
        return known is not None and self.cost(candidate.nbytes, candidate.error)[0] > _WRONG * known

    def required(self, items: Sequence[Found]) -> Found:
        """``best``; raises ``TensorNetError`` where nothing is within the limit."""
        best = self.best(items)
        if best is not None:
            return best
        nearest = self.nearest(items)
        if self.max_error is not None:
            raise TensorNetError(
                f"no form keeps {self}; the best reached {nearest.error:.3g} ({nearest.describe()}): cores have "
                "at most single precision; allow a larger error, or rescale numbers beyond its range"
            )
        raise TensorNetError(f"no form keeps {self}; the smallest tried takes {nearest.nbytes:,} bytes ({nearest.family})")

    def nearest(self, items: Sequence[Found]) -> Found:
        """What comes nearest to the limit."""
        return min(items, key=lambda item: item.nbytes if self.max_error is None else item.error)

    def gain(self, without: Found, best: Found) -> float:
        """Bytes (or error) of ``without`` over those of ``best``; infinite where only ``best`` is within the limit. Errors
        below the precision of fp32 cores count as equal."""
        if not self.keeps(without):
            return float("inf")
        if self.max_error is not None:
            return without.nbytes / best.nbytes
        return max(without.error, _PRECISION) / max(best.error, _PRECISION)

    def ratio(self, one: Found, other: EntrySort) -> float:
        """What is to be small of ``one`` over that of ``other``."""
        ours, theirs = (self.cost(item.nbytes, item.error)[0] for item in (one, other))
        return ours / theirs if theirs > 0 else 1.0

    def price(self, candidate: Candidate | None) -> float:
        """The free quantity as predicted; infinite where there is no candidate."""
        return float("inf") if candidate is None else self.cost(candidate.nbytes, candidate.error)[0]

    def cost(self, nbytes: int, error: float, ordered: bool = False) -> tuple[float, bool, float]:
        """What is compared: the free quantity first, then native order, then the other."""
        return (nbytes, ordered, error) if self.max_error is not None else (error, ordered, nbytes)

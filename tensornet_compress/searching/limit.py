"""The limit of a search: a relative error or a number of bytes."""

from __future__ import annotations

from tensornet_compress.errors import TensorNetError
from tensornet_compress.searching.result import Found


class Limit:
    """What a network must keep, and which of two that keep it is better."""

    def __init__(self, max_error: float | None, max_bytes: int | None):
        """Raises ``TensorNetError`` unless exactly one sensible limit is given."""
        for label, value, kinds in (("max_error", max_error, (int, float)), ("max_bytes", max_bytes, (int,))):
            if value is not None and (isinstance(value, bool) or not isinstance(value, kinds)):
                raise TensorNetError(f"{label} must be {'a number' if float in kinds else 'an integer'}, was given {value!r}")
        if (max_error is None) == (max_bytes is None):
            raise TensorNetError(f"give exactly one of max_error and max_bytes; was given {max_error} and {max_bytes}")
        if max_error is not None and not 0 <= max_error < float("inf"):
            raise TensorNetError(f"max_error must be 0 or more and finite, was given {max_error}")
        if max_bytes is not None and max_bytes < 1:
            raise TensorNetError(f"max_bytes must be at least 1, was given {max_bytes}")
        self.max_error, self.max_bytes = max_error, max_bytes

    def __str__(self) -> str:
        return f"error at most {self.max_error:g}" if self.max_error is not None else f"at most {self.max_bytes:,} bytes"

    def keeps(self, found: Found) -> bool:
        """Whether a measured network is within the limit."""
        return self.allows(found.error, found.nbytes)

    def allows(self, error: float, nbytes: int) -> bool:
        """Whether something of this error and size is within the limit."""
        if self.max_error is not None:
            return error <= self.max_error
        return self.max_bytes is not None and nbytes <= self.max_bytes

    def cost(self, nbytes: int, error: float, ordered: bool = False) -> tuple[float, bool, float]:
        """What is compared: the free quantity first, then native order, then the other."""
        return (nbytes, ordered, error) if self.max_error is not None else (error, ordered, nbytes)

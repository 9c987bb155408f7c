"""Budget: how many bytes a compression may leave."""

from __future__ import annotations

from math import inf
from typing import Self

from pydantic import ValidationError, model_validator

from tensornet_compress.errors import BudgetError
from tensornet_compress.frozen import Frozen


class Budget(Frozen):
    """Exactly one of:

    * ``bits_per_weight``: 8 x stored bytes of the targeted modules (bias included) / number of their weights;
    * ``ratio``: stored bytes of the whole saved model / bytes of the original;
    * ``nbytes``: stored bytes of the whole saved model.

    Tensors are counted, not the few bytes of headers and JSON. The budget is never exceeded; it is met within 1 % where the
    options of the layers are fine enough for that, and the report says so where they are not.
    """

    bits_per_weight: float | None = None
    ratio: float | None = None
    nbytes: int | None = None

    def __init__(
        self,
        *,
        bits_per_weight: float | None = None,
        ratio: float | None = None,
        nbytes: int | None = None,
        **unknown: object,
    ):
        """Raises ``BudgetError`` unless exactly one positive, finite value is given."""
        given: dict[str, object] = {"bits_per_weight": bits_per_weight, "ratio": ratio, "nbytes": nbytes} | unknown
        if any(isinstance(value, bool) for value in given.values()):
            raise BudgetError(f"not a valid Budget: a budget is a number, was given {given}")
        try:
            super().__init__(**given)
        except ValidationError as error:
            first = error.errors()[0]
            field = "".join(f"{part}: " for part in first["loc"])
            raise BudgetError("not a valid Budget: " + field + first["msg"].removeprefix("Value error, ")) from error

    @model_validator(mode="after")
    def _check(self) -> Self:
        given = {name: value for name, value in self if value is not None}
        if len(given) != 1:
            raise ValueError(f"give exactly one of bits_per_weight, ratio and nbytes; was given {given or 'none'}")
        if not all(0 < value < inf for value in given.values()):
            raise ValueError(f"a budget must be positive and finite, was given {given}")
        return self

    def __str__(self) -> str:
        if self.bits_per_weight is not None:
            return f"{self.bits_per_weight:g} bits per weight"
        return f"{self.ratio:g} of the model's bytes" if self.ratio is not None else f"{self.nbytes:,} bytes in all"

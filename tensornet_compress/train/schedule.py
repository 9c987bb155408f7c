"""How fast a model is made smaller: the bytes allowed at each step of an iteration, behind one small interface."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from tensornet_compress.frozen import Frozen

Kind = Literal["one-shot", "linear", "cubic", "cycles", "multiplier"]


class Schedule(Frozen):
    """Bytes or multiplier per step.

    * ``one-shot``: the final bytes at once, in one step;
    * ``linear``, ``cubic``: bytes fall from dense to final over the first ``ramp`` of the steps (cubic: fast, then slowly), and
      the rest corrects at the final size;
    * ``cycles``: the final bytes at every step, so that each is a truncate - correct - truncate cycle;
    * ``multiplier``: the price of a byte rises geometrically to the one that meets the budget, and bytes follow.

    ``corrections``: gradient steps without truncation before each thresholding, beside the one that belongs to it.
    """

    kind: Kind = "cycles"
    steps: int = Field(default=10, ge=1)
    ramp: float = Field(default=0.7, gt=0, le=1)
    corrections: int = Field(default=0, ge=0)
    start_share: float = Field(default=1e-2, gt=0, le=1)

    @property
    def count(self) -> int:
        """Thresholdings in all."""
        return 1 if self.kind == "one-shot" else self.steps

    def allowed(self, step: int, largest: int, final: int) -> int:
        """Bytes allowed after step ``step`` (0-based), between ``largest`` and ``final``."""
        if self.kind not in ("linear", "cubic") or largest <= final:
            return final
        ramp = max(1, round(self.ramp * self.count))
        left = max(0.0, 1 - (step + 1) / ramp)
        return final + int((largest - final) * (left**3 if self.kind == "cubic" else left))

    def price_share(self, step: int) -> float:
        """The multiplier of a step relative to that which meets the budget."""
        if self.kind != "multiplier":
            return 1.0
        ramp = max(1, round(self.ramp * self.count))
        return float(self.start_share ** max(0.0, 1 - (step + 1) / ramp))

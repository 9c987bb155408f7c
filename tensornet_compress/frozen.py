"""Base class of everything that is plain data: immutable, validated, JSON both ways."""

from __future__ import annotations

from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from tensornet_compress.errors import TensorNetError


class Frozen(BaseModel):
    """Plain data with JSON both ways; unknown fields and wrong types are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False)

    def to_json(self, indent: int | None = None) -> str:
        """The JSON text; ``from_json`` of it gives an equal object."""
        return self.model_dump_json(indent=indent)

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Parse and validate JSON text.

        Raises:
            TensorNetError: the text is not JSON, or does not describe a valid object; the message names the field.
        """
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "top level"
            raise TensorNetError(f"not a valid {cls.__name__}: {where}: {first['msg']}") from error


class Shared:
    """Something that never changes once made, so that a copy of what holds it may hold the same one."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

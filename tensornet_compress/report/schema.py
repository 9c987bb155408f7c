"""The one result schema: rows of measured values, each method at each size, with the settings and machine that made them."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    Field,
    JsonValue,
    SerializerFunctionWrapHandler,
    field_serializer,
    field_validator,
    model_serializer,
    model_validator,
)

from tensornet_compress.errors import CheckpointError, TensorNetError
from tensornet_compress.files.hashes import check_seal, sealed
from tensornet_compress.files.reading import LARGEST_JSON, parse_json, read_text
from tensornet_compress.files.whole import whole_file
from tensornet_compress.frozen import Frozen

Finite = Annotated[float, Field(allow_inf_nan=False)]
Task = Literal["weights", "kv", "search", "speed"]
Role = Literal["size", "before", "quality", "time", "other"]
_TIME_UNIT = re.compile(
    r"(s|ms|us|µs|min|h|seconds?|minutes?|milliseconds?)( ?/.*| per .*)?|.*(/|per ?)\s*(s|sec|second)", re.IGNORECASE
)
_TIME_NAME = re.compile(r"(^|_)(seconds|ms|speed|speedup|time|latency|throughput|tokens_s|s)($|_)")
_SIZE_UNIT = re.compile(r"bytes?|b|bits?([ /].*)?", re.IGNORECASE)
_BEFORE = ("original_nbytes", "exact_nbytes", "dense_nbytes")


class Machine(Frozen):
    """Where a result was made. ``packages``: versions by name."""

    processor: str
    cores: int
    threads: int
    device: str = "cpu"
    python: str
    packages: dict[str, str] = Field(default_factory=dict)
    commit: str | None = None


class Measure(Frozen):
    """What a value means: ``unit`` as printed after it, ``better`` the direction that is better (``None``: neither).

    ``role``: what the value is for: a stored *size*, the size *before* compression, a *quality* by which methods are compared,
    a *time*, or something *other*. A measure that does not say it has the role of ``usual_role`` once it is part of a result.
    """

    title: str
    unit: str = ""
    better: Literal["lower", "higher"] | None = None
    explanation: str = ""
    role: Role | None = None


def usual_role(name: str, measure: Measure) -> Role:
    """The role that the name, unit and direction of a measure suggest; files say the role only where it is another one."""
    unit = measure.unit.strip()
    if _TIME_UNIT.fullmatch(unit) or _TIME_NAME.search(name):
        return "time"
    if name == "ratio" or "nbytes" in name or _SIZE_UNIT.fullmatch(unit):
        return "before" if name in _BEFORE else "size"
    return "other" if measure.better is None or "gain" in name else "quality"


class LayerCell(Frozen):
    """One layer of a compressed model: a cell of the heat map and a block of the ledger. ``error``: relative, Frobenius unless
    the row's note says otherwise."""

    name: str
    kind: str
    family: str
    formats: str
    ranks: tuple[int, ...] = ()
    bits_per_weight: Finite
    nbytes: int
    error: Finite | None = None


class Spectrum(Frozen):
    """Singular values of one unfolding before and after ordering, each divided by the largest of both, in falling order."""

    title: str
    before: tuple[Finite, ...]
    after: tuple[Finite, ...]


class Drawing(Frozen):
    """A network to draw. ``legs``: per core the labels of its open legs; ``edges``: (core, core, rank)."""

    title: str
    legs: tuple[tuple[str, ...], ...]
    edges: tuple[tuple[int, int, int], ...] = ()

    @model_validator(mode="after")
    def _edges_join_cores(self) -> Self:
        for one, other, _ in self.edges:
            if not (0 <= one < len(self.legs) and 0 <= other < len(self.legs)):
                raise ValueError(f"edge ({one}, {other}) names a core that is not among the {len(self.legs)} cores")
        return self


class BitsOfLayer(Frozen):
    """Bits per element that a cache spends on keys and values of one layer."""

    layer: int
    keys: Finite
    values: Finite


class Row(Frozen):
    """One method on one subject (a model, a text, a tensor) at one size.

    ``values``: measure name -> value, the names being those of ``Result.measures``. ``errors``: standard errors of those values
    that are means over documents (or sentences, or seeds). ``budget``: what was asked for (bits per
    weight or per element, or the error allowed), in ``budget_unit``. ``skipped``: why the method could not run; then there are
    no values. ``ours``: made by this package's own search and allocation, not by a peer's method. ``ledger``: stored bytes by
    part.
    """

    task: Task
    subject: str
    method: str
    ours: bool = False
    budget: Finite | None = None
    budget_unit: str = ""
    values: dict[str, Finite] = Field(default_factory=dict)
    errors: dict[str, Finite] = Field(default_factory=dict)
    seed: int | None = None
    settings: dict[str, JsonValue] = Field(default_factory=dict)
    note: str = ""
    skipped: str | None = None
    layers: tuple[LayerCell, ...] = ()
    ledger: dict[str, int] = Field(default_factory=dict)
    spectra: tuple[Spectrum, ...] = ()
    drawings: tuple[Drawing, ...] = ()
    cache_bits: tuple[BitsOfLayer, ...] = ()

    @property
    def key(self) -> tuple[str, str, str, float | None]:
        """What identifies a row in its result, for resuming and comparing."""
        return (self.task, self.subject, self.method, self.budget)

    @model_validator(mode="after")
    def _values_or_reason(self) -> Self:
        if self.skipped is not None and self.values:
            raise ValueError(f"row {self.key} was skipped ({self.skipped!r}) and still has values")
        if self.skipped is None and not self.values:
            raise ValueError(f"row {self.key} has neither values nor a reason for being skipped")
        if unknown := sorted(set(self.errors) - set(self.values)):
            raise ValueError(f"row {self.key} has errors of {unknown}, which it has no values of")
        return self

    @model_serializer(mode="wrap")
    def _without_no_errors(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        told: dict[str, Any] = serialize(self)
        if not self.errors:
            del told["errors"]
        return told


class Result(Frozen):
    """All rows of one run. ``command`` reproduces it; ``settings`` are those common to the rows; ``complete`` is false while it
    runs; ``checksum`` of the file is empty in memory, and missing in files of older releases."""

    schema_version: Literal[1] = 1
    checksum: str = ""
    name: str
    command: str
    version: str
    made: str
    machine: Machine
    settings: dict[str, JsonValue] = Field(default_factory=dict)
    measures: dict[str, Measure]
    rows: tuple[Row, ...] = ()
    seconds: Finite | None = None
    complete: bool = True

    @field_validator("measures")
    @classmethod
    def _with_roles(cls, measures: dict[str, Measure]) -> dict[str, Measure]:
        return {name: m if m.role else m.model_copy(update={"role": usual_role(name, m)}) for name, m in measures.items()}

    @field_serializer("measures")
    def _without_usual_roles(self, measures: dict[str, Measure]) -> dict[str, dict[str, Any]]:
        usual = {name for name, measure in measures.items() if measure.role in (None, usual_role(name, measure))}
        return {name: m.model_dump(exclude={"role"} if name in usual else None) for name, m in measures.items()}

    @model_validator(mode="after")
    def _rows_fit(self) -> Self:
        seen = set()
        for row in self.rows:
            unknown = sorted(set(row.values) - set(self.measures))
            if unknown:
                raise ValueError(f"row {row.key} has values {unknown} that `measures` does not explain")
            if row.key in seen:
                raise ValueError(f"two rows are {row.key}")
            seen.add(row.key)
        return self

    def with_row(self, row: Row) -> Result:
        """The result with ``row`` added, in the place of a row of the same key if there is one."""
        kept = [other for other in self.rows if other.key != row.key]
        return type(self).model_validate(dict(self) | {"rows": (*kept, row)})


def read_result(path: str | os.PathLike[str]) -> Result:
    """A result file.

    Raises:
        TensorNetError: the file is damaged, not JSON or not of this schema; the message names the field.
    """
    text = read_text(path, LARGEST_JSON)
    try:
        data = parse_json(text, repr(str(path)))
        if isinstance(data, dict) and "checksum" in data:
            check_seal(text, repr(str(path)))
        return Result.from_json(text).model_copy(update={"checksum": ""})
    except CheckpointError:
        raise
    except TensorNetError as error:
        raise TensorNetError(f"{str(path)!r} is {error}") from error


def write_result(result: Result, path: str | os.PathLike[str]) -> Path:
    """Write ``result`` to ``path`` under a temporary name, then rename."""
    with whole_file(path) as file:
        file.write_text(sealed(result.to_json(indent=1) + "\n"), encoding="utf-8")
    return Path(path)

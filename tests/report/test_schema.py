"""Results: round trips, one row a key, hostile files."""

from __future__ import annotations

from pathlib import Path

import pytest

from tensornet_compress.errors import TensorNetError
from tensornet_compress.report import Drawing, Machine, Measure, Result, Row, read_result, write_result
from tensornet_compress.report.schema import usual_role


def result() -> Result:
    machine = Machine(processor="any", cores=2, threads=1, python="3.11")
    measures = {"kl": Measure(title="KL", unit="nats", better="lower"), "seconds": Measure(title="seconds", unit="s")}
    return Result(name="a", command="c", version="0", made="2026-01-01", machine=machine, measures=measures)


def row(method: str = "m", **more: object) -> Row:
    content = {"task": "weights", "subject": "s", "method": method, "budget": 4.0, "values": {"kl": 0.5}} | more
    return Row.model_validate(content)


def test_a_file_gives_the_same_result_back(tmp_path: Path) -> None:
    made = result().with_row(row(drawings=(Drawing(title="d", legs=(("a",), ("b",)), edges=((0, 1, 3),)),)))
    assert read_result(write_result(made, tmp_path / "deep" / "r.json")) == made
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["r.json"]


def test_a_row_measured_again_takes_the_place_of_the_old_one() -> None:
    made = result().with_row(row()).with_row(row("other")).with_row(row(values={"kl": 0.25}))
    assert sorted((r.method, r.values["kl"]) for r in made.rows) == [("m", 0.25), ("other", 0.5)]


def test_a_skipped_row_has_a_reason_and_no_values() -> None:
    assert row(values={}, skipped="not installed").skipped == "not installed"
    with pytest.raises(ValueError, match="neither values nor a reason"):
        row(values={})
    with pytest.raises(ValueError, match="still has values"):
        row(skipped="not installed")


def test_errors_belong_to_values_and_rows_without_them_say_nothing(tmp_path: Path) -> None:
    made = result().with_row(row(errors={"kl": 0.125})).with_row(row("other"))
    path = write_result(made, tmp_path / "r.json")
    assert read_result(path) == made
    assert path.read_text().count('"errors"') == 1
    with pytest.raises(ValueError, match="which it has no values of"):
        row(errors={"seconds": 1.0})


def test_values_must_be_explained() -> None:
    with pytest.raises(ValueError, match="does not explain"):
        result().with_row(row(values={"unheard": 1.0}))


@pytest.mark.parametrize(
    ("name", "unit", "better", "role"),
    [
        ("nbytes", "bytes", "lower", "size"),
        ("bits", "bits", "lower", "size"),
        ("x", "bits per weight", "lower", "size"),
        ("original_nbytes", "bytes", None, "before"),
        ("seconds", "s", "lower", "time"),
        ("decode", "tokens/s", "higher", "time"),
        ("x", "ms per token", "lower", "time"),
        ("encode", "MB/s", "higher", "time"),
        ("decode_speed", "×", "higher", "time"),
        ("kl", "nats per token", "lower", "quality"),
        ("loss", "nats/token", "lower", "quality"),
        ("top1", "", "higher", "quality"),
        ("ratio", "", "lower", "size"),
        ("gain", "", "higher", "other"),
    ],
)
def test_roles_of_measures(name: str, unit: str, better: str | None, role: str) -> None:
    measure = Measure.model_validate({"title": "t", "unit": unit, "better": better})
    assert usual_role(name, measure) == role


def test_roles_are_filled_in_and_written_only_where_they_are_not_the_usual_ones() -> None:
    assert result().measures["kl"].role == "quality"
    assert "role" not in result().to_json()
    measures = {
        "kl": Measure(title="KL", better="lower", role="other"),
        "seconds": Measure(title="seconds", unit="s", role="time"),
    }
    told = result().model_copy(update={"measures": measures})
    assert told.to_json().count('"role"') == 1
    assert Result.from_json(told.to_json()).measures == measures


def test_a_drawing_joins_cores_that_exist() -> None:
    with pytest.raises(ValueError, match="not among the 1 cores"):
        Drawing(title="d", legs=(("a",),), edges=((0, 1, 3),))


@pytest.mark.parametrize("text", ["", "{", "[]", '{"name": 3}', result().to_json()[:-40]])
def test_a_broken_file_is_one_clear_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / "r.json"
    path.write_text(text)
    with pytest.raises(TensorNetError, match=r"not a valid Result|is not JSON"):
        read_result(path)
    with pytest.raises(TensorNetError, match="cannot read"):
        read_result(tmp_path / "missing.json")

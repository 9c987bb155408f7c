"""The ``kv`` command on a tiny saved model: writes a profile, reports, and names bad input in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

import tensornet_compress.cli.kv as command
import tensornet_compress.kv as kv
from tensornet_compress.report import read_result
from tests.kv.tiny_models import VOCABULARY, tiny, tiny_profile


class Words:
    """A tokenizer of numbers: the least that the command needs."""

    eos_token_id = 0

    def __call__(self, text: str, **_: object) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.tensor([[int(word) % VOCABULARY for word in text.split()]])}


@pytest.fixture
def app(monkeypatch: pytest.MonkeyPatch) -> typer.Typer:
    """An app with the command, whose loaders give the tiny model."""
    monkeypatch.setattr(command, "load_any", lambda *_, **__: tiny("llama-gqa"))
    monkeypatch.setattr(command, "load_any_tokenizer", lambda *_, **__: Words())
    made = typer.Typer()
    made.command(name="kv")(command.kv)
    made.command(name="other")(lambda: None)
    return made


def test_profile_is_written_and_reported(app: typer.Typer, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    text = tmp_path / "text"
    text.write_text(" ".join(map(str, torch.randint(1, VOCABULARY, (2600,), generator=generator).tolist())))
    options = [
        "--calibration",
        str(text),
        "--length",
        "256",
        "--samples",
        "8",
        "--bits",
        "6",
        "--json",
        str(tmp_path / "r.json"),
    ]
    done = CliRunner().invoke(app, ["kv", str(tmp_path), *options])
    assert done.exit_code == 0, done.output
    result = json.loads((tmp_path / "r.json").read_text())
    assert kv.Profile.load(tmp_path / "kv_profile").nbytes == result["profile_nbytes"]
    assert result["kl"] < 1e-3
    assert result["payload_bits_per_element"] == pytest.approx(6, rel=0.1)
    made = read_result(tmp_path / "kv_profile" / "report.json")
    measured = next(row for row in made.rows if row.ours)
    assert measured.values["kl"] == result["kl"]
    assert measured.ledger["profile, shared by all caches"] == result["profile_nbytes"]
    assert len(measured.cache_bits) == 3
    assert "Cache bits over the layers" in (tmp_path / "kv_profile" / "report.html").read_text()
    found = command.find_profile(str(tmp_path), None)
    assert found is not None
    assert command.find_profile("somewhere/else", None) is None


def test_a_model_that_is_no_folder_needs_out(app: typer.Typer) -> None:
    done = CliRunner().invoke(app, ["kv", "owner/name"])
    assert done.exit_code == 2
    assert "--out FOLDER" in done.output


@pytest.mark.parametrize(
    ("bits", "mode", "profile", "message"),
    [
        (0.0, "live", None, "0.05 to 8"),
        (99.0, "live", None, "0.05 to 8"),
        (99.0, "storage", None, "0.05 to 12"),
        (2.0, "both", None, "'both'"),
        (None, "live", Path("x"), "needs"),
    ],
)
def test_impossible_options_are_refused_at_once(bits: float | None, mode: str, profile: Path | None, message: str) -> None:
    with pytest.raises(command.TensorNetError, match=message):
        command.check_cache_options(bits, mode, profile)


def test_a_profile_is_not_replaced_unasked(app: typer.Typer, tmp_path: Path) -> None:
    (tmp_path / "kv_profile").mkdir()
    (tmp_path / "kv_profile" / "profile.json").write_text("{}")
    done = CliRunner().invoke(app, ["kv", str(tmp_path)])
    assert done.exit_code == 2
    assert "--overwrite" in done.output
    assert (tmp_path / "kv_profile" / "profile.json").read_text() == "{}"


def test_windows_that_leave_nothing_to_compress_are_refused() -> None:
    ids = torch.randint(1, VOCABULARY, (1, 64), generator=torch.Generator().manual_seed(0))
    with pytest.raises(command.TensorNetError, match="leave nothing to compress"):
        command.evaluate_cache(tiny("llama-gqa"), ids, 2.0, "live", tiny_profile("llama-gqa"))

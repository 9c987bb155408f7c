"""What bad input is told: one line on standard error that quotes what was given and says what to do."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner, Result

from tensornet_compress.bench.harness import describe
from tensornet_compress.cli.common import figure
from tensornet_compress.cli.main import app
from tensornet_compress.report import Row
from tests import models

CASES = {
    "missing option": (["generate", "{model}"], "Missing option '--prompt'; try: "),
    "unknown option": (["eval", "{model}", "--colour", "red"], "No such option: --colour"),
    "out of range": (["kv", "{model}", "--length", "128"], "greater than or equal to 256, was given '128'; try: "),
    "unknown command": (["compress"], "No such command 'compress'"),
    "not a number": (["weights", "{model}", "{tmp}/out", "--ratio", "half"], "'half'"),
    "no budget": (
        ["weights", "{model}", "{tmp}/out"],
        "error: give exactly one of --bits-per-weight, --ratio, --size; was given none",
    ),
    "two budgets": (
        ["weights", "{model}", "{tmp}/out", "--ratio", "0.5", "--size", "1MB"],
        "was given --ratio 0.5 and --size 1MB",
    ),
    "budget of nothing": (
        ["weights", "{model}", "{tmp}/out", "--ratio", "0"],
        "--ratio must be positive and finite, was given 0",
    ),
    "budget beyond all": (["weights", "{model}", "{tmp}/out", "--ratio", "1e308"], "--ratio must be positive and finite"),
    "the root": (["weights", "{model}", "/", "--bits-per-weight", "4", "--overwrite"], "is the root of the file system"),
    "no workers": (["weights", "{model}", "{tmp}/out", "--ratio", "1", "--workers", "0"], "'0'"),
    "an error of nothing": (["search", "{array}", "--max-error", "1e-300"], "max_error must be 0 or from 1e-30 up"),
    "beyond all decibels": (["search", "{array}", "--psnr", "1e6"], "psnr must be within 1000 dB"),
    "a large seed": (
        ["search", "{array}", "--max-error", "0.1", "--seed", "99999999999999999999999"],
        "99999999999999999999999",
    ),
    "an output that is the input": (
        ["search", "{array}", "--max-error", "0.1", "--out", "{array}"],
        "would replace what is read",
    ),
    "JSON that is the input": (["search", "{array}", "--max-error", "0.1", "--json", "{array}"], "would replace what"),
    "JSON in the model": (
        ["weights", "{model}", "{tmp}/out", "--ratio", "1", "--json", "{model}/config.json"],
        "would replace what is read",
    ),
    "a profile in the place of a model": (["kv", "{model}", "--out", "{model}"], "is a model's folder; give a profile one of"),
    "no profile": (
        ["generate", "{model}", "--prompt", "x", "--kv-bits", "3", "--kv-profile", "nope"],
        "no profile at 'nope'; make one with `tensornet-compress kv MODEL --out nope`",
    ),
    "a file as model": (["generate", "{file}", "--prompt", "x"], "x.pt' is a file; give a model's folder"),
    "a folder as tensor": (["search", "{model}", "--max-error", "0.1"], "is a folder; give a file: FILE.npy"),
    "no tokenizer": (["generate", "{bare}", "--prompt", "x"], "bare'; save the model with its tokenizer\n"),
    "other vocabulary": (["eval", "{model}", "--reference", "{bare}"], "has 64 tokens in its vocabulary and"),
}


@pytest.fixture(scope="module")
def places(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model, one of another vocabulary without a tokenizer, and a file."""
    folder = tmp_path_factory.mktemp("messages")
    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    LlamaForCausalLM(LlamaConfig(vocab_size=32, **small)).save_pretrained(folder / "bare")
    (folder / "x.pt").write_bytes(b"")
    np.save(folder / "array.npy", np.eye(8, dtype=np.float32))
    return {"model": llama_folder, "bare": folder / "bare", "file": folder / "x.pt", "array": folder / "array.npy"}


def call(*arguments: str) -> Result:
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, list(arguments))


@pytest.mark.parametrize("case", CASES)
def test_the_line_says_what_was_given_and_what_to_do(case: str, places: dict[str, Path], tmp_path: Path) -> None:
    arguments, message = CASES[case]
    if case == "other vocabulary":
        text = tmp_path / "text.txt"
        text.write_text(models.random_text(100))
        arguments = [*arguments, "--text", str(text), "--length", "16"]
    result = call(*(argument.format(tmp=tmp_path, **places) for argument in arguments))
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_missing_package_is_one_line(places: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    result = call("eval", str(places["model"]))
    assert result.exit_code == 2
    assert result.stderr.strip() == "error: this needs transformers; run: python -m pip install 'tensornet-compress[hf]'"


def test_a_call_without_a_command_still_shows_help() -> None:
    assert "Usage:" in call().output
    assert "Usage:" in call("bench").output


def test_bytes_are_whole_numbers_with_separators() -> None:
    row = Row(task="kv", subject="s", method="m", values={"profile_nbytes": 296200.0, "kl": 0.123456})
    assert figure("nbytes", 221417.6) == "221,418"
    assert figure("profile_nbytes", 296200) == "296,200"
    assert "profile_nbytes 296,200, kl 0.1235" in describe(row)

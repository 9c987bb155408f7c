"""Encoders, and language models that lack weights, are never taken for a whole language model."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

import tensornet_compress as tnc
from tensornet_compress.cli.main import app
from tensornet_compress.errors import TensorNetError
from tensornet_compress.inputs import load_causal_lm, model_kind
from tests import models


def call(*arguments: object) -> Result:
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "bert"
    models.tiny_bert().save_pretrained(folder)
    models.tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("command", [["kv"], ["generate", "--prompt", "the river"], ["eval", "--windows", 1, "--length", 16]])
def test_what_needs_a_language_model_refuses_an_encoder(encoder: Path, command: list[object]) -> None:
    done = call(command[0], encoder, *command[1:])
    assert done.exit_code == 2
    assert done.stderr.startswith(f"error: {str(encoder)!r} is an encoder")
    assert len(done.stderr.strip().splitlines()) == 1


def test_weights_takes_an_encoder_without_being_told(encoder: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(models.random_text(200))
    options = ["--method", "dense", "--calibration", text, "--samples", 2, "--length", 16, "--workers", 1]
    done = call("weights", encoder, tmp_path / "out", "--bits-per-weight", 6, "--targets", "encoder.*", *options)
    assert done.exit_code == 0, done.output
    assert type(tnc.load(tmp_path / "out")).__name__ == "BertModel"
    assert "is an encoder" in call("generate", tmp_path / "out", "--prompt", "the river").stderr


def test_kinds(encoder: Path, llama_folder: Path) -> None:
    assert (model_kind(encoder), model_kind(llama_folder)) == ("encoder", "causal")


def test_missing_weights_are_an_error_and_tied_ones_are_not(llama_folder: Path, tmp_path: Path) -> None:
    assert load_causal_lm(llama_folder).config.tie_word_embeddings
    models.tiny_llama(tied=False).save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    del stored["lm_head.weight"]
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TensorNetError, match=r"has no weights for lm_head\.weight"):
        load_causal_lm(tmp_path)


@pytest.mark.parametrize("family", ["T5", "ViT", "Whisper"])
def test_models_that_text_alone_does_not_calibrate_are_refused_in_one_line(family, tmp_path):
    import transformers

    sizes = {
        "T5": {"vocab_size": 64, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2},
        "ViT": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "image_size": 32},
        "Whisper": {"vocab_size": 64, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
                    "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "pad_token_id": 0},
    }[family]  # fmt: skip
    config = getattr(transformers, f"{family}Config")(**sizes)
    getattr(transformers, f"{family}Model")(config).save_pretrained(tmp_path / "model")
    result = CliRunner().invoke(app, ["weights", str(tmp_path / "model"), str(tmp_path / "out"), "--bits-per-weight", "4"])
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1
    assert "which text alone does not calibrate; compress it in Python" in result.stderr


def test_unexpected_errors_are_one_line_unless_asked_for(monkeypatch, tmp_path):
    def broken(*_):
        raise ZeroDivisionError("a fault\nof ours")

    monkeypatch.setattr("tensornet_compress.inputs.require_text", broken)
    (tmp_path / "model").mkdir()
    arguments = ["weights", str(tmp_path / "model"), str(tmp_path / "out"), "--bits-per-weight", "4"]
    result = CliRunner().invoke(app, arguments)
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    assert "error: unexpected ZeroDivisionError: a fault of ours; see where with `tensornet-compress --debug" in result.stderr
    assert isinstance(CliRunner().invoke(app, ["--debug", *arguments]).exception, ZeroDivisionError)

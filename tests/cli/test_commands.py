import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import tensornet_compress as tnc
from tensornet_compress.cli.main import app
from tensornet_compress.cli.weights import parse_size
from tensornet_compress.errors import TensorNetError
from tensornet_compress.nn import NetworkModule
from tensornet_compress.report import read_result
from tests.models import random_text


def call(*arguments):
    # Tables fold names at the width of the terminal.
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(random_text(600))
    return path


@pytest.fixture(scope="module")
def saved(llama_folder, text, tmp_path_factory):
    """A folder compressed by the command, and its JSON report."""
    folder = tmp_path_factory.mktemp("cli")
    result = call(
        "weights", llama_folder, folder / "out", "--bits-per-weight", 6, "--method", "dense", "--calibration", text,
        "--samples", 4, "--length", 16, "--workers", 1, "--json", folder / "report.json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    return folder / "out", json.loads((folder / "report.json").read_text()), result.output


def test_weights_writes_what_it_reports(saved):
    out, report, output = saved
    on_disk = sum(path.stat().st_size for path in out.iterdir())
    model = sum(path.stat().st_size for path in out.iterdir() if path.stem != "report")
    assert report["summary"]["bits_per_weight"] <= 6
    assert report["folder_nbytes"] == on_disk
    assert report["model_files_nbytes"] == model
    assert f"{on_disk:,} bytes on disk: the model {model:,}, its report {on_disk - model:,}" in output
    assert len(report["layers"]) == 14
    assert report["nbytes"] < report["original_nbytes"]
    assert tnc.load(out).config.vocab_size == 64


def test_what_a_terminal_is_told(llama_folder, text, tmp_path):
    command = [sys.executable, "-m", "tensornet_compress"]
    options = ["--bits-per-weight", "6", "--calibration", str(text), "--samples", "4", "--length", "16", "--workers", "1"]
    told = {}
    for name, more in (("plain", []), ("quiet", ["--quiet"])):
        given = [*command, *more, "weights", str(llama_folder), str(tmp_path / name), *options]
        told[name] = subprocess.run(given, capture_output=True, text=True, check=True)
    # Where nobody looks at it live, a stage is a line; libraries print nothing of their own.
    stages = [line.split()[0] for line in told["plain"].stderr.splitlines()]
    assert stages[:3] == ["calibrate", "survey", "make"]
    assert set(stages) == {"calibrate", "survey", "make"}
    assert "\x1b" not in told["plain"].stderr + told["plain"].stdout
    assert told["quiet"].stderr == ""
    assert told["quiet"].stdout.replace("quiet", "plain").splitlines()[:2] == told["plain"].stdout.splitlines()[:2]


@pytest.mark.parametrize(
    ("options", "layers"),
    [
        (["--ratio", 0.95, "--method", "svd", "--format", "bf16", "--allocator", "uniform", "--targets", "q_proj"], {"q_proj"}),
        (["--size", "100KB", "--method", "dense", "--targets", "embed_tokens", "--ignore", "*_proj"], {"embed_tokens"}),
    ],
)
def test_other_budgets_and_choices(llama_folder, text, tmp_path, options, layers):
    options = [*options, "--calibration", text, "--samples", 2, "--length", 16, "--workers", 1, "--json", tmp_path / "r.json"]
    result = call("weights", llama_folder, tmp_path / "out", *options)
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["nbytes"] <= (0.95 * report["original_nbytes"] if "--ratio" in options else 100_000)
    assert {layer["name"].rsplit(".", 1)[-1] for layer in report["layers"]} == layers


def test_weights_leaves_a_report_of_what_it_did(saved):
    out, report, output = saved
    made = read_result(out / "report.json")
    original, ours = made.rows[:2]
    assert ours.values["nbytes"] == report["nbytes"] == sum(ours.ledger.values())
    assert original.values["nbytes"] == report["original_nbytes"]
    assert len(ours.layers) == 14
    assert {layer.name for layer in ours.layers} == {layer["name"] for layer in report["layers"]}
    assert ours.drawings
    assert f"report: {out / 'report.html'}" in output
    assert "What became of each layer" in (out / "report.html").read_text()


def test_eval_compares_with_the_original(saved, llama_folder, text, tmp_path):
    out, report, _ = saved
    options = ["--text", text, "--windows", 4, "--length", 16, "--json", tmp_path / "eval.json"]
    result = call("eval", out, "--reference", llama_folder, *options)
    assert result.exit_code == 0, result.output
    quality = json.loads((tmp_path / "eval.json").read_text())
    assert quality["tokens"] == 4 * 15
    assert quality["nbytes"] == report["nbytes"]
    assert 0 < quality["kl"] < 1
    assert 0 <= quality["top1"] <= 1
    assert "perplexity" in result.output


def test_eval_asks_a_suite_for_what_a_model_still_knows(saved, llama_folder, text, tmp_path):
    options = ["--text", text, "--windows", 1, "--length", 16, "--suite", "--json", tmp_path / "eval.json"]
    result = call("eval", saved[0], "--reference", llama_folder, *options)
    assert result.exit_code == 0, result.output
    told = json.loads((tmp_path / "eval.json").read_text())
    assert all(told[f"kl_{domain}"] > 0 and told[f"perplexity_{domain}"] > 1 for domain in ("prose", "technical", "python"))
    assert 0 < told["agreement"] < 1
    assert 0 <= told["last_words"] <= 1
    assert told["rare_words"] > 0


def test_generate_prints_the_prompt_and_a_continuation(saved, tmp_path):
    result = call("generate", saved[0], "--prompt", "the river", "--max-new-tokens", 5, "--json", tmp_path / "text.json")
    assert result.exit_code == 0, result.output
    written = json.loads((tmp_path / "text.json").read_text())
    assert written["text"].startswith("the river")
    assert written["text"] in result.output


def test_inspect_adds_up_to_the_folder(saved, tmp_path):
    out, report, _ = saved
    held = {name: m.resident_nbytes for name, m in tnc.load(out).named_modules() if isinstance(m, NetworkModule)}
    for options, rows in (([], 7), (["--all"], 14)):
        result = call("inspect", out, *options, "--json", tmp_path / "ledger.json")
        assert result.exit_code == 0, result.output
        ledger = json.loads((tmp_path / "ledger.json").read_text())
        assert ledger["totals"]["folder"] == sum(path.stat().st_size for path in out.iterdir())
        assert sum(layer["nbytes"] for layer in ledger["layers"]) == report["targeted_nbytes"]
        assert {layer["name"]: layer["resident_nbytes"] for layer in ledger["layers"]} == held
        assert result.output.count("_proj") == rows
        assert result.output.count(" dense") >= rows
        assert all(f"{error:.3g}" in result.output for error in (ledger["layers"][0]["error"],) if "--all" in options)


BAD = {
    "no such model": ["generate", "./nowhere", "--prompt", "x"],
    "no such folder": ["inspect", "nowhere"],
    "no budget": ["weights", "{model}", "{tmp}/out"],
    "two budgets": ["weights", "{model}", "{tmp}/out", "--ratio", "0.5", "--bits-per-weight", "4"],
    "budget of nothing": ["weights", "{model}", "{tmp}/out", "--bits-per-weight", "0"],
    "odd size": ["weights", "{model}", "{tmp}/out", "--size", "9 apples"],
    "existing folder": ["weights", "{model}", "{tmp}", "--bits-per-weight", "4"],
    "unknown method": ["weights", "{model}", "{tmp}/out", "--bits-per-weight", "4", "--method", "cp", "{text}"],
    "unknown format": ["weights", "{model}", "{tmp}/out", "--bits-per-weight", "4", "--format", "int1g64", "{text}"],
    "unknown target": ["weights", "{model}", "{tmp}/out", "--bits-per-weight", "4", "--targets", "q_porj", "{text}"],
    "broken pattern": ["weights", "{model}", "{tmp}/out", "--bits-per-weight", "4", "--targets", "re:(", "{text}"],
    "tiny budget": ["weights", "{model}", "{tmp}/out", "--bits-per-weight", "0.01", "--method", "dense", "{text}"],
    "unknown dtype": ["eval", "{model}", "--dtype", "int7"],
    "no text": ["eval", "{model}", "--text", "nowhere.txt"],
    "text too short": ["eval", "{model}", "--text", "{textfile}", "--length", "5000"],
    "unknown option": ["eval", "{model}", "--colour", "red"],
    "not a number": ["weights", "{model}", "{tmp}/out", "--ratio", "half"],
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_ends_with_code_2_and_one_clear_line(case, llama_folder, text, tmp_path):
    calibration = ["--calibration", str(text), "--samples", "2", "--length", "16", "--workers", "1"]
    arguments = []
    for argument in BAD[case]:
        filled = argument.format(model=llama_folder, tmp=tmp_path, text="", textfile=text)
        arguments += calibration if argument == "{text}" else [filled]
    result = call(*arguments)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    lines = [line for line in result.output.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert len(lines[0]) > len("error: ") + 10
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("1000", 1000), ("90MB", 90_000_000), ("1.5 kib", 1536), ("2GB", 2 * 10**9), ("1MiB", 2**20), ("7B", 7), (None, None)],
)
def test_sizes(text, nbytes):
    assert parse_size(text) == nbytes


@pytest.mark.parametrize("text", ["", "MB", "ten", "1e", "inf", "nanMB"])
def test_odd_sizes_are_quoted(text):
    with pytest.raises(TensorNetError, match="--size"):
        parse_size(text)


@pytest.mark.parametrize("command", ["weights", "eval", "generate", "inspect"])
def test_every_command_has_help(command):
    result = call(command, "--help")
    assert result.exit_code == 0
    assert "--json" in result.output


def test_the_version():
    result = call("--version")
    assert result.output.strip() == tnc.__version__


@pytest.mark.parametrize(
    ("options", "stages"),
    [
        (["--metric", "kronecker", "--refine", "--heal", 2, "--method", "dense"], ["kronecker", "refine", "heal"]),
        (
            ["--metric", "auto", "--method", "svd"],
            ["metric euclidean", "metric row-fisher", "metric input", "metric kronecker", "metric fisher"],
        ),
        (["--isvt", "--metric", "input"], ["isvt, input"]),
    ],
)
def test_stages_are_reported(llama_folder, text, tmp_path, options, stages):
    options = [*options, "--bits-per-weight", 9, "--calibration", text, "--samples", 12, "--length", 16, "--workers", 1]
    result = call("weights", llama_folder, tmp_path / "out", *options, "--json", tmp_path / "r.json")
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "r.json").read_text())
    assert [stage["name"] for stage in report["stages"]] == stages
    assert all(f"{stage}: divergence" in result.output for stage in stages)
    assert report["summary"]["bits_per_weight"] <= 9
    assert tnc.load(tmp_path / "out").config.vocab_size == 64


@pytest.mark.parametrize(
    "options",
    [["--isvt", "--method", "tt"], ["--metric", "hessian"], ["--metric", "elementwise"], ["--isvt", "--refine"]],
)
def test_stages_that_exclude_each_other_are_refused(llama_folder, text, tmp_path, options):
    result = call(
        "weights", llama_folder, tmp_path / "out", *options, "--bits-per-weight", 9, "--calibration", text, "--samples", 8,
        "--length", 16,
    )  # fmt: skip
    assert result.exit_code == 2
    assert len(result.stderr.strip().splitlines()) == 1


def test_generate_is_greedy_whatever_the_model_asks_for(llama_folder, tmp_path):
    plain = call("generate", llama_folder, "--prompt", "the river", "--max-new-tokens", 6)
    shutil.copytree(llama_folder, tmp_path / "model")
    settings = {"num_beams": 4, "max_time": 0.0, "return_dict_in_generate": True, "do_sample": True, "top_k": 3}
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps(settings))
    result = call("generate", tmp_path / "model", "--prompt", "the river", "--max-new-tokens", 6)
    assert result.exit_code == 0, result.output
    assert result.stdout == plain.stdout


def test_names_with_the_marks_of_terminal_styles_are_shown_as_they_are(saved, tmp_path):
    folder = tmp_path / "a[/b][red]"
    shutil.copytree(saved[0], folder)
    result = call("inspect", folder)
    assert result.exit_code == 0, result.output
    assert "a[/b][red]" in result.output


def test_a_closed_standard_output_is_no_error():
    command = f"{shlex.quote(sys.executable)} -m tensornet_compress --version >&-"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr


def test_pickled_objects_are_refused_without_advice_to_run_them(llama_folder, tmp_path):
    shutil.copytree(llama_folder, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Path("x")}, tmp_path / "model" / "pytorch_model.bin")
    result = call("generate", tmp_path / "model", "--prompt", "x")
    assert result.exit_code == 2
    assert "pickled Python objects, which are not read" in result.stderr
    assert "weights_only" not in result.stderr


def test_a_profile_beside_other_weights_is_refused(llama_folder, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(llama_folder, model)
    text = tmp_path / "text.txt"
    text.write_text(random_text(4000))
    calibration = ["--calibration", text, "--length", 256, "--samples", 5, "--sensitivity-windows", 1]
    made = call("kv", model, *calibration)
    assert made.exit_code == 0, made.output
    use = ["generate", model, "--prompt", "the river", "--max-new-tokens", 3, "--kv-bits", 4]
    assert call(*use).exit_code == 0
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * 2
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    refused = call(*use)
    assert refused.exit_code == 2
    assert "was made for other weights" in refused.stderr
    assert call(*use, "--kv-profile", model / "kv_profile").exit_code == 0

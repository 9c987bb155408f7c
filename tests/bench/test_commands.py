"""``tensornet-compress bench`` as users call it, on a tiny model and text."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from tensornet_compress.bench.search_case import SEARCH_METHODS
from tensornet_compress.cli.main import app
from tensornet_compress.report import read_result
from tests import models

runner = CliRunner()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with room for the windows of quick runs."""
    place = tmp_path_factory.mktemp("models") / "llama"
    model = models.tiny_llama(layers=3)
    model.config.max_position_embeddings = 1024
    model.save_pretrained(place)
    models.tiny_tokenizer().save_pretrained(place)
    return place


def bench(*arguments: object) -> str:
    result = runner.invoke(app, ["bench", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_weights_of_ones_own_model_and_text(folder: Path, text_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "r.json"
    common = ["weights", "--quick", "--model", folder, "--text", text_file, "--bits", "6,5", "--json", out, "--no-install"]
    bench(*common, "--methods", "rtn,svd")
    first = read_result(out)
    assert first.complete
    assert [(row.method, row.budget) for row in first.rows] == [
        ("dense", None), ("rtn", 6.0), ("rtn", 5.0), ("svd", 6.0), ("svd", 5.0)
    ]  # fmt: skip
    assert first.settings["weights"]["blocks"] == 1
    assert all(row.seed == 0 and row.layers for row in first.rows[1:])
    for row in first.rows[1:]:
        assert sum(row.ledger.values()) == row.values["nbytes"]
        assert sum(cell.nbytes for cell in row.layers) == row.values["targeted_nbytes"]
    dense, rtn = first.rows[0].values, first.rows[1].values
    assert abs(dense["kl"]) < 1e-5
    assert rtn["kl"] > dense["kl"]
    assert rtn["nbytes"] < dense["nbytes"]
    said = bench(*common, "--methods", "rtn,svd", "--resume", "--compare", out)
    assert "1.000" in said
    assert read_result(out).rows == first.rows


def test_an_encoder_is_judged_by_cosines(tmp_path: Path, text_file: Path) -> None:
    place = tmp_path / "bert"
    models.tiny_bert().save_pretrained(place)
    models.tiny_tokenizer().save_pretrained(place)
    out = tmp_path / "r.json"
    bench("weights", "--quick", "--model", place, "--text", text_file, "--bits", 6, "--methods", "rtn,ours,gptq", "--json", out)
    dense, rtn, ours, gptq = read_result(out).rows
    assert (ours.skipped, gptq.skipped) == (None, None)
    assert ours.values["bits_per_weight"] <= 6
    assert dense.values["mean_cosine"] == pytest.approx(1.0, abs=1e-5)
    assert 0.5 < rtn.values["mean_cosine"] < dense.values["mean_cosine"]


def test_a_cache_of_ones_own_model(folder: Path, text_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "r.json"
    bench("kv", "--quick", "--model", folder, "--text", text_file, "--bits", 4, "--methods", "ours-live,kivi", "--json", out)
    ours, kivi = read_result(out).rows
    assert ours.ours
    assert ours.values["bits_per_element"] <= 4 < kivi.values["bits_per_element"] == 4.5
    assert len(ours.cache_bits) == 3
    assert {"kl_natural", "kl_copy", "dce_natural", "top1_copy", "profile_nbytes"} <= ours.values.keys()


def test_search_of_ones_own_array(tmp_path: Path) -> None:
    file, out = tmp_path / "mine.npy", tmp_path / "r.json"
    np.save(file, torch.eye(16).numpy())
    bench("search", "--tensor", file, "--errors", 0.01, "--methods", "ours,svd", "--budget", 5, "--json", out)
    ours, svd = read_result(out).rows
    assert (ours.subject, ours.budget, svd.ours) == (str(file), 0.01, False)
    assert ours.values["nbytes"] <= svd.values["nbytes"]


def test_rows_of_other_processes_are_those_of_one(tmp_path: Path) -> None:
    file, plugin, out = tmp_path / "mine.npy", tmp_path / "plugin.py", tmp_path / "r.json"
    np.save(file, np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16) ** 2)
    plugin.write_text(
        "from tensornet_compress.bench.registry import Method\n"
        "from tensornet_compress.bench.search_case import SEARCH_METHODS, Stored\n"
        "SEARCH_METHODS.add(Method('mine', lambda case, error: Stored(int(1 / error), None), 'as small as it likes'))\n"
    )
    common = ("search", "--tensor", file, "--errors", "0.1,0.01", "--methods", "svd,mine,dense", "--plugin", plugin)
    made = []
    try:
        for workers in (1, 2):
            bench(*common, "--threads", 1, "--workers", workers, "--json", out, "--overwrite")
            made.append([(row.key, row.skipped, row.values.get("nbytes")) for row in read_result(out).rows])
            SEARCH_METHODS.remove("mine")
    finally:
        if "mine" in SEARCH_METHODS:
            SEARCH_METHODS.remove("mine")
    assert sorted(made[0], key=str) == sorted(made[1], key=str)
    assert [row for row in made[1] if row[0][2] == "mine"] == [
        (("search", str(file), "mine", 0.1), None, 10.0), (("search", str(file), "mine", 0.01), None, 100.0)
    ]  # fmt: skip


def test_bad_input_that_only_workers_see_ends_the_command_too(folder: Path, tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text("too short")
    arguments = ["weights", "--quick", "--model", str(folder), "--text", str(text), "--methods", "rtn", "--workers", "2"]
    result = runner.invoke(app, ["bench", *arguments])
    assert result.exit_code == 2
    assert f"error: text {str(text)!r}, calibration: asked for" in result.stderr.splitlines()[-1]


def test_forward_speed_is_a_ratio_in_one_run(tmp_path: Path) -> None:
    out = tmp_path / "r.json"
    bench("speed", "--quick", "--tracks", "forward", "--only", "batch 1: (ours|dense)$", "--json", out, "--no-install")
    rows = {(row.subject, row.method): row for row in read_result(out).rows}
    ((subject, _), (other, _)) = rows
    assert subject == other
    ours = rows[subject, "ours"].values
    assert ours["ours_over_this"] == 1.0
    dense = rows[subject, "dense"].values
    assert dense["ours_over_this"] == pytest.approx(ours["time"] / dense["time"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["weights", "--methods", "rtn,magic"], "unknown weight method 'magic'; choose from"),
        (["weights", "--bits", "many"], "'many' is not a list of positive numbers"),
        (["weights", "--model", "nowhere/at/all"], "no model folder"),
        (["weights", "--text", "missing.txt"], "no text file at 'missing.txt'; give a file, or one of wikipedia"),
        (["weights", "--resume"], "--resume needs --json"),
        (["kv", "--model", "all-minilm-l6-v2"], "is an encoder and keeps no cache"),
        (["kv", "--methods", "magic"], "unknown cache method 'magic'"),
        (["search", "--tensor", "missing.npy"], "no file at 'missing.npy'"),
        (["search", "--methods", "magic"], "unknown search method 'magic'"),
        (["speed", "--tracks", "magic"], "unknown track 'magic'; choose from"),
        (["speed", "--only", "("], "'(' is no regular expression"),
        (["speed", "--workers", "2"], "measure time, with nothing beside them; leave out --workers"),
        (["search", "--workers", "2", "--threads", "2"], "leave out --threads 2"),
        (["search", "--cluster", "slurm"], "unknown cluster 'slurm'"),
        (["all", "--compare", "missing.json"], "cannot read 'missing.json'"),
        (["weights", "--plugin", "missing.py"], "no plug-in file at 'missing.py'"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_two(arguments: list[str], message: str) -> None:
    result = runner.invoke(app, ["bench", *arguments])
    assert result.exit_code == 2
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_a_file_that_is_there_is_kept(tmp_path: Path) -> None:
    out = tmp_path / "r.json"
    out.write_text(json.dumps({"mine": 1}))
    result = runner.invoke(app, ["bench", "search", "--tensor", "heat", "--json", str(out)])
    assert result.exit_code == 2
    assert "pass --resume to go on with it, --overwrite to replace it" in result.stderr
    assert json.loads(out.read_text()) == {"mine": 1}


def test_a_tensor_that_cannot_be_searched_ends_the_command_before_a_file_is_made(tmp_path: Path) -> None:
    for name, array, message in (("nan", [1.0, float("nan")], "NaN"), ("none", [], "nothing to search")):
        file = tmp_path / f"{name}.npy"
        np.save(file, np.array(array, dtype=np.float32))
        result = runner.invoke(
            app, ["bench", "search", "--tensor", str(file), "--methods", "svd", "--json", str(tmp_path / "j.json")]
        )
        assert result.exit_code == 2
        assert message in result.stderr
        assert len(result.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "j.json").exists()


def test_peers_never_take_more_than_they_may(
    folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tensornet_compress.bench import caches, weights

    monkeypatch.setattr(weights, "SLACK", 0.5)
    monkeypatch.setattr(caches, "STEP", 0.0)
    common = ["--quick", "--model", folder, "--text", text_file, "--bits", 4]
    bench("weights", *common, "--methods", "rtn", "--json", tmp_path / "w.json")
    bench("kv", *common, "--methods", "kivi", "--json", tmp_path / "c.json")
    assert "bits per weight, asked for 4" in str(read_result(tmp_path / "w.json").rows[-1].skipped)
    assert read_result(tmp_path / "c.json").rows[0].skipped == "it takes 4.5 bits per element, asked for 4"

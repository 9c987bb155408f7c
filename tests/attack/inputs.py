"""Bad inputs of all commands: each must end with exit code 2 and one line that begins with ``error:``, and leave nothing."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import tensornet_compress as tnc
from tensornet_compress.cli.main import app
from tensornet_compress.report import write_result
from tests.files.saved import compressed
from tests.kv.tiny_models import tiny_profile
from tests.models import random_text, tiny_llama, tiny_tokenizer
from tests.report.synthetic import everything

FAST = ("--calibration", "{text}", "--length", "16", "--samples", "4", "--workers", "1")


def scene(place: Path) -> dict[str, str]:
    """Good and bad files by name."""
    model = place / "model"
    tiny_llama().save_pretrained(model)
    tiny_tokenizer().save_pretrained(model)
    small = tiny_llama(layers=1)
    compressed(small)
    tnc.save(small, place / "small", tiny_tokenizer())
    tiny_profile("llama-gqa").save(place / "profile")
    (place / "text").write_text(random_text(3000))
    write_result(everything(), place / "result.json")
    torch.save({"a": 1}, place / "pickled.pt")
    np.save(place / "a.npy", np.random.default_rng(0).normal(size=(4, 6)))
    save_file({"a": torch.randn(4, 6), "c": torch.randn(2, 2)}, place / "a.safetensors")
    names = {path.name.split(".")[0] if path.name != "a.safetensors" else "stored": str(path) for path in place.iterdir()}
    os.mkfifo(place / "pipe")
    (place / "empty").mkdir()
    (place / "file").write_text("x")
    return names | {name: str(place / name) for name in ("pipe", "empty", "file", "missing")}


def bad_models(place: Path) -> dict[str, str]:
    """Model folders that are broken in one way each."""
    good, found = place / "model", {}

    def broken(name: str) -> Path:
        folder = place / f"model {name}"
        shutil.copytree(good, folder)
        found[name] = str(folder)
        return folder

    def config(name: str, **changed: Any) -> None:
        path = broken(name) / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changed))

    for name, text in (("truncated", "{"), ("list", "[]"), ("empty", ""), ("binary", "\x00\x01"), ("deep", "[" * 100_000)):
        (broken(f"{name} config") / "config.json").write_text(text)
    config("code of its own", auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}, model_type="evil")
    config("no type", model_type=None)
    config("other type", model_type="nonsense")
    config("words for sizes", hidden_size="many")
    config("negative size", hidden_size=-4)
    config("other vocabulary", vocab_size=7)
    config("other heads", num_attention_heads=3)
    evil = Path(found["code of its own"]) / "evil.py"
    evil.write_text(f"open({str(place / 'ran')!r}, 'w')\n")
    (broken("no config") / "config.json").unlink()
    (broken("no weights") / "model.safetensors").unlink()
    (broken("no tokenizer") / "tokenizer.json").unlink()
    (broken("damaged tokenizer") / "tokenizer.json").write_text('{"model": 3}')
    (broken("binary tokenizer") / "tokenizer.json").write_bytes(bytes(range(256)))
    weights = broken("truncated weights") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    weights = broken("nan") / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, weights, {"format": "pt"})
    weights = broken("infinity") / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.embed_tokens.weight"][0, 0] = float("inf")
    save_file(tensors, weights, {"format": "pt"})
    weights = broken("a tensor less") / "model.safetensors"
    tensors = load_file(weights)
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, weights, {"format": "pt"})
    for name, index in (
        ("index outside", {"weight_map": {"a": "../model/model.safetensors"}}),
        ("absolute index", {"weight_map": {"a": str(good / "model.safetensors")}}),
        ("index of nothing", {"weight_map": {"a": "missing.safetensors"}}),
        ("index without map", {"other": 1}),
        ("index of numbers", {"weight_map": {"a": 3}}),
    ):
        folder = broken(name)
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    folder = broken("pipe for a config")
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    return found | {name: str(place / name) for name in ("missing", "file", "empty", "pipe")} | {"": "", "id": "a/b/c"}


def bad_texts(place: Path) -> dict[str, str]:
    """Files that are no text to calibrate on."""
    kinds = {
        "nothing": b"", "blanks": b" \n " * 50, "binary": bytes(range(256)) * 40, "utf-16": random_text(900).encode("utf-16"),
        "utf-16 without mark": random_text(900).encode("utf-16-le"), "latin": b"caf\xe9 " * 900, "zero": b"a \0 b " * 900,
        "short": b"the tree", "cut": "é".encode()[:1] * 900,
    }  # fmt: skip
    for name, data in kinds.items():
        (place / f"text {name}").write_bytes(data)
    return {name: str(place / f"text {name}") for name in kinds} | {
        name: str(place / name) for name in ("pipe", "empty", "missing")
    }


def bad_tensors(place: Path) -> dict[str, str]:
    """Files that hold no tensor to search."""
    good = (place / "a.npy").read_bytes()
    stored = (place / "a.safetensors").read_bytes()
    kinds = {
        "cut.npy": good[:-20], "head.npy": good[:40], "none.npy": b"", "no.npy": b"\x93NUMPY" + bytes(60),
        "huge.npy": good.replace(b"(4, 6)", b"(4000000000, 6)"), "cut.png": b"\x89PNG\r\n\x1a\n" + bytes(40),
        "cut.safetensors": stored[:-20], "head.safetensors": stored[:30], "none.safetensors": b"",
        "long.safetensors": (1 << 62).to_bytes(8, "little") + stored[8:], "text.csv": b"1,2", "none": b"",
    }  # fmt: skip
    for name, data in kinds.items():
        (place / name).write_bytes(data)
    np.save(place / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    np.save(place / "words.npy", np.array(["a", "b"]))
    np.save(place / "complex.npy", np.ones((2, 2), complex))
    np.save(place / "nan.npy", np.full((4, 4), np.nan))
    np.save(place / "no numbers.npy", np.zeros((0, 4)))
    _bomb(place / "bomb.png")
    names = [
        *kinds,
        "objects.npy",
        "words.npy",
        "complex.npy",
        "nan.npy",
        "no numbers.npy",
        "bomb.png",
        "pickled.pt",
        "pipe",
        "empty",
    ]
    found = {name: str(place / name) for name in names}
    return found | {
        "stored": str(place / "a.safetensors"),
        "other": f"{place / 'a.safetensors'}:b",
        "no": str(place / "gone.npy"),
    }


def _bomb(path: Path) -> None:
    """A picture of 13,000 x 13,000 pixels in few bytes."""
    from PIL import Image

    Image.new("1", (13_000, 13_000)).save(path, optimize=True)


def bad_results(place: Path) -> dict[str, str]:
    """Files that hold no result."""
    good = (place / "result.json").read_text()
    open_text = json.dumps({k: v for k, v in json.loads(good).items() if k != "checksum"})
    kinds = {
        "cut": good[:-40], "flipped": good.replace("Tiny", "Tinz", 1).replace("tiny", "tinz", 1), "none": "", "list": "[]",
        "twice": open_text[:-1] + ', "name": "b"}', "infinite": open_text.replace("1000", "1e999", 1),
        "nan": open_text.replace('"seconds": 3.5', '"seconds": NaN'), "more": open_text[:-1] + ', "more": 1}',
        "binary": "\x00\x01", "null": "null", "deep": "[" * 100_000,
        "version": open_text.replace('_version": 1', '_version": 9'),
    }  # fmt: skip
    for name, text in kinds.items():
        (place / f"result {name}.json").write_text(text)
    return {name: str(place / f"result {name}.json") for name in kinds} | {
        n: str(place / n) for n in ("pipe", "empty", "missing")
    }


def calls(place: Path, of: dict[str, str]) -> Iterator[list[str]]:
    """Command lines, every one of them bad."""
    model, small, out, text = of["model"], of["small"], str(place / "out"), of["text"]
    fast = [argument.format(text=text) for argument in FAST]
    made = ["weights", model, out, "--bits-per-weight", "6", *fast]
    more = {"eval": ["--text", text, "--length", "16"], "generate": ["--prompt", "the tree"], "kv": ["--out", out]}
    for name, bad in bad_models(place).items():
        yield ["weights", bad, out, "--bits-per-weight", "6", *fast]
        if name not in ("no tokenizer", "damaged tokenizer", "binary tokenizer", "id"):
            yield ["inspect", bad]
        yield from ([command, bad, *options] for command, options in more.items())
        yield ["bench", "weights", "--model", bad, "--quick", "--json", str(place / "bench.json"), "--methods", "rtn"]
    for bad in bad_texts(place).values():
        yield ["weights", model, out, "--bits-per-weight", "6", "--calibration", bad, "--length", "16"]
        yield ["eval", model, "--text", bad, "--length", "16"]
        yield ["kv", model, "--calibration", bad, "--out", out, "--length", "256"]
    for bad in bad_tensors(place).values():
        yield ["search", bad, "--max-error", "0.1", "--time-budget", "2"]
    for bad in bad_results(place).values():
        yield ["report", bad]
        yield ["bench", "search", "--quick", "--compare", bad]
    below_a_file, long = f"{of['file']}/x/y", str(place / ("n" * 300))
    for bad in (of["empty"], below_a_file, long, of["pipe"]):
        for command in (
            made, ["eval", model], ["generate", model, "--prompt", "a"], ["inspect", small],
            ["search", of["a"], "--max-error", "1"], ["kv", model, "--out", out], ["bench", "search", "--quick"],
        ):  # fmt: skip
            yield [*command, "--json", bad]
    for bad in (of["file"], below_a_file, long, model, f"{model}/inside", of["empty"] + "/../file"):
        yield ["weights", model, bad, "--bits-per-weight", "6", "--overwrite", *fast]
        if not bad.startswith(model):
            yield ["kv", model, "--out", bad]
    for option, values in {
        "--bits-per-weight": ("0", "-1", "nan", "inf", "x", ""), "--ratio": ("0", "-1", "nan", "x"),
        "--size": ("0", "-1MB", "x", "1XB", "nan", "infMB", ""), "--workers": ("x", "1.5"), "--samples": ("0", "-3", "x"),
        "--length": ("0", "1", "x"), "--dtype": ("int8", ""), "--metric": ("x", ""), "--heal": ("-1", "x"),
        "--method": ("x", ""), "--format": ("int9g3", "x", ""), "--allocator": ("x",), "--targets": ("nothing", "re:["),
        "--ignore": ("nothing",), "--search": ("0", "-1", "nan"), "--nonsense": ("1",),
    }.items():  # fmt: skip
        for value in values:
            budget = [] if option in ("--bits-per-weight", "--ratio", "--size") else ["--bits-per-weight", "6"]
            yield ["weights", model, out, *budget, *fast, option, value]
    for option, values in {
        "--kv-bits": ("0", "-1", "99", "nan", "x"), "--kv-mode": ("x",),
        "--kv-profile": (of["missing"], of["empty"], of["file"]),
        "--dtype": ("int4",), "--max-new-tokens": ("0", "-1", "x"), "--prompt": ("", "  \n "),
    }.items():  # fmt: skip
        for value in values:
            bits = ["--kv-bits", "3"] if option in ("--kv-mode", "--kv-profile") else []
            prompt = [] if option == "--prompt" else ["--prompt", "the tree"]
            yield ["generate", model, *prompt, *bits, option, value]
    for option, values in {
        "--max-error": ("-1", "nan", "x", "0"), "--max-bytes": ("0", "-1", "x"), "--ordering": ("x",), "--topology": ("x",),
        "--format": ("x", "int1g3"), "--time-budget": ("-1", "nan", "x"), "--plot": ("x.doc", of["empty"]),
        "--html": ("x.doc",),
    }.items():  # fmt: skip
        for value in values:
            limit = [] if option.startswith("--max") else ["--max-error", "0.1"]
            yield ["search", of["a"], *limit, option, value]
    for bad in ("--samples", "--length", "--sensitivity-windows", "--bits"):
        for value in ("0", "-1", "x"):
            yield ["kv", model, "--out", out, bad, value]
    yield from (["nonsense"], ["bench", "nonsense"], ["weights"], ["weights", model], ["generate", model], ["report"])


def inputs(place: Path, count: int | None = None, seed: int = 0) -> tuple[Counter[str], list[str]]:
    """Outcomes of bad inputs, all of them or ``count`` drawn ones, and a line for each wrong one."""
    outcomes: Counter[str] = Counter()
    told: list[str] = []
    everyone = list(calls(place, scene(place)))
    chosen = everyone if count is None else Random(seed).sample(everyone, count)
    before = sorted(place.rglob("*"))
    for arguments in chosen:
        outcome = _outcome(arguments)
        left = sorted(set(place.rglob("*")) - set(before))
        if outcome == "one line" and left:
            outcome = f"left behind {[str(path.relative_to(place)) for path in left[:3]]}"
        for path in left:
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
        outcomes[outcome.split(" {")[0].split(" [")[0] if outcome != "one line" else outcome] += 1
        if outcome != "one line":
            told.append(f"{outcome}: {' '.join(arguments)}")
    return outcomes, told


def _outcome(arguments: list[str]) -> str:
    ran = CliRunner(env={"COLUMNS": "200"}).invoke(app, arguments)
    lines = [line for line in ran.stderr.splitlines() if line.startswith(("error:", "Traceback"))]
    if ran.exit_code != 2:
        return f"exit code {ran.exit_code} {{{lines[-1:]}}}"
    if not isinstance(ran.exception, SystemExit) or len(lines) != 1 or not ran.stderr.splitlines()[-1].startswith("error:"):
        return f"not one line {{{ran.stderr[-300:]!r}}}"
    return "one line"


if __name__ == "__main__":
    import sys
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        counted, lines = inputs(Path(folder), int(sys.argv[1]) if len(sys.argv) > 1 else None)
    print(counted, *lines, sep="\n")

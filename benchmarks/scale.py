"""A model in a folder compressed without being loaded: seconds by stage and memory, up to 1.1 thousand million weights.

Models are Llamas with random weights in bfloat16 shards, and SmolLM2-135M. Each run is a process of its own, the larger ones in
a control group whose memory the system limits. ``peak_nbytes``: the most that the process and its workers held together.
``same``: the folder has the bytes of the first run of its model. Runs that are killed get SIGKILL at a moment of the
undisturbed run's time and are started again; ``time`` is that of both together, over the undisturbed one in ``slower``.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from experiments import LANGUAGE, TIME, experiment
from scale_run import BITS, LENGTH, WINDOWS

from tensornet_compress.bench.harness import Job
from tensornet_compress.bench.peer_packages import Unavailable
from tensornet_compress.bench.speed import MEASURES as SPEED
from tensornet_compress.calibrate.fisher_metrics import GROUP as TOGETHER
from tensornet_compress.inputs import resolve_model
from tensornet_compress.inputs.models import cache_folder
from tensornet_compress.report import Measure, Row

MANY, KILLS = 32, 20
GROUP = Path("/sys/fs/cgroup/memory/tensornet-scale")
MODELS: dict[str, dict[str, int]] = {
    # (layers, width, inner width, heads, heads of keys, vocabulary)
    "random Llama, 0.05 B": dict(zip(("layers", "width", "inner", "heads", "keys", "words"), (8, 640, 1728, 10, 2, 12000))),
    "random Llama, 0.10 B": dict(zip(("layers", "width", "inner", "heads", "keys", "words"), (10, 768, 2048, 12, 4, 16000))),
    "random Llama, 0.37 B": dict(zip(("layers", "width", "inner", "heads", "keys", "words"), (20, 1152, 3072, 18, 6, 32000))),
    "random Llama, 1.10 B": dict(zip(("layers", "width", "inner", "heads", "keys", "words"), (22, 2048, 5632, 32, 4, 32000))),
}
MEASURES = {
    "time": TIME,
    "calibrate": Measure(title="calibrate", unit="s", better="lower"),
    "survey": Measure(title="survey", unit="s", better="lower"),
    "make": Measure(title="make", unit="s", better="lower"),
    "model_nbytes": Measure(title="model", unit="bytes", better="lower", role="other"),
    "nbytes": Measure(title="compressed", unit="bytes", better="lower"),
    "peak_nbytes": SPEED["peak_nbytes"],
    "same": Measure(title="same bytes", better="higher"),
    "moved_nbytes": Measure(title="read and written", unit="bytes", better="lower", role="other"),
    "dollars": Measure(title="dollars", better="lower", role="other"),
    "slower": Measure(title="time over the undisturbed run", better="lower"),
}


@cache
def folder(model: str) -> Path:
    """Where a model lies; a random one is made at its first use."""
    if model == LANGUAGE:
        return Path(resolve_model(model))
    from transformers import LlamaConfig, LlamaForCausalLM

    place, sizes = cache_folder() / "scale" / model.replace(" ", "-"), MODELS[model]
    if not (place / "config.json").exists():
        config = LlamaConfig(
            num_hidden_layers=sizes["layers"],
            hidden_size=sizes["width"],
            intermediate_size=sizes["inner"],
            num_attention_heads=sizes["heads"],
            num_key_value_heads=sizes["keys"],
            vocab_size=sizes["words"],
            dtype=torch.bfloat16,
        )
        torch.manual_seed(0)
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(place, max_shard_size="500MB")
    return place


def started(model: str, target: Path, memory: int | None, *how: Any) -> subprocess.Popen[str]:
    given = (str(folder(model)), str(target), memory, *how)
    call = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import scale_run; scale_run.run(*{given!r})"

    def enter() -> None:
        if memory is not None:
            (GROUP / "cgroup.procs").write_text(str(os.getpid()))

    return subprocess.Popen([sys.executable, "-c", call], stdout=subprocess.PIPE, text=True, preexec_fn=enter)


def limited(memory: int | None) -> None:
    """A control group of so much memory, page cache included."""
    if memory is not None:
        try:
            GROUP.mkdir(exist_ok=True)
            (GROUP / "memory.limit_in_bytes").write_text(str(memory))
        except OSError as error:
            raise Unavailable(f"no control group can be made ({error.strerror})") from error


def digest(target: Path) -> str:
    return hashlib.sha256(b"".join(file.read_bytes() for file in sorted(target.iterdir()))).hexdigest()


def cleared() -> Path:
    """Where runs write to, without what earlier ones left."""
    target = cache_folder() / "scale" / "out"
    for found in target.parent.glob("*out*"):
        shutil.rmtree(found, ignore_errors=True)
    return target


first: dict[tuple[Any, ...], str] = {}


def row(model: str, memory: int | None, *how: Any) -> dict[str, Any]:
    limited(memory)
    target = cleared()
    told, _ = (process := started(model, target, memory, *how)).communicate()
    if process.returncode:
        raise RuntimeError(f"the run ended with {process.returncode}")
    found = digest(target)
    values = json.loads(told.splitlines()[-1]) | {
        "model_nbytes": sum(file.stat().st_size for file in folder(model).glob("*.safetensors")),
        "nbytes": sum(file.stat().st_size for file in target.iterdir()),
        "same": float(first.setdefault((model, *how[3:]), found) == found),
    }
    return {"values": values, "settings": {"memory": memory}}


def killed(model: str, number: int) -> dict[str, Any]:
    whole, target = undisturbed(model), cleared()
    process, began = started(model, target, None, 1, None, False), time.perf_counter()
    try:
        process.wait((number + 0.5) / KILLS * whole)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.wait()
    code = process.returncode
    again = started(model, target, None, 1, None, False)
    again.communicate()
    # A run that is killed when its target stands has nothing left to do, and the next one says so.
    ended = again.returncode == 0 or target.exists()
    spent = time.perf_counter() - began
    left = [path.name for path in target.parent.iterdir() if path.name.startswith(f".{target.name}")]
    same = ended and not left and digest(target) == first[model,]
    return {"values": {"time": spent, "slower": spent / whole, "same": float(same)}, "settings": {"code": code}}


@cache
def undisturbed(model: str) -> float:
    began = time.perf_counter()
    row(model, None, 1, None, False)
    return time.perf_counter() - began


def jobs() -> Iterator[Job]:
    def streamed(model: str, memory: int | None, workers: int = 1, where: str | None = None) -> Job:
        how = "one worker" if workers == 1 else f"two workers{f' of {where}' if where else ''}"
        return Job("speed", model, f"streamed, {how}", partial(row, model, memory, workers, where, False), ours=True)

    *smaller, large = MODELS
    yield from (streamed(model, None) for model in smaller)
    for where in (None, "Ray", "Dask"):
        yield streamed(smaller[1], None, 2, where)
    for where in (None, "Ray"):
        how = f"streamed, {MANY} windows, two workers{f' of {where}' if where else ''}"
        yield Job("speed", smaller[1], how, partial(row, smaller[1], None, 2, where, False, MANY), ours=True)
    yield streamed(LANGUAGE, None)
    yield Job("speed", LANGUAGE, "in memory, one worker", partial(row, LANGUAGE, None, 1, None, True), ours=True)
    for number in range(KILLS):
        yield Job("speed", smaller[1], f"killed, moment {number + 1:02d}", partial(killed, smaller[1], number), ours=True)
    yield streamed(large, 3 << 30)
    yield streamed(large, 3 << 30, 2)
    # Workers of Ray bring their own memory, which no promise of ours covers.
    yield streamed(large, None, 2, "Ray")


# What is planned on paper: weights, weights that a token meets, blocks, width.
PLANNED = {"8 B": (8e9, 8e9, 32, 4096), "70 B": (70e9, 70e9, 80, 8192), "1 T, mixture": (1e12, 32e9, 61, 7168)}
PLANNED_WINDOWS = 128
PLANNED_TOKENS = PLANNED_WINDOWS * 2048
# Of a machine: GPUs, cores, dollars an hour. That a GPU does so many products a second is assumed, not measured.
MACHINES = {"one GPU": (1, 16, 3.0), "8 GPUs": (8, 128, 24.0), "64 machines of 2 cores": (0, 128, 64 * 0.10)}
GPU_PRODUCTS = 1e14


def planned(rows: Sequence[Row]) -> Iterator[Row]:
    """Seconds, bytes and dollars for models that were not run, from the rates of the largest that was: sweeps by weights that
    tokens meet, on one GPU or a machine for each group of windows; survey and make by weights, on all cores."""
    name = list(MODELS)[-1]
    known = next((row for row in rows if row.subject == name and row.method.endswith("one worker")), None)
    if known is None or known.skipped:
        return
    weights = known.values["model_nbytes"] / 2
    per_product = known.values["calibrate"] / (weights * WINDOWS * LENGTH)
    per_weight = (known.values["survey"] + known.values["make"]) / weights
    for subject, (number, met, blocks, width) in PLANNED.items():
        # Read by the check of numbers, both sweeps, survey and make; states and gradients are written and read once each.
        moved = 5 * 2 * number + 8 * blocks * width * PLANNED_TOKENS + 2 * number * BITS / 8
        for method, (gpus, cores, price) in MACHINES.items():
            products = met * PLANNED_TOKENS
            # Each machine sweeps over whole groups of windows; several GPUs do not share them.
            sweeping = min(cores // 2, PLANNED_WINDOWS // TOGETHER)
            calibrate = products / GPU_PRODUCTS if gpus else products * per_product / sweeping
            made = number * per_weight / cores
            values = {"calibrate": calibrate, "make": made, "time": calibrate + made, "moved_nbytes": moved}
            values["dollars"] = (calibrate + made) / 3600 * price
            yield Row(task="speed", subject=subject, method=method, ours=True, values=values)


if __name__ == "__main__":
    experiment(jobs(), MEASURES, {"tokens": WINDOWS * LENGTH, "bits_per_weight": BITS}, planned)

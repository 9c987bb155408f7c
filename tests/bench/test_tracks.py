"""Races: every contender of a heat is measured, ratios are those of one run, and caches count what they hold."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tensornet_compress.bench.peer_packages import SIDE, Unavailable
from tensornet_compress.bench.processes import cost_apart
from tensornet_compress.bench.speed import SpeedBench
from tensornet_compress.bench.speed_case import TRACKS, Heat, Raced, SpeedSettings, Track, race
from tensornet_compress.bench.tracks import decoding, kernels, loading
from tests import models

MIB = 1 << 20


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> SpeedSettings:
    place = tmp_path_factory.mktemp("models") / "llama"
    models.tiny_llama().save_pretrained(place)
    models.tiny_tokenizer().save_pretrained(place)
    return SpeedSettings(model=str(place), text=str(text_file), context=128, steps=2, rounds=1, tracks=("decoding", "coding"))


def test_caches_in_use_are_timed_and_peers_that_are_missing_say_so(settings: SpeedSettings) -> None:
    rows, missing = {}, {}
    for job in SpeedBench(settings).jobs():
        try:
            rows[job.subject, job.method] = job.work()["values"]
        except Unavailable as reason:
            missing[job.method] = str(reason)
    assert all("installing was refused" in reason for reason in missing.values())
    subject = "decoding after 128 tokens, batch 1"
    ours, dense = rows[subject, "ours"], rows[subject, "dense"]
    assert ours["ours_over_this"] == 1.0
    assert dense["ours_over_this"] == pytest.approx(ours["time"] / dense["time"])
    assert {"prefill", "sealing", "tokens_per_second"} <= ours.keys()
    assert {method for _, method in rows} >= {"ours-2-bits", "ours-rebuild", "ours-storage", "ours-encode", "ours-decode"}


def test_products_are_raced_beside_those_of_pytorch_and_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SIDE, "install", False)
    raced = kernels._products(SpeedSettings(rounds=1), 64, 128, 2, threads=1)
    assert raced.values.keys() | raced.missing.keys() == set(kernels.PRODUCTS)
    assert raced.missing.keys() <= set(kernels.PACKED)
    assert all(name.startswith("torch-") or "install" in reason for name, reason in raced.missing.items())
    exact = torch.randn(96, 64, generator=torch.Generator().manual_seed(0))
    for bits, most in ((8, 0.01), (4, 0.2)):
        found = kernels._codes(exact, bits)
        assert float((found.dense(torch.float32) - exact).norm() / exact.norm()) < most
        assert found.excess is not None
        assert (len(found.excess) > 0) == (bits == 4)


def test_a_coded_model_generates_beside_the_dense_one(settings: SpeedSettings) -> None:
    raced = kernels._generate(settings, 32, threads=1)
    assert raced.values.keys() == set(kernels.MODELS)
    assert raced.values["ours"]["held_nbytes"] < raced.values["dense"]["held_nbytes"]
    coded = kernels.coded_model(models.tiny_llama(tied=True))
    assert not any(isinstance(module, torch.nn.Linear | torch.nn.Embedding) for module in coded.modules())


@pytest.mark.parametrize("how", loading.FORMATS)
def test_saved_models_are_opened_with_and_without_checks(how: str) -> None:
    raced = loading._load(SpeedSettings(rounds=1), (32, 2), how, threads=1)
    assert raced.values.keys() == set(loading.NAMES)
    assert 0 < raced.settings["file_nbytes"] < 1 << 20


def test_memory_counts_what_a_cache_holds(settings: SpeedSettings, tmp_path: Path) -> None:
    decoding.Caches(settings, settings.context).profile.save(tmp_path)
    exact, live = (decoding._grown(settings, str(tmp_path), name)[0] for name in ("dense", "ours"))
    config = models.tiny_llama().config
    elements = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    assert exact == 4 * elements * (settings.context + 2)
    assert live < exact


def work_of(nbytes: int) -> Callable[[], int]:
    def work() -> int:
        held = torch.ones(nbytes, dtype=torch.uint8)
        return int(held[-1])

    return work


def test_the_cost_of_work_in_a_process_of_its_own() -> None:
    made, cost = cost_apart(work_of, 64 * MIB)
    assert made == 1
    assert 60 * MIB < cost.peak_nbytes < 96 * MIB
    assert cost.seconds > 0


def test_a_failed_contender_is_a_skipped_row_of_its_own() -> None:
    def run() -> Raced:
        return Raced({"ours": {"time": 1.0}}, {"theirs": "no such package"})

    track = TRACKS.add(Track("tried here", lambda settings: iter([Heat("subject", ("ours", "theirs"), run)])))
    try:
        ours, theirs = SpeedBench(SpeedSettings(tracks=(track.name,))).jobs()
    finally:
        TRACKS.remove(track.name)
    assert (ours.ours, theirs.ours) == (True, False)
    assert ours.work()["values"] == {"time": 1.0, "ours_over_this": 1.0}
    with pytest.raises(Unavailable, match="no such package"):
        theirs.work()


def test_a_race_calls_everybody() -> None:
    calls: list[str] = []
    times = race({name: lambda name=name: calls.append(name) for name in "ab"}, rounds=2, least=1e-6)
    assert set(times) == {"a", "b"}
    assert calls.count("a") > 2
    assert min(times.values()) > 0

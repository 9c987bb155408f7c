"""What is attacked: one of each thing that the package writes, how it is read, and what the reading comes to."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import tensornet_compress as tnc
import tensornet_compress.kv as kv
from tensornet_compress.cli.common import load_any_tokenizer
from tensornet_compress.errors import CheckpointError
from tensornet_compress.evaluate.ledger import folder_ledger
from tensornet_compress.report import read_result, render, write_result
from tensornet_compress.train.state import IsvtState, content_hash
from tests.kv.tiny_models import tiny, tiny_profile
from tests.models import batches, tiny_convnet, tiny_llama, tiny_tokenizer
from tests.report.synthetic import everything
from tests.test_file_format import several_networks


@dataclass(frozen=True)
class Victim:
    """``write(place, seed)`` makes a file or folder, another for each seed; ``read(place)`` gives a hash of all that it holds,
    which it uses once."""

    name: str
    write: Callable[[Path, int], object]
    read: Callable[[Path], str]
    folder: bool = False


VICTIMS: dict[str, Victim] = {}


def victim(name: str, folder: bool = False) -> Callable[[type[Any]], type[Any]]:
    def register(kind: type[Any]) -> type[Any]:
        VICTIMS[name] = Victim(name, kind.write, kind.read, folder)
        return kind

    return register


def hashed(*parts: Any) -> str:
    return hashlib.sha256("".join(content_hash(part) for part in parts).encode()).hexdigest()


@cache
def compressed_llama(seed: int, method: str) -> tuple[Any, Any]:
    model = tiny_llama(layers=1, seed=seed)
    report = tnc.compress(model, tnc.Budget(bits_per_weight=6.0), batches(2), method=method, workers=1)
    return model, report


def read_folder(place: Path, model: Any = None) -> str:
    loaded = tnc.load(place, model)
    answer = loaded(batches(1)[0]).logits if model is None else loaded(torch.ones(1, 3, 12, 12))
    settings = "" if model is not None else loaded.config.to_json_string()
    ledger = folder_ledger(place)
    words = "" if model is not None else load_any_tokenizer(str(place))("the old tree runs")["input_ids"]
    layers = ledger.model_dump()["layers"]
    return hashed(loaded.state_dict(), answer.detach(), settings, layers, words)


@victim("folder", folder=True)
class Folder:
    @staticmethod
    def write(place: Path, seed: int) -> object:
        model, report = compressed_llama(seed, "dense")
        return tnc.save(model, place, tiny_tokenizer(), report, overwrite=True)

    read = staticmethod(read_folder)


@victim("coded folder", folder=True)
class CodedFolder:
    @staticmethod
    def write(place: Path, seed: int) -> object:
        model, report = compressed_llama(seed, "coded")
        return tnc.save(model, place, tiny_tokenizer(), report, overwrite=True)

    read = staticmethod(read_folder)


@cache
def compressed_convnet(seed: int) -> Any:
    model = tiny_convnet(seed)
    options: dict[str, Any] = {"method": "svd", "formats": ["bf16p"], "allocator": "uniform"}
    tnc.compress(model, tnc.Budget(bits_per_weight=14.0), workers=1, **options)
    return model


@victim("convolutions", folder=True)
class Convolutions:
    @staticmethod
    def write(place: Path, seed: int) -> object:
        return tnc.save(compressed_convnet(seed), place, overwrite=True)

    @staticmethod
    def read(place: Path) -> str:
        return read_folder(place, tiny_convnet(7))


@cache
def specs() -> dict[str, tnc.NetworkSpec]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return several_networks()


def network_victim(name: str) -> None:
    class Network:
        @staticmethod
        def write(place: Path, seed: int) -> object:
            tensor = torch.randn(12, 20, generator=torch.Generator().manual_seed(seed))
            return tnc.save_network(tnc.realise(tensor, specs()[name]), place)

        @staticmethod
        def read(place: Path) -> str:
            network = tnc.load_network(place)
            return hashed(network.stored, network.to_dense(), network.spec.to_json())

    victim(f"network {name}")(Network)


for _name in ("tree", "padded", "pivots", "sum"):
    network_victim(_name)


@cache
def profile(seed: int) -> kv.Profile:
    if not seed:
        return tiny_profile("llama-gqa")
    made = tiny_profile("llama-gqa")
    ids = [torch.randint(1, 97, (2, 128), generator=torch.Generator().manual_seed(seed + n)) for n in range(5)]
    return kv.calibrate(tiny("llama-gqa"), ids, group_size=2, joined=8, metric="euclidean") if seed else made


@victim("profile", folder=True)
class ProfileFolder:
    @staticmethod
    def write(place: Path, seed: int) -> object:
        profile(seed).save(place)
        return place

    @staticmethod
    def read(place: Path) -> str:
        found = kv.Profile.load(place)
        states = found.trees["key"].synthesise(torch.ones(2, found.trees["key"].components))
        codes = found.live_codes(2.0)
        return hashed(found.tensors(), found.spec.to_json(), states, found.step(2.0), [code.bits for code, _ in codes])


@cache
def filled_cache(mode: str, calibrated: bool, seed: int) -> kv.CompressedCache:
    cache = kv.CompressedCache(tiny("llama-gqa"), bits=3.0, profile=profile(0) if calibrated else None, mode=mode, block=64)
    ids = torch.randint(1, 97, (2, 180), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        tiny("llama-gqa")(ids, past_key_values=cache)
    return cache


def cache_victim(mode: str, calibrated: bool) -> None:
    class Cache:
        @staticmethod
        def write(place: Path, seed: int) -> object:
            return filled_cache(mode, calibrated, seed).save(place)

        @staticmethod
        def read(place: Path) -> str:
            model = tiny("llama-gqa")
            cache = kv.CompressedCache.load(place, model, profile(0) if calibrated else None)
            with torch.no_grad():
                answer: Tensor = model(torch.ones(cache.batch, 3, dtype=torch.int64), past_key_values=cache).logits
            return hashed(answer, cache.get_seq_length())

    victim(f"{mode} cache, {'profile' if calibrated else 'own bases'}")(Cache)


for _mode in ("live", "storage"):
    for _calibrated in (True, False):
        cache_victim(_mode, _calibrated)


@victim("result")
class ResultFile:
    @staticmethod
    def write(place: Path, seed: int) -> object:
        return write_result(everything().model_copy(update={"seconds": float(seed)}), place)

    @staticmethod
    def read(place: Path) -> str:
        found = read_result(place)
        render(found)
        return hashed(found.to_json())


@victim("state")
class State:
    weights = ("a", "b")

    @staticmethod
    def write(place: Path, seed: int) -> object:
        state = IsvtState({name: torch.full((4, 6), float(seed + 1)) for name in State.weights})
        state.best_step, state.best, state.best_ranks = 0, 0.5, {"a": 1, "b": None}
        return state.save(place, {"fits": 1})

    @staticmethod
    def read(place: Path) -> str:
        if not place.exists():
            raise CheckpointError("a state that is not there is a fresh start")
        dense = {name: torch.zeros(4, 6) for name in State.weights}
        state = IsvtState.load(place, {"fits": 1}, dense)
        return hashed(state.weights, state.best, state.best_ranks, state.size, state.settled)

"""Speed of live and storage caches against ``DynamicCache`` and the stock quantised caches.

Prefill is one forward pass of T tokens; decode is single-token steps from a filled cache. Every cache is filled with the same
keys and values of a real text. Encode is the time spent in sealing per sealed token.

    python benchmarks/kv_speed.py [--profile FOLDER] [--lengths 1024 4096] [--threads 2]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import kv_common as common
import torch
from torch import Tensor
from transformers import DynamicCache, QuantizedCache

import tensornet_compress.kv as kv
from tensornet_compress.kv.live.layer import LiveLayer
from tensornet_compress.kv.storage.codec import JointCodec

Make = Callable[[], Any]


def fill(cache: Any, keys: list[Tensor], values: list[Tensor]) -> Any:
    """Hand a cache the states of a prompt, as a forward pass would."""
    recorder = getattr(cache, "recorder", None)
    if recorder is not None:
        recorder.seen["positions"] = torch.arange(keys[0].shape[2])[None]
    for index, (k, v) in enumerate(zip(keys, values)):
        cache.update(k, v, index)
    return cache


@torch.no_grad()
def steps(model: Any, cache: Any, tokens: Tensor) -> list[float]:
    """Seconds of each single-token step: of the clock, or of the processor where one thread runs (other work on the machine
    then does not count)."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    seconds = []
    for token in tokens:
        began = clock()
        model(token.view(1, 1), past_key_values=cache, logits_to_keep=1)
        seconds.append(clock() - began)
    return seconds


def contenders(model: Any, profile: kv.Profile, stock: bool) -> dict[str, tuple[Make, bool]]:
    """Name -> (maker, whether attention contracts)."""
    found: dict[str, tuple[Make, bool]] = {
        "DynamicCache": (lambda: DynamicCache(config=model.config), False),
        "live 3 b, contracted": (lambda: kv.CompressedCache(model, 3.0, profile), True),
        "live 2 b, contracted": (lambda: kv.CompressedCache(model, 2.0, profile), True),
        "live 3 b, rebuilt": (lambda: kv.CompressedCache(model, 3.0, profile, attention="rebuild"), False),
        "storage 2 b, thawed": (lambda: kv.CompressedCache(model, 2.0, profile, mode="storage"), False),
    }
    if stock:
        found["QuantizedCache quanto int4"] = (lambda: QuantizedCache("quanto", model.config, nbits=4), False)
        found["QuantizedCache hqq int4"] = (
            lambda: QuantizedCache("hqq", model.config, nbits=4, axis_key=1, axis_value=1),
            False,
        )
    return found


@torch.no_grad()
def sealing_seconds(model: Any, profile: kv.Profile, keys: list[Tensor], values: list[Tensor]) -> float:
    """Processor seconds of sealing per token on top of a filled live cache, one thread: the median of eight units of tokens."""
    spent, plain = [0.0], LiveLayer._seal_ready
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def timed(layer: LiveLayer) -> None:
        began = time.process_time()
        plain(layer)
        spent[0] += time.process_time() - began

    cache = fill(kv.CompressedCache(model, 3.0, profile), keys, values)
    LiveLayer._seal_ready = timed  # type: ignore[method-assign]
    try:
        units = []
        for _ in range(8):
            spent[0] = 0.0
            fill(cache, [k[:, :, :64] for k in keys], [v[:, :, :64] for v in values])
            units.append(spent[0] / 64)
    finally:
        LiveLayer._seal_ready = plain  # type: ignore[method-assign]
        torch.set_num_threads(threads)
    return statistics.median(units)


def storage_speed(profile: kv.Profile, keys: list[Tensor], values: list[Tensor]) -> list[dict[str, float]]:
    """Encode and decode of 1024 tokens, in MB of bf16 keys and values per second of processor time."""
    rows = []
    states = [k[0, :, :1024] for k in keys], [v[0, :, :1024] for v in values]
    megabytes = sum(t.numel() for part in states for t in part) * 2 / 1e6
    for bits in (4.0, 2.0, 1.0):
        codec = JointCodec(profile, bits)
        began = time.process_time()
        payload = codec.encode(*states)
        middle = time.process_time()
        codec.decode(payload)
        end = time.process_time()
        rows.append({"bits": bits, "encode_MB_s": megabytes / (middle - began), "decode_MB_s": megabytes / (end - middle)})
    return rows


def main() -> None:
    """Measure and write ``results/kv_speed.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", default=common.PROFILE, help="folder of a profile; made there when missing")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="+", help="names of caches to time (DynamicCache always takes part)")
    parser.add_argument("--no-prefill", action="store_true", help="time decode only")
    parser.add_argument("--no-stock", action="store_true", help="leave out quanto and hqq, which are extra packages")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model, tokenizer = common.model_and_tokenizer()
    profile = common.profile(model, tokenizer, options.profile)
    text = common.heldout_ids(tokenizer, 1024, 8).flatten()
    rows: list[dict[str, Any]] = []
    sealing: list[dict[str, float]] = []
    storage: list[dict[str, float]] = []
    makers = contenders(model, profile, not options.no_stock)
    if options.only:
        makers = {name: pair for name, pair in makers.items() if name == "DynamicCache" or name in options.only}
    for length in options.lengths:
        ids = text[None, :length]
        with torch.no_grad():
            source = DynamicCache(config=model.config)
            model(ids, past_key_values=source, logits_to_keep=1)
        keys, values = [layer.keys for layer in source.layers], [layer.values for layer in source.layers]
        if not storage:
            storage = storage_speed(profile, keys, values)
        sealing.append({"tokens": length, "seconds_per_token": sealing_seconds(model, profile, keys, values)})
        if length == options.lengths[-1]:
            double = [torch.cat([k, k], 2) for k in keys], [torch.cat([v, v], 2) for v in values]
            sealing.append({"tokens": 2 * length, "seconds_per_token": sealing_seconds(model, profile, *double)})
        decode: dict[str, list[float]] = {name: [] for name in makers}
        prefill: dict[str, float] = {}
        held: dict[str, int] = {}
        for round_number in range(options.rounds):
            for name, (make, _) in makers.items():
                if round_number == 0 and not options.no_prefill:
                    began = time.perf_counter()
                    with torch.no_grad():
                        cache = make()
                        model(ids, past_key_values=cache, logits_to_keep=1)
                    prefill[name] = time.perf_counter() - began
                cache = fill(make(), keys, values)
                decode[name] += steps(model, cache, text[length : length + options.steps])[2:]
                held[name] = getattr(cache, "nbytes", 0)
        base = statistics.median(decode["DynamicCache"])
        for name, seconds in decode.items():
            middle = statistics.median(seconds)
            row = {
                "tokens": length,
                "cache": name,
                "clock": "processor" if torch.get_num_threads() == 1 else "wall",
                "prefill_s": prefill.get(name),
                "decode_ms": 1000 * middle,
                "decode_tokens_s": 1 / middle,
                "decode_speed_to_dynamic": base / middle,
                "nbytes": held[name],
            }
            rows.append(row)
            first = f"{prefill[name]:.2f} s" if name in prefill else "not timed"
            print(f"{length:6d} {name:28s} prefill {first}  decode {1000 * middle:8.1f} ms  {base / middle:.2f}x", flush=True)
        common.write("kv_speed", {"rows": rows, "sealing": sealing, "storage": storage})
    print(sealing, storage)


if __name__ == "__main__":
    main()

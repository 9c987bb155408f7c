"""Where the time of one live decode step goes, beside ``DynamicCache`` and the stock quantised caches; and what a hot set buys.

Every part is timed by itself (exclusive of the parts inside it): the linear layers, the cache's update (for quantised caches:
their dequantisation), attention without both, unpacking of codes and their contraction, and all the rest of the model. A
bounded hot set of decoded tokens is the exact window made longer: it is timed here at several lengths, with its bytes.

    python benchmarks/kv_profile.py [--profile FOLDER] [--tokens 4096] [--threads 2]
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import kv_common as common
import torch
from kv_speed import contenders, fill
from transformers import DynamicCache

import tensornet_compress.kv as kv
from tensornet_compress.coding.planes import PlaneLayout
from tensornet_compress.kv.live import attention

HOT = (64, 512, 1024, 2048)


def now() -> float:
    """Seconds: of the processor where one thread runs (other work on the machine then does not count), else of the clock."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


class Clock:
    """Exclusive seconds by part: a part that begins inside another stops the other's clock."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._stack: list[str] = []
        self._since = now()

    def begin(self, part: str) -> None:
        self._charge()
        self._stack.append(part)

    def end(self) -> None:
        self._charge()
        self._stack.pop()

    def _charge(self) -> None:
        moment = now()
        if self._stack:
            self.seconds[self._stack[-1]] += moment - self._since
        self._since = moment

    def wrapped(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            self.begin(part)
            try:
                return function(*args, **kwargs)
            finally:
                self.end()

        return timed


@contextlib.contextmanager
def instrumented(model: Any, clock: Clock) -> Iterator[None]:
    """Linear layers, attention modules, unpacking and contraction report to ``clock``."""
    saved = [(attention, name, getattr(attention, name)) for name in ("_sealed_scores", "_sealed_values")]
    saved.append((PlaneLayout, "unpack", PlaneLayout.unpack))
    hooks = []
    for name, module in model.named_modules():
        part = "linear layers" if isinstance(module, torch.nn.Linear) else "attention" if name.endswith("self_attn") else None
        if part is not None:
            hooks.append(module.register_forward_pre_hook(lambda *_, part=part: clock.begin(part)))
            hooks.append(module.register_forward_hook(lambda *_: clock.end()))
    try:
        for owner, name, function in saved:
            setattr(owner, name, clock.wrapped("unpacking" if name == "unpack" else "contraction", function))
        yield
    finally:
        for owner, name, function in saved:
            setattr(owner, name, function)
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def profile_steps(model: Any, cache: Any, tokens: torch.Tensor) -> list[dict[str, float]]:
    """Milliseconds by part of every single-token step after the first two."""
    clock = Clock()
    cache.update = clock.wrapped("cache update", cache.update)
    rows = []
    with instrumented(model, clock):
        for number, token in enumerate(tokens):
            clock.seconds.clear()
            clock.begin("rest of the model")
            model(token.view(1, 1), past_key_values=cache, logits_to_keep=1)
            clock.end()
            if number >= 2:
                rows.append({part: 1000 * seconds for part, seconds in clock.seconds.items()})
    return rows


@torch.no_grad()
def decode_ms(model: Any, cache: Any, tokens: torch.Tensor) -> list[float]:
    """Milliseconds of every single-token step after the first two, nothing instrumented."""
    found = []
    for token in tokens:
        began = now()
        model(token.view(1, 1), past_key_values=cache, logits_to_keep=1)
        found.append(1000 * (now() - began))
    return found[2:]


def main() -> None:
    """Measure and write ``results/kv_profile.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", default=common.PROFILE, help="folder of a profile; made there when missing")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-stock", action="store_true", help="leave out quanto and hqq, which are extra packages")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model, tokenizer = common.model_and_tokenizer()
    profile = common.profile(model, tokenizer, options.profile)
    text = common.heldout_ids(tokenizer, 1024, 8).flatten()
    with torch.no_grad():
        source = DynamicCache(config=model.config)
        model(text[None, : options.tokens], past_key_values=source, logits_to_keep=1)
    keys, values = [layer.keys for layer in source.layers], [layer.values for layer in source.layers]
    following = text[options.tokens : options.tokens + options.steps]
    makers = {name: pair for name, pair in contenders(model, profile, not options.no_stock).items() if "storage" not in name}
    parts: dict[str, list[dict[str, float]]] = {name: [] for name in makers}
    hot: dict[int, list[float]] = {window: [] for window in HOT}
    nbytes: dict[int, int] = {}
    exact: list[float] = []
    for _ in range(options.rounds):
        for name, (make, _) in makers.items():
            parts[name] += profile_steps(model, fill(make(), keys, values), following)
        exact += decode_ms(model, fill(DynamicCache(config=model.config), keys, values), following)
        for window in HOT:
            cache = fill(kv.CompressedCache(model, 3.0, profile, window=window), keys, values)
            hot[window] += decode_ms(model, cache, following)
            nbytes[window] = cache.nbytes
    rows = []
    for name, found in parts.items():
        names = sorted({part for row in found for part in row})
        row = {part: statistics.median(item.get(part, 0.0) for item in found) for part in names}
        rows.append({"cache": name, "tokens": options.tokens, "total_ms": sum(row.values()), "parts_ms": row})
        print(f"{name:28s} {sum(row.values()):7.1f} ms  " + ", ".join(f"{p} {v:.1f}" for p, v in row.items()), flush=True)
    base = statistics.median(exact)
    plain = sum(k.nbytes + v.nbytes for k, v in zip(keys, values))
    hot_rows = [
        {
            "window": window,
            "decode_speed_to_dynamic": base / statistics.median(seconds),
            "bytes_to_dynamic": nbytes[window] / plain,
        }
        for window, seconds in hot.items()
    ]
    print(hot_rows)
    linear = next(row for row in rows if row["cache"] == "DynamicCache")
    bound = linear["total_ms"] / (linear["total_ms"] - linear["parts_ms"]["attention"] - linear["parts_ms"]["cache update"])
    print(f"with attention and cache free of cost decoding would run at {bound:.2f}x DynamicCache")
    common.write("kv_profile", {"threads": options.threads, "rows": rows, "hot": hot_rows, "bound_with_free_attention": bound})


if __name__ == "__main__":
    main()

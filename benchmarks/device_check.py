"""``make device-check``: what this package does on an accelerator, in five minutes; writes benchmarks/results/device.json.

    python benchmarks/device_check.py [--device cuda] [--model smollm2-135m] [--contexts 1024,4096,16384,32768]

Rows: answers of compressed weights and of a live cache on the device beside those of the processor in fp32, in three dtypes;
calibration on the device beside that on the processor; tokens per second after so many, exact and compressed. Ends with an
error where an answer is not the processor's.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from experiments import RESULTS
from torch import Tensor

import tensornet_compress as tnc
from tensornet_compress.bench.harness import Harness, Job, start
from tensornet_compress.calibrate import kl_divergence
from tensornet_compress.calibrate.lending import usable_device
from tensornet_compress.inputs import calibration_windows, heldout_windows, load_causal_lm, load_tokenizer
from tensornet_compress.report import Measure

BITS, CACHE_BITS, PROMPT, NEW_TOKENS, FEW = 3.5, 3.0, 512, 16, 8
# What rounding to a dtype may move the answers by, in nats a token.
MOST = {"float32": 1e-5, "bfloat16": 0.05, "float16": 0.01}
MEASURES = {
    "kl": Measure(title="KL to the processor in fp32", unit="nats/token", better="lower"),
    "time": Measure(title="time", unit="s", better="lower"),
    "over_processor": Measure(title="time over the processor's", better="lower", role="time"),
    "tokens_per_second": Measure(title="tokens per second", unit="tokens/s", better="higher"),
    "peak_nbytes": Measure(title="peak memory of the device", unit="bytes", better="lower", role="other"),
}


@dataclass
class Check:
    """A model on the processor, and the device that is checked."""

    name: str
    device: torch.device

    @cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(self.name)

    @cached_property
    def original(self) -> Any:
        return load_causal_lm(self.name)

    @cached_property
    def windows(self) -> list[Tensor]:
        """For calibration."""
        return list(calibration_windows(self.tokenizer, 256, 8).split(1))

    @cached_property
    def ids(self) -> Tensor:
        """Held-out text."""
        return heldout_windows(self.tokenizer, PROMPT, 1)

    def compressed(self, device: torch.device | None) -> tuple[Any, float]:
        """The model compressed with calibration on a device, and the seconds of that."""
        model = copy.deepcopy(self.original)
        report = tnc.compress(model, tnc.Budget(bits_per_weight=BITS), self.windows, effort="fast", device=device)
        return model, report.seconds["calibrate"]

    @cached_property
    def reference(self) -> tuple[Any, float]:
        return self.compressed(None)

    @torch.no_grad()
    def answers(self, model: Any, cached: bool = False) -> Tensor:
        """Log probabilities of the held-out text's second half, on the processor in fp32; ``cached``: through a live cache."""
        ids, half = self.ids.to(next(model.parameters()).device), PROMPT // 2
        cache = tnc.kv.CompressedCache(model, bits=CACHE_BITS, mode="live") if cached else None
        if cache is None:
            logits = model(ids).logits[:, half:]
        else:
            model(ids[:, :half], past_key_values=cache, use_cache=True)
            # Few at a time, so that attention contracts with codes.
            parts = [model(part, past_key_values=cache, use_cache=True).logits for part in ids[:, half:].split(FEW, 1)]
            logits = torch.cat(parts, 1)
        return logits[0].float().log_softmax(-1).cpu()

    def same(self, dtype: str, cached: bool) -> dict[str, Any]:
        model = self.reference[0]
        moved = copy.deepcopy(model).to(self.device, getattr(torch, dtype))
        kl = float(kl_divergence(self.answers(model, cached), self.answers(moved, cached)).mean())
        if not abs(kl) <= MOST[dtype]:
            raise RuntimeError(
                f"the answers in {dtype} are {kl:.3g} nats a token from the processor's, at most {MOST[dtype]:g}"
            )
        return {"values": {"kl": kl}}

    def calibration(self) -> dict[str, Any]:
        model, seconds = self.compressed(self.device)
        reference, known = self.reference
        kl = float(kl_divergence(self.answers(reference), self.answers(model)).mean())
        return {"values": {"kl": kl, "time": seconds, "over_processor": seconds / known}}

    @torch.no_grad()
    def decoding(self, context: int, weights: bool, cached: bool) -> dict[str, Any]:
        model = copy.deepcopy(self.reference[0] if weights else self.original).to(self.device, torch.bfloat16)
        ids = torch.randint(model.config.vocab_size, (1, context), generator=torch.Generator().manual_seed(0)).to(self.device)
        cache: Any = tnc.kv.CompressedCache(model, bits=CACHE_BITS, mode="live") if cached else None
        for part in ids.split(1024, 1):
            cache = model(part, past_key_values=cache, use_cache=True, logits_to_keep=1).past_key_values
        step = ids[:, :1]
        for count in (2, NEW_TOKENS):
            self.wait()
            began = perf_counter()
            for _ in range(count):
                step = model(step, past_key_values=cache, use_cache=True).logits.argmax(-1)
            self.wait()
        values = {"tokens_per_second": NEW_TOKENS / (perf_counter() - began)}
        if self.device.type == "cuda":
            values["peak_nbytes"] = float(torch.cuda.max_memory_allocated(self.device))
            torch.cuda.reset_peak_memory_stats(self.device)
        return {"values": values}

    def wait(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)

    def jobs(self, contexts: list[int]) -> Iterator[Job]:
        def job(subject: str, method: str, work: Callable[[], dict[str, Any]]) -> Job:
            return Job("speed", subject, method, work, ours=method != "exact")

        for dtype in MOST:
            for cached in (False, True):
                told = "compressed weights" + (", live cache" if cached else "")
                yield job(f"answers in {dtype}", told, partial(self.same, dtype, cached))
        yield job("calibration", "on the device", self.calibration)
        for context in contexts:
            for told, weights, cached in (
                ("exact", False, False),
                ("weights", True, False),
                ("cache", False, True),
                ("both", True, True),
            ):
                yield job(f"decoding after {context} tokens", told, partial(self.decoding, context, weights, cached))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--contexts", default="1024,4096,16384,32768")
    parser.add_argument("--json", type=Path, default=RESULTS / "device.json")
    options = parser.parse_args()
    device = usable_device(options.device)
    assert device is not None
    contexts = [int(context) for context in options.contexts.split(",")]
    settings = {"model": options.model, "device": str(device), "contexts": list(contexts)}
    command, began = f"python benchmarks/device_check.py --device {options.device}", perf_counter()
    result = start("device check", command, settings, MEASURES, options.json, resume=False, overwrite=True)
    harness = Harness(result, options.json, say=print)
    harness.run("device", list(Check(options.model, device).jobs(contexts)))
    harness.finish(perf_counter() - began)
    wrong = [row for row in harness.result.rows if row.skipped is not None]
    for row in wrong:
        print(f"FAILED {row.subject}, {row.method}: {row.skipped}")
    return len(wrong)


if __name__ == "__main__":
    raise SystemExit(main())

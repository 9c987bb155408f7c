"""What the KV benchmarks share: documents, the profile, exact references, and where results go."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

import tensornet_compress.kv as kv
from tensornet_compress.inputs import load_causal_lm, load_tokenizer, token_windows, wikipedia_articles
from tensornet_compress.inputs.texts import CALIBRATION_SHARE
from tensornet_compress.kv.capture import Runner

MODEL = "smollm2-135m"
CONTEXT, AHEAD, SINKS, WINDOW = 1024, 128, 4, 64
COPY_SKIP = 8
CALIBRATION_WINDOWS = 44
LOOKED_AT = 8
RESULTS = Path(__file__).parent / "results"
PROFILE = "out/kv_profile"


@dataclass
class Document:
    """A held-out context with its plain states, and two continuations with exact log-probabilities.

    ``keys``, ``values``: per layer fp32 (heads, tokens, width), rotary positions off.
    """

    ids: Tensor
    keys: list[Tensor]
    values: list[Tensor]
    continuations: dict[str, Tensor]
    exact: dict[str, Tensor]
    attention: dict[str, list[Tensor]]


def model_and_tokenizer() -> tuple[Any, Any]:
    """SmolLM2-135M in fp32 with its tokenizer."""
    return load_causal_lm(MODEL, torch.float32), load_tokenizer(MODEL)


def calibration_windows(tokenizer: Any) -> Tensor:
    """Windows of the articles that no measurement uses."""
    articles = wikipedia_articles()
    return token_windows(tokenizer, articles[: int(len(articles) * CALIBRATION_SHARE)], CONTEXT + AHEAD, CALIBRATION_WINDOWS)


def heldout_ids(tokenizer: Any, length: int, count: int) -> Tensor:
    """Windows of held-out articles; the first eight were looked at while the codec was made and are left out."""
    articles = wikipedia_articles()
    heldout = articles[int(len(articles) * CALIBRATION_SHARE) :]
    return token_windows(tokenizer, heldout, length, LOOKED_AT + count)[LOOKED_AT:]


def second_domain_ids(tokenizer: Any, length: int, count: int) -> Tensor:
    """Windows of the Python language reference: a domain that calibration never saw."""
    from pydoc_data.topics import topics

    whole = tokenizer("\n".join(topics[name] for name in sorted(topics)), return_tensors="pt")["input_ids"][0]
    starts = torch.linspace(0, len(whole) - length, count).long()
    return torch.stack([whole[s : s + length] for s in starts.tolist()])


def profile(model: Any, tokenizer: Any, folder: str) -> kv.Profile:
    """The profile in ``folder``, made there first by ``calibrate`` with its defaults when it is missing."""
    if not (Path(folder) / "profile.json").exists():
        began = time.perf_counter()
        kv.calibrate(model, calibration_windows(tokenizer).split(1)).save(folder)
        print(f"calibrated in {time.perf_counter() - began:.0f} s", flush=True)
    return kv.Profile.load(folder)


def attention_outputs(model: Any, call: Callable[[], Any]) -> tuple[Any, list[Tensor]]:
    """Run ``call`` and collect the output of every attention module."""
    found: list[Tensor] = []
    handles = [
        module.register_forward_hook(lambda _m, _a, out: found.append(out[0].detach()))
        for name, module in model.named_modules()
        if name.endswith("self_attn")
    ]
    try:
        return call(), found
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def documents(model: Any, windows: Tensor) -> list[Document]:
    """Contexts of ``CONTEXT`` tokens, each with its natural continuation and a verbatim copy of a far span of itself."""
    made = []
    with Runner(model) as runner:
        for index, window in enumerate(windows):
            ids, following = window[:CONTEXT], window[CONTEXT:]
            start = int(torch.randint(64, 700, (1,), generator=torch.Generator().manual_seed(index)))
            cache, positions = runner.prefill(ids[None], torch.ones(1, CONTEXT, dtype=torch.int64))
            keys = [runner.plain(layer.keys, positions)[0] for layer in cache.layers]
            values = [layer.values[0].float() for layer in cache.layers]
            document = Document(ids, keys, values, {"natural": following, "copy": ids[start : start + AHEAD]}, {}, {})
            for name, (log_probability, attention) in read_on(model, keys, values, document.continuations).items():
                document.exact[name], document.attention[name] = log_probability, attention
            made.append(document)
    return made


@torch.no_grad()
def read_on(
    model: Any, keys: list[Tensor], values: list[Tensor], continuations: dict[str, Tensor]
) -> dict[str, tuple[Tensor, list[Tensor]]]:
    """Per continuation, read with these plain states cached: log-probabilities (tokens, vocabulary), attention outputs."""
    with Runner(model) as runner:
        rotary = runner.recorder.rotary(runner.style)  # type: ignore[union-attr, arg-type]
    positions = torch.arange(keys[0].shape[1])
    count = len(continuations)
    pairs = [(rotary.rotate(k, positions), v) for k, v in zip(keys, values)]
    cache = DynamicCache([tuple(t.expand(count, -1, -1, -1) for t in pair) for pair in pairs])
    ids = torch.stack(list(continuations.values()))
    out, attention = attention_outputs(model, lambda: model(ids, past_key_values=cache))
    return {
        name: (out.logits[row].float().log_softmax(-1), [a[row] for a in attention]) for row, name in enumerate(continuations)
    }


def compare(document: Document, name: str, log_probability: Tensor, attention: list[Tensor]) -> dict[str, float]:
    """KL to the exact cache (nats a token), change of cross-entropy, top-1 agreement, relative attention-output error."""
    exact, skip = document.exact[name], COPY_SKIP if name == "copy" else 0
    kl = (exact.exp() * (exact - log_probability)).sum(-1)[skip:]
    target = document.continuations[name][1:]
    ce = [-lp[:-1].gather(1, target[:, None])[skip:].mean() for lp in (log_probability, exact)]
    error = [((a - b).norm() / b.norm()).item() for a, b in zip(attention, document.attention[name])]
    return {
        "kl": kl.mean().item(),
        "ce": ce[0].item(),
        "dce": (ce[0] - ce[1]).item(),
        "top1": (log_probability.argmax(-1) == exact.argmax(-1))[skip:].float().mean().item(),
        "attention_error": sum(error) / len(error),
    }


def write(name: str, payload: dict[str, Any]) -> Path:
    """``results/<name>.json``, with the software and machine it was made on; written whole or not at all."""
    RESULTS.mkdir(exist_ok=True)
    payload = {"machine": machine(), **payload}
    path = RESULTS / f"{name}.json"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(payload, indent=1) + "\n")
    os.replace(temporary, path)
    return path


def machine() -> dict[str, Any]:
    """Versions, threads and processor."""
    import transformers

    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "processor": platform.processor() or platform.machine(),
        "date": time.strftime("%Y-%m-%d"),
    }

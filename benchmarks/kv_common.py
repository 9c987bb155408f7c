"""What the KV benchmarks share: documents, the profile, exact references, and where results go."""

from __future__ import annotations

import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import tensornet_compress.kv as kv
from tensornet_compress.bench.cache_documents import COPY_SKIP, Document, Reading, attention_outputs, read_on
from tensornet_compress.bench.cache_documents import documents as bench_documents
from tensornet_compress.inputs import load_causal_lm, load_tokenizer, token_windows, wikipedia_articles
from tensornet_compress.inputs.texts import CALIBRATION_SHARE

MODEL = "smollm2-135m"
CONTEXT, AHEAD, SINKS, WINDOW = 1024, 128, 4, 64
CALIBRATION_WINDOWS = 44
LOOKED_AT = 8
RESULTS = Path(__file__).parent / "results"
PROFILE = "out/kv_profile"
__all__ = ["Document", "attention_outputs", "read_on"]


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


def documents(model: Any, windows: Tensor) -> list[Document]:
    """Contexts of ``CONTEXT`` tokens, each with its natural continuation and a verbatim copy of a far span of itself."""
    return bench_documents(model, windows, Reading(CONTEXT, AHEAD, SINKS, WINDOW))


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

"""Read one long document once, keep its cache on disk, and answer questions from it in later runs.

    python examples/serve_document.py smollm2-135m report.txt "The main risk is" "The total cost was"

The first run reads the document and writes DOCUMENT.KEY.cache beside it; later ones load that in place of reading. The key
changes with the text, the model, the bits and the profile. Both print the time to the first token of each answer. ``--profile``
takes a profile that ``tensornet-compress kv`` made for the model.
"""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

import tensornet_compress as tnc
from tensornet_compress.inputs import load_causal_lm, load_tokenizer


def read(model: Any, document: torch.Tensor, bits: float, profile: Any) -> tnc.kv.CompressedCache:
    """The storage cache of a document (1, tokens), for which the model runs over all of it."""
    cache = tnc.kv.CompressedCache(model, bits=bits, profile=profile, mode="storage")
    with torch.no_grad():
        model(document, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache


def answer(model: Any, cache: Any, question: torch.Tensor, tokens: int) -> tuple[list[int], float]:
    """Greedy tokens after a question (1, tokens) that follows what the cache holds, and seconds to the first of them."""
    began, found, first = perf_counter(), [], 0.0
    with torch.no_grad():
        for _ in range(tokens):
            logits = model(question, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            question = logits[:, -1:].argmax(-1)
            found.append(int(question))
            first = first or perf_counter() - began
    return found, first


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", help="folder (compressed or not), hub id or bundled name")
    parser.add_argument("document", type=Path, help="text file")
    parser.add_argument("questions", nargs="+", help="beginnings of sentences that the model goes on with")
    parser.add_argument("--bits", type=float, default=3.0, help="payload bits per cached number")
    parser.add_argument("--tokens", type=int, default=16, help="length of an answer")
    parser.add_argument("--profile", type=Path, help="folder of a profile")
    options = parser.parse_args(arguments)
    model, tokenizer = load_causal_lm(options.model), load_tokenizer(options.model)
    profile = tnc.kv.Profile.load(options.profile) if options.profile else None
    text = options.document.read_text(encoding="utf-8")
    read_by = (options.model, options.bits, profile and profile.fingerprint())
    key = hashlib.sha256(repr((text, *read_by)).encode()).hexdigest()[:8]
    file = options.document.with_name(f"{options.document.name}.{key}.cache")
    if not file.exists():
        document = tokenizer(text, return_tensors="pt")["input_ids"]
        began = perf_counter()
        nbytes = read(model, document, options.bits, profile).save(file)
        print(f"read {document.shape[1]} tokens in {perf_counter() - began:.2f} s; their cache takes {nbytes:,} bytes on disk")
    for question in options.questions:
        began = perf_counter()
        cache = tnc.kv.CompressedCache.load(file, model, profile)
        loaded = perf_counter() - began
        ids = tokenizer("\n" + question, return_tensors="pt", add_special_tokens=False)["input_ids"]
        found, first = answer(model, cache, ids, options.tokens)
        print(f"{question}{tokenizer.decode(found)}  [first token after {loaded + first:.2f} s]")


if __name__ == "__main__":
    main()

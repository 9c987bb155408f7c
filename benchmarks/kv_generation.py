"""Long greedy generation: where a compressed cache first departs from the exact one, and how much agrees.

python benchmarks/kv_generation.py [--profile FOLDER] [--prompt 512] [--new 512] [--documents 1]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import kv_common as common
import torch
from torch import Tensor
from transformers import DynamicCache, QuantizedCache

import tensornet_compress.kv as kv


@torch.no_grad()
def greedy(model: Any, ids: Tensor, cache: Any, new: int) -> Tensor:
    """``new`` greedy tokens after ids (1, tokens)."""
    made = model.generate(ids, past_key_values=cache, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0)
    return made[0, ids.shape[1] :]


@torch.no_grad()
def forced(model: Any, ids: Tensor, continuation: Tensor, cache: Any, chunk: int = 16) -> Tensor:
    """Greedy choices (tokens,) along a given continuation, so that one early departure does not hide what follows."""
    model(ids, past_key_values=cache, logits_to_keep=1)
    picks = []
    for part in continuation[:-1].split(chunk):
        picks.append(model(part[None], past_key_values=cache).logits[0].argmax(-1))
    return torch.cat(picks)


def main() -> None:
    """Measure and write ``results/kv_generation.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", default=common.PROFILE, help="folder of a profile; made there when missing")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=512)
    parser.add_argument("--documents", type=int, default=1)
    parser.add_argument("--no-stock", action="store_true")
    options = parser.parse_args()
    model, tokenizer = common.model_and_tokenizer()
    profile = common.profile(model, tokenizer, options.profile)
    makers: dict[str, Callable[[], Any]] = {
        "ours, storage 2 b": lambda: kv.CompressedCache(model, 2.0, profile, mode="storage"),
        "ours, storage 4 b": lambda: kv.CompressedCache(model, 4.0, profile, mode="storage"),
        "ours, live 4 b": lambda: kv.CompressedCache(model, 4.0, profile),
        "ours, live 2 b": lambda: kv.CompressedCache(model, 2.0, profile),
    }
    if not options.no_stock:
        makers["QuantizedCache quanto int4"] = lambda: QuantizedCache("quanto", model.config, nbits=4)
        makers["QuantizedCache quanto int2"] = lambda: QuantizedCache("quanto", model.config, nbits=2)
    rows = []
    for document, ids in enumerate(common.heldout_ids(tokenizer, options.prompt, options.documents)):
        exact = greedy(model, ids[None], DynamicCache(config=model.config), options.new)
        for name, make in makers.items():
            got = greedy(model, ids[None], make(), options.new)
            along = forced(model, ids[None], exact, make())
            differ = torch.nonzero(got != exact).flatten()
            row = {
                "document": document,
                "cache": name,
                "first_divergence": int(differ[0]) if len(differ) else options.new,
                "agreement": float((got == exact).float().mean()),
                "agreement_along_exact": float((along == exact[1:]).float().mean()),
            }
            rows.append(row)
            print(row, flush=True)
            common.write("kv_generation", {"prompt": options.prompt, "new": options.new, "rows": rows})


if __name__ == "__main__":
    main()

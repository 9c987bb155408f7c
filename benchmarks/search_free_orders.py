"""Orders absorbed for free: are outputs equal, and what do the orders buy in bytes?

    python benchmarks/search_free_orders.py

All block linears of SmolLM2 are rounded to nearest (no calibration) in groups of 64 before and after reordering; the squared
error saved is turned into bits at 6.02 dB a bit. Quality is KL on held-out windows.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from common import LENGTH, MODEL, language_inputs, original_layers, write_result
from torch import Tensor

import tensornet_compress as tnc
from tensornet_compress.evaluate import Reference, evaluate_language
from tensornet_compress.experimental import FreeOrders, free_orders, reordered

WINDOWS = 8


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(ids).logits
    return found


def rounded(model: Any, fmt: str, heldout: Tensor, reference: Reference) -> dict[str, float]:
    """Total squared error of the block linears, and the model's quality."""
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.ndim == 2 and "layers" in name}
    with original_layers(model):
        budget = tnc.Budget(bits_per_weight=float(fmt[3]) + 0.5)
        report = tnc.compress(model, budget, method="dense", formats=[fmt], allocator="uniform")
        error = 0.0
        for name, weight in before.items():
            module = model.get_submodule(name.removesuffix(".weight"))
            error += float((module.network().to_dense(torch.float32) - weight.float()).double().square().sum())
        quality = evaluate_language(model, heldout, reference)
    return {"squared_error": error, "nbytes": report.targeted_nbytes, "kl": quality.kl, "perplexity": quality.perplexity}


def main() -> None:
    model, _, _, heldout = language_inputs(WINDOWS)
    model = model.float()
    reference = Reference(model, heldout)
    exact = logits(model, heldout[:1])
    chosen = free_orders(model)
    kinds = {
        "native": FreeOrders(),
        "neurons": FreeOrders(neurons=chosen.neurons),
        "residual": FreeOrders(residual=chosen.residual),
        "values": FreeOrders(values=chosen.values),
        "all": chosen,
    }
    rows = []
    for fmt in ("int4g64o", "int3g64o"):
        for name, orders in kinds.items():
            with reordered(model, orders):
                largest = float((logits(model, heldout[:1]) - exact).abs().max())
                row = {"format": fmt, "orders": name, "largest_logit_change": largest}
                rows.append(row | rounded(model, fmt, heldout, reference))
            native = next(r for r in rows if r["format"] == fmt and r["orders"] == "native")
            rows[-1]["bits_saved"] = math.log2(native["squared_error"] / rows[-1]["squared_error"]) / 2
            print(rows[-1], flush=True)
    settings = {"model": MODEL, "windows": WINDOWS, "length": LENGTH, "largest_logit": float(exact.abs().max())}
    write_result("search_free_orders", {"settings": settings, "rows": rows})


if __name__ == "__main__":
    main()

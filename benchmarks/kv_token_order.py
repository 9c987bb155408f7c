"""Does the order of a block's tokens pay? Token order is free once a block is complete, if its permutation is stored.

Our code treats tokens as independent rows, so order changes nothing there. Order could only pay through prediction from a
neighbour, so this gives prediction every advantage: closed-loop prediction of each coefficient from the previously coded token
with the best weight of that component in this very document, Laplace lengths with that document's own scales, nothing of it
charged; then in native order, and along a greedy path through the most similar tokens, whose permutation costs log2(T!) bits.

    python benchmarks/kv_token_order.py [--profile FOLDER] [--bits 2] [--documents 8]
"""

from __future__ import annotations

import argparse
import math
import statistics
from typing import Any

import kv_common as common
import torch
from torch import Tensor

from tensornet_compress.kv.profile.profile import SIDES
from tensornet_compress.kv.profile.tree import rows_of
from tensornet_compress.kv.storage.codec import JointCodec

BODY = slice(common.SINKS, common.CONTEXT - common.WINDOW)


def laplace_bits(codes: Tensor) -> float:
    """Length in bits of integer codes (tokens, components) under a two-sided geometric law fitted to each component."""
    mean = codes.abs().double().mean(0)
    # P(k) = (1 - a) / (1 + a) * a^|k| with E|k| = 2 a / (1 - a^2)
    a = torch.where(mean > 0, ((1 + mean.square()).sqrt() - 1) / mean.clamp_min(1e-30), 0.0)
    per_token = -((1 - a) / (1 + a)).log2() - mean * a.clamp_min(1e-300).log2()
    return float(per_token.sum()) * len(codes)


def predicted_codes(coefficients: Tensor, step: float) -> Tensor:
    """Codes of what closed-loop prediction from the token before leaves, with the best weight per component."""
    before, after = coefficients[:-1], coefficients[1:]
    weight = ((before * after).sum(0) / before.square().sum(0).clamp_min(1e-30)).clamp(-1, 1)
    decoded = torch.zeros_like(coefficients[0])
    codes = []
    for row in coefficients:
        guess = weight * decoded
        code = ((row - guess) / step).round()
        decoded = guess + code * step
        codes.append(code)
    return torch.stack(codes)


def similarity_path(coefficients: Tensor) -> list[int]:
    """Greedy: always the nearest token not visited yet."""
    distance = torch.cdist(coefficients, coefficients)
    visited = torch.zeros(len(coefficients), dtype=torch.bool)
    path = [0]
    while len(path) < len(coefficients):
        visited[path[-1]] = True
        path.append(int(distance[path[-1]].masked_fill(visited, math.inf).argmin()))
    return path


def main() -> None:
    """Measure and write ``results/kv_token_order.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", default=common.PROFILE, help="folder of a profile; made there when missing")
    parser.add_argument("--bits", type=float, default=2.0)
    parser.add_argument("--documents", type=int, default=8)
    options = parser.parse_args()
    model, tokenizer = common.model_and_tokenizer()
    profile = common.profile(model, tokenizer, options.profile)
    codec = JointCodec(profile, options.bits)
    rows: list[dict[str, Any]] = []
    for document in common.documents(model, common.heldout_ids(tokenizer, common.CONTEXT + common.AHEAD, options.documents)):
        states = [k[:, BODY] for k in document.keys], [v[:, BODY] for v in document.values]
        coefficients = torch.cat([profile.trees[side].analyse(rows_of(part)) for side, part in zip(SIDES, states)], 1)
        step, tokens = float(codec.encode(*states).tensors["step"]), len(coefficients)
        elements = sum(t.numel() for part in states for t in part)
        path = similarity_path(coefficients)
        permutation = math.lgamma(tokens + 1) / math.log(2)
        rows.append(
            {
                "no prediction": laplace_bits((coefficients / step).round()) / elements,
                "predicted, native order": laplace_bits(predicted_codes(coefficients, step)) / elements,
                "predicted, similarity path": laplace_bits(predicted_codes(coefficients[path], step)) / elements,
                "permutation": permutation / elements,
            }
        )
        print(rows[-1], flush=True)
    means = {name: statistics.mean(row[name] for row in rows) for name in rows[0]}
    print(means)
    common.write("kv_token_order", {"bits": options.bits, "unit": "bits per element", "means": means, "rows": rows})


if __name__ == "__main__":
    main()

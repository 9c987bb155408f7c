"""Forms of the cached sequence itself, without calibration, everything counted: SVD and sorted entries per layer, tensor train
and Tucker over all layers."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from tensorly.decomposition import partial_tucker
from torch import Tensor

import tensornet_compress as tnc
from tensornet_compress.bench.cache_case import CACHE_METHODS, STEP, CacheCase, CacheCoder, States
from tensornet_compress.bench.peer_packages import Unavailable, require_fit
from tensornet_compress.bench.peers.rounded_caches import round_groups
from tensornet_compress.bench.registry import Method
from tensornet_compress.coding import parse_format
from tensornet_compress.kv.profile.tree import layers_of, rows_of
from tensornet_compress.options.sorted_entries import sorted_within

INT4 = 4 + 32 / 64
"""Bits of a number in groups of 64 with a scale and a zero point."""
SideCoder = Callable[[States, float], tuple[States, float]]
"""(states of one side, bits per element) -> decoded states, bits that they take in all."""


def by_side(form: str, code: SideCoder, case: CacheCase, bits: float) -> CacheCoder:
    """Keys and values, each by themselves."""

    def recode(keys: States, values: States, positions: Tensor) -> tuple[States, States, float]:
        (decoded_keys, key_bits), (decoded_values, value_bits) = code(keys, bits), code(values, bits)
        return decoded_keys, decoded_values, (key_bits + value_bits) / sum(t.numel() for t in (*keys, *values))

    return CacheCoder(f"per-sequence {form} {bits:g} b", recode)


def truncated(states: States, bits: float) -> tuple[States, float]:
    """Per layer, a truncated SVD: token factor in int4, basis in fp16."""
    decoded, spent = [], 0.0
    for layer in states:
        rows = rows_of([layer])
        tokens, channels = rows.shape
        per_rank = tokens * INT4 + channels * 16
        require_fit("rank 1", per_rank / rows.numel(), bits + STEP, "element", bits)
        rank = max(1, min(channels, int(bits * rows.numel() / per_rank)))
        u, s, v = torch.linalg.svd(rows, full_matrices=False)
        factor = round_groups(u[:, :rank] * s[:rank], 4, 0, 64)
        decoded += layers_of(factor @ v[:rank].half().float(), [len(layer)], layer.shape[-1])
        spent += rank * per_rank
    return decoded, spent


def sorted_entries(states: States, bits: float) -> tuple[States, float]:
    """EinSort: per layer the tokens of each channel are sorted and tied (``SortedFormat`` of rank 2: channels have means)."""
    decoded, spent = [], 0.0
    for layer in states:
        channels = rows_of([layer]).T.contiguous()
        fmt = sorted_within(channels, channels.shape[1], 2, max_bytes=int(bits * channels.numel() / 8))
        if fmt is None:
            raise Unavailable(f"{bits:g} bits do not hold sorted runs of {channels.shape[1]} tokens")
        network = tnc.realise(channels, tnc.NetworkSpec.dense(tuple(channels.shape), fmt))
        decoded += layers_of(network.to_dense().T, [len(layer)], layer.shape[-1])
        spent += 8 * network.nbytes
    return decoded, spent


def train(states: States, bits: float) -> tuple[States, float]:
    """A tensor train over (layer, head, channel, token), ranks by bytes, cores in int4 with offsets; channel means in fp16."""
    tensor, mean = _centred(states)
    nbytes = int(bits * tensor.numel() / 8) - mean.nbytes
    network = tnc.to_network(tensor, max_bytes=nbytes, fmt=parse_format("int4g64o"))
    return _states(network.to_dense(torch.float32).reshape(tensor.shape), mean), 8 * (network.nbytes + mean.nbytes)


def tucker(states: States, bits: float) -> tuple[States, float]:
    """tensorly's Tucker decomposition (truncated HOSVD) over (layer, head, channel, token), every mode keeping the same share,
    core and factors in int4; channel means in fp16."""
    tensor, mean = _centred(states)
    shape, means = tuple(tensor.shape), 16 * mean.numel()
    ranks = _shared_ranks(shape, int(bits * tensor.numel()) - means)
    spent = _tucker_numbers(shape, ranks) * INT4 + means
    require_fit(f"ranks {ranks}", spent / tensor.numel(), bits + STEP, "element", bits)
    core, factors = partial_tucker(tensor.numpy(), rank=list(ranks), n_iter_max=0, init="svd")[0]
    parts = [torch.from_numpy(part) for part in (core, *factors)]
    dense, *rounded = (round_groups(part.reshape(-1), 4, 0, 64).reshape(part.shape) for part in parts)
    for mode, factor in enumerate(rounded):
        dense = torch.tensordot(dense.movedim(mode, -1), factor, dims=([-1], [1])).movedim(-1, mode)
    return _states(dense, mean), spent


def _centred(states: States) -> tuple[Tensor, Tensor]:
    """Layers as one tensor (layer, head, channel, token) less its mean over tokens, and that mean in fp16."""
    tensor = torch.stack(states).movedim(2, 3).contiguous()
    mean = tensor.mean(3, keepdim=True).half()
    return tensor - mean.float(), mean


def _states(tensor: Tensor, mean: Tensor) -> States:
    return list((tensor + mean.float()).movedim(3, 2))


def _shared_ranks(shape: tuple[int, ...], bits: int) -> tuple[int, ...]:
    """The largest ranks in proportion to the modes that fit."""

    def ranks(share: float) -> tuple[int, ...]:
        return tuple(max(1, int(share * size)) for size in shape)

    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if _tucker_numbers(shape, ranks(middle)) * INT4 <= bits else (low, middle)
    return ranks(low)


def _tucker_numbers(shape: tuple[int, ...], ranks: tuple[int, ...]) -> int:
    return math.prod(ranks) + sum(rank * size for rank, size in zip(ranks, shape))


for _name, _form, _code, _explanation in (
    ("sorted", "sorted entries", sorted_entries, "EinSort: tokens of each channel sorted and tied, the order entropy-coded"),
    ("sequence-svd", "SVD + int4", truncated, "per-layer SVD of the sequence, int4 factors"),
    ("sequence-tt", "TT + int4", train, "tensor train of the sequence, int4 cores"),
    ("sequence-tucker", "Tucker + int4", tucker, "tensorly's Tucker, int4 parts"),
):
    CACHE_METHODS.add(Method(_name, partial(by_side, _form, _code), _explanation))

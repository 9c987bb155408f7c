"""Factorisations of the cached sequence itself, without calibration: SVD per layer, tensor train and Tucker over all layers."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from tensorly.decomposition import partial_tucker
from torch import Tensor

import tensornet_compress as tnc
from tensornet_compress.bench.cache_case import CACHE_METHODS, STEP, CacheMethod, States
from tensornet_compress.bench.peers.caches.rounding import round_groups
from tensornet_compress.bench.side import require_fit
from tensornet_compress.coding import parse_format
from tensornet_compress.kv.profile.tree import layers_of, rows_of


@dataclass
class SequenceSvd:
    """Per layer and side, a truncated SVD of the block's plain states: token factor in int4 g64, basis in fp16, all counted."""

    bits: float

    @property
    def name(self) -> str:
        """Short name."""
        return f"per-sequence SVD + int4 {self.bits:g} b"

    def recode(self, keys: States, values: States, positions: Tensor) -> tuple[States, States, float]:
        """See ``Peer``."""
        out, spent = [], 0.0
        for states in (keys, values):
            side = []
            for layer in states:
                rows = rows_of([layer])
                tokens, channels = rows.shape
                per_rank = tokens * (4 + 32 / 64) + channels * 16
                require_fit("rank 1", per_rank / rows.numel(), self.bits + STEP, "element", self.bits)
                rank = max(1, min(channels, int(self.bits * rows.numel() / per_rank)))
                u, s, v = torch.linalg.svd(rows, full_matrices=False)
                factor = round_groups(u[:, :rank] * s[:rank], 4, 0, 64)
                side.append(layers_of(factor @ v[:rank].half().float(), [len(layer)], layer.shape[-1])[0])
                spent += rank * per_rank / (2 * len(keys) * rows.numel())
            out.append(side)
        return out[0], out[1], spent


@dataclass
class SequenceTrain:
    """Per side, a tensor train over (layer, head, channel, token) of the block's plain states, ranks by bytes, cores in int4
    groups of 64 with offsets; per-channel means in fp16. Calibration-free: everything is counted."""

    bits: float

    @property
    def name(self) -> str:
        """Short name."""
        return f"per-sequence TT + int4 {self.bits:g} b"

    def recode(self, keys: States, values: States, positions: Tensor) -> tuple[States, States, float]:
        """See ``Peer``."""
        out, nbytes = [], 0
        for states in (keys, values):
            tensor = torch.stack(states).movedim(2, 3).contiguous()
            mean = tensor.mean(3, keepdim=True).half()
            network = tnc.to_network(
                tensor - mean.float(), max_bytes=int(self.bits * tensor.numel() / 8) - mean.nbytes, fmt=parse_format("int4g64o")
            )
            nbytes += network.nbytes + mean.nbytes
            out.append(list((network.to_dense(torch.float32).reshape(tensor.shape) + mean.float()).movedim(3, 2)))
        return out[0], out[1], 8 * nbytes / sum(t.numel() for t in (*keys, *values))


@dataclass
class SequenceTucker:
    """Per side, tensorly's Tucker decomposition (truncated HOSVD) over (layer, head, channel, token), every mode keeping the
    same share, core and factors in int4 groups of 64 with 32 bits of scale and zero, per-channel means in fp16."""

    bits: float

    @property
    def name(self) -> str:
        """Short name."""
        return f"per-sequence Tucker + int4 {self.bits:g} b"

    def recode(self, keys: States, values: States, positions: Tensor) -> tuple[States, States, float]:
        """See ``Peer``."""
        out, spent = [], 0.0
        for states in (keys, values):
            tensor = torch.stack(states).movedim(2, 3).contiguous()
            mean = tensor.mean(3, keepdim=True).half()
            ranks = self._ranks(tuple(tensor.shape), int(self.bits * tensor.numel()) - 16 * mean.numel())
            taken = math.prod(ranks) + sum(r * size for r, size in zip(ranks, tensor.shape))
            bits = (taken * (4 + 32 / 64) + 16 * mean.numel()) / tensor.numel()
            require_fit(f"ranks {ranks}", bits, self.bits + STEP, "element", self.bits)
            core, factors = partial_tucker((tensor - mean.float()).numpy(), rank=list(ranks), n_iter_max=0, init="svd")[0]
            parts = [torch.from_numpy(part) for part in (core, *factors)]
            rounded = [round_groups(p.reshape(-1), 4, 0, 64).reshape(p.shape) for p in parts]
            spent += sum(p.numel() for p in parts) * (4 + 32 / 64) + 16 * mean.numel()
            dense = rounded[0]
            for mode, factor in enumerate(rounded[1:]):
                dense = torch.tensordot(dense.movedim(mode, -1), factor, dims=([-1], [1])).movedim(-1, mode)
            out.append(list((dense + mean.float()).movedim(3, 2)))
        return out[0], out[1], spent / sum(t.numel() for t in (*keys, *values))

    def _ranks(self, shape: tuple[int, ...], bits: int) -> tuple[int, ...]:
        """The largest ranks in proportion to the modes that fit."""

        def ranks(share: float) -> tuple[int, ...]:
            return tuple(max(1, int(share * size)) for size in shape)

        low, high = 0.0, 1.0
        for _ in range(40):
            middle = (low + high) / 2
            found = ranks(middle)
            numbers = math.prod(found) + sum(r * size for r, size in zip(found, shape))
            low, high = (middle, high) if numbers * (4 + 32 / 64) <= bits else (low, middle)
        return ranks(low)


CACHE_METHODS.add(
    CacheMethod("sequence-svd", lambda case, bits: SequenceSvd(bits), explanation="per-layer SVD of the sequence, int4 factors")
)
CACHE_METHODS.add(
    CacheMethod("sequence-tt", lambda case, bits: SequenceTrain(bits), explanation="tensor train of the sequence, int4 cores")
)
CACHE_METHODS.add(
    CacheMethod("sequence-tucker", lambda case, bits: SequenceTucker(bits), explanation="tensorly's Tucker, int4 parts")
)

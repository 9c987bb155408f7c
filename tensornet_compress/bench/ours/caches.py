"""Our codecs as cache methods: storage and live with a profile, storage without calibration."""

from __future__ import annotations

import torch
from torch import Tensor

from tensornet_compress.bench.cache_case import CACHE_METHODS, CacheCase, CacheMethod, States
from tensornet_compress.coding.planes import UNIT
from tensornet_compress.kv.profile.profile import Profile
from tensornet_compress.kv.rope import Rotary
from tensornet_compress.kv.storage.codec import BlockCodec, JointCodec
from tensornet_compress.kv.storage.sequence_codec import FreeCodec


class Storage:
    """A storage codec on a block."""

    def __init__(self, name: str, codec: BlockCodec, profile_nbytes: int = 0):
        self.name, self.codec, self.profile_nbytes = name, codec, profile_nbytes

    def recode(self, keys: States, values: States, positions: Tensor) -> tuple[States, States, float]:
        """See ``CachePeer``."""
        payload = self.codec.encode(keys, values)
        decoded = self.codec.decode(payload)
        return *decoded, 8 * payload.nbytes / sum(t.numel() for t in (*keys, *values))


class Live:
    """Our live codes on a block, rotary positions on; the last tokens that do not fill a unit are coded alone."""

    def __init__(self, profile: Profile, bits: float, rotary: Rotary):
        self.name, self.rotary = f"ours, live {bits:g} b", rotary
        self.codes = profile.live_codes(bits)
        self.profile_nbytes = profile.nbytes
        per_layer = [heads * profile.spec.key.width for heads in profile.spec.heads]
        self.layer_bits = [
            (key.layout.bits_per_token / channels, value.layout.bits_per_token / channels)
            for (key, value), channels in zip(self.codes, per_layer)
        ]

    def recode(self, keys: States, values: States, positions: Tensor) -> tuple[States, States, float]:
        """See ``CachePeer``."""
        out_keys: States = []
        out_values: States = []
        tokens = keys[0].shape[1]
        padded = -(-tokens // UNIT) * UNIT
        for (key_code, value_code), key, value in zip(self.codes, keys, values):
            for code, states, target in (
                (key_code, self.rotary.rotate(key, positions), out_keys),
                (value_code, value, out_values),
            ):
                whole = torch.nn.functional.pad(states, (0, 0, 0, padded - tokens))[None]
                target.append(code.decode(code.encode(whole))[0, :, :tokens])
        spent = sum(a.layout.bits_per_token + b.layout.bits_per_token for a, b in self.codes)
        elements = sum(k.shape[0] * k.shape[2] for k in (*keys, *values))
        return [self.rotary.unrotate(k, positions) for k in out_keys], out_values, spent / elements


def storage(case: CacheCase, bits: float) -> Storage:
    """The tree over all layers."""
    return Storage(f"ours, storage {bits:g} b", JointCodec(case.profile, bits), case.profile.nbytes)


def free(case: CacheCase, bits: float) -> Storage:
    """Without calibration."""
    return Storage(f"ours, no calibration {bits:g} b", FreeCodec(bits))


def live(case: CacheCase, bits: float) -> Live:
    """Fixed-rate codes that attention contracts with."""
    return Live(case.profile, bits, case.rotary)


CACHE_METHODS.add(CacheMethod("ours-storage", storage, ours=True, explanation="tree over all layers and heads, entropy-coded"))
CACHE_METHODS.add(CacheMethod("ours-live", live, ours=True, explanation="one basis per layer, whole bits, contracted"))
CACHE_METHODS.add(CacheMethod("ours-free", free, ours=True, explanation="storage without any calibration"))

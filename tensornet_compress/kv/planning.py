"""What caches cost: where the bytes of one are, and what a kind will cost before one is made.

The error is the expected squared error per key/value element in the metric of the profile's calibration, so that storage and
live caches compare; multiply-adds count what attention does beyond the projections of the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from tensornet_compress.coding.cache_quantiser import ROUNDING, classify
from tensornet_compress.errors import TensorNetError
from tensornet_compress.kv.profile.profile import SIDES, Profile
from tensornet_compress.kv.profile.tree import SideTree
from tensornet_compress.kv.rope import text_config

RATES = (1.0, 1.25, 1.5, 2.0, 3.0, 4.0)
_QUANTILES = 512
_CHUNK, _ROWS = 1024, 512


@dataclass(frozen=True)
class CacheReport:
    """Where the bytes of a cache are. ``shared_nbytes``: what a profile holds in memory, once for all caches of a model and
    not in ``nbytes``. ``skipped``: layers that keep their own class, with their type."""

    tokens: int
    sealed_tokens: int
    payload_nbytes: int
    sink_nbytes: int
    tail_nbytes: int
    working_nbytes: int
    basis_nbytes: int
    other_nbytes: int
    exact_nbytes: int
    shared_nbytes: int
    bits_per_element: float
    skipped: tuple[tuple[int, str], ...]

    @property
    def nbytes(self) -> int:
        """Everything held now."""
        stored = self.payload_nbytes + self.sink_nbytes + self.tail_nbytes + self.basis_nbytes
        return stored + self.working_nbytes + self.other_nbytes

    def __str__(self) -> str:
        lines = [
            f"{self.tokens} tokens, {self.sealed_tokens} sealed; {self.nbytes:,} bytes held, exact cache {self.exact_nbytes:,}",
            f"  payload {self.payload_nbytes:,}  sinks {self.sink_nbytes:,}  recent tail {self.tail_nbytes:,}  "
            f"own bases {self.basis_nbytes:,}  decoded working set {self.working_nbytes:,}  other layers {self.other_nbytes:,}",
            f"  {self.bits_per_element:.3f} bits per key/value element stored: codes, own bases, sinks and recent tail, "
            f"without the decoded working set; beside them {self.shared_nbytes:,} bytes in memory of what",
            "  this mode and rate use of the profile, shared by all caches",
        ]
        lines += [f"  layer {index} keeps its own class: {kind}" for index, kind in self.skipped]
        return "\n".join(lines)


@dataclass(frozen=True)
class CacheCost:
    """One way to keep a cache of ``tokens`` tokens (batch 1).

    ``held_nbytes``: between steps; ``working_nbytes``: more while a step runs (a decoded working set, or one layer rebuilt);
    ``step_multiply_adds``: attention of one new token over all layers; ``thaw_multiply_adds``: once per use of a frozen cache;
    ``error``: expected squared error per element in the profile's metric, 0 for the exact cache.
    """

    mode: Literal["exact", "live", "storage"]
    attention: Literal["stock", "contract", "rebuild"]
    bits: float
    tokens: int
    held_nbytes: int
    working_nbytes: int
    step_multiply_adds: int
    thaw_multiply_adds: int
    error: float


def costs(
    model: nn.Module, profile: Profile, tokens: int, rates: Sequence[float] = RATES, *, sinks: int = 4, window: int = 64
) -> list[CacheCost]:
    """Every kind of cache at every rate (payload bits per element), and the exact cache, for ``tokens`` cached tokens.

    >>> import tensornet_compress.kv as kv
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = dict(vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4)
    >>> model = LlamaForCausalLM(LlamaConfig(**sizes))
    >>> profile = kv.calibrate(model, [torch.randint(50, (1, 96)) for _ in range(5)], metric="euclidean")
    >>> exact, storage, *live = kv.costs(model, profile, tokens=4096, rates=[2.0])
    >>> exact.held_nbytes // storage.held_nbytes
    12
    >>> kv.front([exact, storage, *live])[0] is exact
    True

    Raises:
        TensorNetError: no tokens to seal, or a rate out of range.
    """
    sealed = tokens - window
    if sealed <= sinks:
        raise TensorNetError(f"{tokens} tokens leave nothing to compress beside {sinks} sinks and a window of {window}")
    query_heads = int(text_config(model).num_attention_heads)
    itemsize = next(model.parameters()).element_size()
    per_token = profile.elements_per_token
    layers, width = len(profile.spec.layers), profile.spec.key.width
    stock = 2 * layers * query_heads * tokens * width
    plain = (tokens - sealed + sinks) * per_token * itemsize
    decoded = sealed * per_token * itemsize
    found = [CacheCost("exact", "stock", 8.0 * itemsize, tokens, tokens * per_token * itemsize, 0, stock, 0, 0.0)]
    unpacking = sum(_synthesis(profile.trees[side]) for side in SIDES) * sealed
    for bits in rates:
        held = plain + int(bits * sealed * per_token / 8)
        found.append(
            CacheCost("storage", "stock", bits, tokens, held, decoded, stock, unpacking, _storage_error(profile, bits))
        )
        codes = profile.live_codes(bits)
        held = plain + sealed * sum(code.layout.bits_per_token for pair in codes for code in pair) // 8
        rows = [(code.layout.count, code.heads * width) for pair in codes for code in pair]
        contracted = sum(query_heads * count * sealed + query_heads * count * width for count, _ in rows)
        recent = 2 * layers * query_heads * (tokens - sealed) * width
        rebuilt = sum(count * channels for count, channels in rows) * sealed
        error = _live_error(profile, bits)
        found.append(CacheCost("live", "contract", bits, tokens, held, 0, contracted + recent, 0, error))
        found.append(CacheCost("live", "rebuild", bits, tokens, held, decoded // layers, rebuilt + stock, 0, error))
    return found


def front(candidates: Sequence[CacheCost]) -> list[CacheCost]:
    """Those that no other beats in bytes (held and working), arithmetic (of a step, and of thawing) and error at once.

    >>> from dataclasses import replace
    >>> small = CacheCost("live", "contract", 2.0, 4096, 1000, 0, 50_000, 0, 0.1)
    >>> front([small, replace(small, held_nbytes=2000), replace(small, held_nbytes=2000, error=0.01)])[0] is small
    True
    """

    def keys(cost: CacheCost) -> tuple[float, ...]:
        return (cost.held_nbytes, cost.working_nbytes, cost.step_multiply_adds, cost.thaw_multiply_adds, cost.error)

    def beats(a: CacheCost, b: CacheCost) -> bool:
        return keys(a) != keys(b) and all(x <= y for x, y in zip(keys(a), keys(b)))

    return [cost for cost in candidates if not any(beats(other, cost) for other in candidates)]


def _synthesis(tree: SideTree) -> int:
    """Multiply-adds that rebuild one token of one side from its coefficients."""
    units = tree.mean.numel() // tree.width
    root = tree.root.rank * tree.root.width if tree.root is not None else 0
    return root + sum(basis.rank * basis.width for basis in tree.bases) + units * tree.width**2


def _storage_error(profile: Profile, bits: float) -> float:
    """Laplace coefficients of the calibrated scales under the dead-zone quantiser at the calibrated step."""
    step = profile.step(bits)
    level = (torch.arange(_QUANTILES, dtype=torch.float64) + 0.5) / _QUANTILES
    magnitude = -(1 - level).log()
    scale = torch.cat([profile.scale[side] for side in SIDES]).double()
    total = 0.0
    for part in scale.split(_CHUNK):
        values = part[:, None] * magnitude
        total += float((values - (values / step + ROUNDING).floor() * step).square().mean(1).sum())
    return total / profile.elements_per_token


def _live_error(profile: Profile, bits: float) -> float:
    total = 0.0
    for place, pair in enumerate(profile.live_codes(bits)):
        for side, code in zip(SIDES, pair):
            deviation = profile.live[side][place].deviation.double()
            total += float((deviation.square() * profile.curve.error.double()[code.bits]).sum())
    return total / profile.elements_per_token


def layer_bits(profile: Profile, bits: float, mode: Literal["live", "storage"]) -> list[tuple[int, float, float]]:
    """(layer, bits of a key element, bits of a value element) of the coded tokens, as calibrated.

    A live cache codes each layer by itself, so these are its fixed widths. A storage cache codes coefficients that span layers;
    each coefficient's expected bits are given to the layers by the energy that it puts in them.
    """
    if mode == "live":
        sides = [[code.layout.bits_per_token / len(code.bits) for code in own] for own in zip(*profile.live_codes(bits))]
    else:
        sides = [_storage_shares(profile, bits, side) for side in SIDES]
    return [(layer, float(key), float(value)) for layer, key, value in zip(profile.spec.layers, *sides)]


def _storage_shares(profile: Profile, bits: float, side: str) -> list[float]:
    tree, scale, step = profile.trees[side], profile.scale[side], profile.step(bits)
    classes = classify(scale, step)
    spent = profile.quantiser.entropy[classes.table] + classes.shift
    counts = [heads * tree.width for heads in profile.spec.heads]
    total = torch.zeros(len(counts), dtype=torch.float64)
    for component, cost in zip(classes.active.split(_ROWS), spent.split(_ROWS)):
        unit = torch.zeros(len(component), tree.components)
        unit[torch.arange(len(component)), component] = 1.0
        squares = (tree.synthesise(unit) - tree.mean.float()).square()
        energy = torch.stack([part.sum(1) for part in squares.split(counts, 1)], 1).double()
        total += (energy / energy.sum(1, keepdim=True).clamp_min(1e-30) * cost[:, None]).sum(0)
    return [float(part) / count for part, count in zip(total, counts)]

"""Our own methods as benchmarks run them: ``tnc.compress``, the cache codecs, and ``tnc.search``."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from tensornet_compress.bench.cache_case import CACHE_METHODS, CacheCase, CacheCoder, States
from tensornet_compress.bench.peer_packages import Unavailable
from tensornet_compress.bench.registry import Method
from tensornet_compress.bench.search_case import SEARCH_METHODS, SearchCase, Stored
from tensornet_compress.bench.weight_case import WEIGHT_METHODS, Compressed, WeightCase
from tensornet_compress.coding.planes import UNIT
from tensornet_compress.compressing import Budget, compress, survey_model
from tensornet_compress.kv.storage.codec import BlockCodec, JointCodec
from tensornet_compress.kv.storage.sequence_codec import FreeCodec
from tensornet_compress.report import Spectrum
from tensornet_compress.report.made import drawing_of, drawings_of
from tensornet_compress.searching import search

QUICK_SWEEPS, FULL_SWEEPS = 0, 1


def compressed(method: Any, effort: Any, case: WeightCase, bits: float) -> Compressed:
    """Survey once for each kind of forms, allocate for ``bits``, replace."""
    # By name: entropy-coded integers would take embeddings and heads too.
    options: dict[str, Any] = {"targets": [target.name for target in case.targets], "method": method, "workers": case.workers}
    key = ("survey", method)
    if key not in case.memo:
        sweeps = QUICK_SWEEPS if case.quick else FULL_SWEEPS
        case.memo[key] = survey_model(case.model, case.batches, sweeps=sweeps, **options)
    budget = Budget(bits_per_weight=bits)
    report = compress(case.model, budget, case.batches, survey=case.memo[key], effort=effort, **options)
    modules: dict[str, Any] = {target.name: case.model.get_submodule(target.name) for target in case.targets}
    return case.read_back(
        {layer.name: layer.family for layer in report.layers},
        note="; ".join(report.notes),
        settings={"metric": report.metric, "allocator": report.allocator, "effort": effort, "seconds": report.seconds},
        drawings=drawings_of({name: module.spec for name, module in modules.items()}),
    )


for _name, _method, _effort, _explanation in (
    ("ours", "auto", "default", "entropy-coded integers and two cores of such, one step for everything"),
    ("ours-max", "auto", "max", "the same, fitted behind the compressed layers before"),
    ("ours-coded", "coded", "default", "entropy-coded integers, one step for all layers"),
    ("ours-dense", "dense", "default", "one core a layer in stepped integers, at one multiplier"),
    ("ours-svd", "svd", "default", "two cores a layer in stepped formats"),
    ("ours-tt", "tt", "default", "a tensor train a layer in stepped formats"),
    ("ours-ttm", "ttm", "default", "a TT-matrix a layer in stepped formats"),
    ("ours-sorted", "sorted", "default", "EinSort: sorted rows with ties, the order entropy-coded"),
    ("ours-tree", "tree", "default", "a balanced tree a layer in stepped formats"),
):
    WEIGHT_METHODS.add(Method(_name, partial(compressed, _method, _effort), _explanation, ours=True))


def stored(form: str, codec: BlockCodec, profile_nbytes: int = 0) -> CacheCoder:
    """A storage codec on a block."""

    def recode(keys: States, values: States, positions: Tensor) -> tuple[States, States, float]:
        payload = codec.encode(keys, values)
        return *codec.decode(payload), 8 * payload.nbytes / sum(t.numel() for t in (*keys, *values))

    return CacheCoder(form, recode, profile_nbytes)


def storage(case: CacheCase, bits: float) -> CacheCoder:
    """The tree over all layers."""
    return stored(f"ours, storage {bits:g} b", JointCodec(case.profile, bits), case.profile.nbytes)


def free(case: CacheCase, bits: float) -> CacheCoder:
    """Without calibration."""
    return stored(f"ours, no calibration {bits:g} b", FreeCodec(bits))


def live(case: CacheCase, bits: float) -> CacheCoder:
    """Fixed-rate codes that attention contracts with, rotary positions on; the last tokens that do not fill a unit are coded
    alone."""
    profile, rotary = case.profile, case.rotary
    codes = profile.live_codes(bits)
    channels = [heads * profile.spec.key.width for heads in profile.spec.heads]
    spent = [(key.layout.bits_per_token, value.layout.bits_per_token) for key, value in codes]

    def coded(code: Any, states: Tensor) -> Tensor:
        tokens = states.shape[1]
        whole = torch.nn.functional.pad(states, (0, 0, 0, -tokens % UNIT))[None]
        decoded: Tensor = code.decode(code.encode(whole))[0, :, :tokens]
        return decoded

    def recode(keys: States, values: States, positions: Tensor) -> tuple[States, States, float]:
        turned = [coded(code, rotary.rotate(key, positions)) for (code, _), key in zip(codes, keys)]
        decoded = [coded(code, value) for (_, code), value in zip(codes, values)]
        return [rotary.unrotate(key, positions) for key in turned], decoded, sum(map(sum, spent)) / (2 * sum(channels))

    layer_bits = [(key / count, value / count) for (key, value), count in zip(spent, channels)]
    return CacheCoder(f"ours, live {bits:g} b", recode, profile.nbytes, layer_bits)


for _name, _make, _explanation in (
    ("ours-storage", storage, "tree over all layers and heads, entropy-coded"),
    ("ours-live", live, "one basis per layer, whole bits, contracted"),
    ("ours-free", free, "storage without any calibration"),
):
    CACHE_METHODS.add(Method(_name, _make, _explanation, ours=True))


def searched(case: SearchCase, error: float) -> Stored:
    """Layout, order, topology, ranks and formats, with the null control; the spectrum of the widest cut before and after."""
    result = search(case.tensor, max_error=error, time_budget=case.seconds, seed=case.seed)
    before, after = result.spectra.get("native"), result.spectra.get("best")
    both = bool(before and after)
    return Stored(
        result.best.nbytes,
        result.error,
        result.reason if result.finished else f"{result.reason}; the time budget ended the search before its end",
        {"gain": result.gain} | ({} if result.null is None else {"null_gain": result.null.gain}),
        {"family": result.choice.family, "ordered": result.choice.ordered, "finished": result.finished},
        (drawing_of(result.choice.describe(), result.best.spec),),
        (Spectrum(title="widest cut", before=tuple(before or ()), after=tuple(after or ())),) if both else (),
    )


def dense(case: SearchCase, error: float) -> Stored:
    """One core in the cheapest number format that keeps the error."""
    result = search(case.tensor, max_error=error, topologies=("dense",), orderings=(), null=False, time_budget=case.seconds)
    kept = [network for network in result.found if network.error <= error]
    if not kept:
        raise Unavailable("no number format keeps the error")
    best = min(kept, key=lambda network: network.nbytes)
    return Stored(best.nbytes, best.error, settings={"format": best.network.spec.describe()})


SEARCH_METHODS.add(Method("ours", searched, "searched layout, order, topology, ranks and formats", ours=True))
SEARCH_METHODS.add(Method("dense", dense, "one core in the cheapest number format that keeps the error"))

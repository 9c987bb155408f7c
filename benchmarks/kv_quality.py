"""Quality of a cache at equal bits: ours in both modes against peers (issue: storage and live tables).

Protocol: a context of 1024 tokens; 4 sinks and the last 64 tokens stay exact; everything between is coded; then 128 tokens are
read with the coded cache, a natural continuation and a verbatim copy of a far span. All payload bits are counted; what
calibration learned is stated once, beside the table.

    python benchmarks/kv_quality.py --profile FOLDER [--documents 8] [--domain wikipedia|pydoc]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kv_common as common
import torch
from kv_peers import Kivi, Pca, Peer, PerToken, SequenceSvd, SequenceTrain, SequenceTucker, States, TurboQuant
from safetensors.torch import load_file, save_file
from torch import Tensor

import tensornet_compress.kv as kv
from tensornet_compress.kv.capture import Runner, windows
from tensornet_compress.kv.codec import BlockCodec
from tensornet_compress.kv.free import FreeCodec
from tensornet_compress.kv.joint import JointCodec
from tensornet_compress.kv.moments import SideMoments, side_rows
from tensornet_compress.kv.planes import UNIT
from tensornet_compress.kv.rope import Rotary

BODY = slice(common.SINKS, common.CONTEXT - common.WINDOW)
RATES = (4.0, 3.0, 2.0, 1.5, 1.25, 1.0)


class Storage:
    """Our storage codec (or the calibration-free one) on the body."""

    def __init__(self, name: str, codec: BlockCodec):
        self.name, self.codec = name, codec

    def recode(self, keys: States, values: States, positions: Tensor) -> tuple[States, States, float]:
        """See ``kv_peers.Peer``."""
        payload = self.codec.encode(keys, values)
        decoded = self.codec.decode(payload)
        return *decoded, 8 * payload.nbytes / sum(t.numel() for t in (*keys, *values))


class Live:
    """Our live codes on the body, rotary positions on; the last tokens that do not fill a unit are coded alone."""

    def __init__(self, profile: kv.Profile, bits: float, rotary: Rotary):
        self.name, self.rotary = f"ours, live {bits:g} b", rotary
        self.codes = profile.live_codes(bits)

    def recode(self, keys: States, values: States, positions: Tensor) -> tuple[States, States, float]:
        """See ``kv_peers.Peer``."""
        out_keys, out_values = [], []
        tokens = keys[0].shape[1]
        padded = -(-tokens // UNIT) * UNIT
        for (key_code, value_code), key, value in zip(self.codes, keys, values):
            for code, states, target in (
                (key_code, self.rotary.rotate(key, positions), out_keys),
                (value_code, value, out_values),
            ):
                whole = torch.nn.functional.pad(states, (0, 0, 0, padded - tokens))[None]
                target.append(code.decode(code.encode(whole), 0, padded // UNIT)[0, :, :tokens])
        spent = sum(a.layout.bits_per_token + b.layout.bits_per_token for a, b in self.codes)
        elements = sum(k.shape[0] * k.shape[2] for k in (*keys, *values))
        return [self.rotary.unrotate(k, positions) for k in out_keys], out_values, spent / elements


class Stock:
    """transformers ``QuantizedCache`` layers (quanto or hqq), groups of 64, on rotated keys."""

    def __init__(self, backend: str, bits: int, rotary: Rotary):
        from transformers.cache_utils import HQQQuantizedLayer, QuantoQuantizedLayer

        self.name, self.bits, self.rotary = f"QuantizedCache {backend} int{bits}", bits, rotary
        if backend == "hqq":
            self.layer: Any = HQQQuantizedLayer(nbits=bits, axis_key=1, axis_value=1)
        else:
            self.layer = QuantoQuantizedLayer(nbits=bits)

    def _recode(self, x: Tensor, axis: int) -> Tensor:
        self.layer.keys = x
        return self.layer._dequantize(self.layer._quantize(x[None].contiguous(), axis=axis))[0].float()

    def recode(self, keys: States, values: States, positions: Tensor) -> tuple[States, States, float]:
        """See ``kv_peers.Peer``."""
        axis = self.layer.axis_key
        out = [self.rotary.unrotate(self._recode(self.rotary.rotate(k, positions), axis), positions) for k in keys]
        return out, [self._recode(v, self.layer.axis_value) for v in values], self.bits + 32 / 64


def calibrated_moments(model: Any, tokenizer: Any, file: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Plain means and covariances over all layers, for the calibrated peers; same windows as our profile. Kept in ``file``."""
    if file.exists():
        stored = load_file(file)
        return {side: (stored[f"{side}.mean"], stored[f"{side}.covariance"]) for side in ("key", "value")}
    moments: dict[str, SideMoments] = {}
    with Runner(model) as runner:
        for window in windows(common.calibration_windows(tokenizer).split(1)):
            for captured in runner.capture(window):
                for side, rows in side_rows(captured, common.SINKS).items():
                    moments.setdefault(side, SideMoments(rows.shape[1])).add(rows)
    made = {side: (found.mean(), found.covariance()) for side, found in moments.items()}
    save_file({f"{s}.{n}": t for s, pair in made.items() for n, t in zip(("mean", "covariance"), pair)}, file)
    return made


def contenders(
    model: Any, tokenizer: Any, profile: kv.Profile, rotary: Rotary, which: set[str], moments_file: Path
) -> Iterator[Peer]:
    """Everything in the table, ours first."""
    width = profile.trees["key"].width
    if "ours" in which:
        for bits in RATES:
            yield Storage(f"ours, storage {bits:g} b", JointCodec(profile, bits))
        for bits in RATES:
            yield Live(profile, bits, rotary)
    if "free" in which:
        for bits in (3.0, 2.0):
            yield Storage(f"ours, no calibration {bits:g} b", FreeCodec(bits))
    if "simple" in which:
        for bits in (4, 3, 2):
            yield Kivi(bits, rotary)
        for bits in (4, 3):
            yield PerToken(bits, rotary)
        for bits in (4, 3, 2):
            yield TurboQuant(bits, rotary, width)
    if "stock" in which:
        for bits in (4, 2):
            yield Stock("quanto", bits, rotary)
        for bits in (4, 2):
            yield Stock("hqq", bits, rotary)
    if "svd" in which:
        for bits in (4.0, 2.0):
            yield SequenceSvd(bits)
            yield SequenceTrain(bits)
            yield SequenceTucker(bits)
    if "pca" in which:
        moments = calibrated_moments(model, tokenizer, moments_file)
        layer = dict.fromkeys(moments, width * profile.spec.heads[0])
        whole = {side: len(mean) for side, (mean, _) in moments.items()}
        for bits in RATES:
            yield Pca("all layers PCA (KVTC-like)", moments, whole, bits, profile.curve)
        for bits in (3.0, 2.0, 1.25):
            yield Pca("per-layer PCA (KVTC-like)", moments, layer, bits, profile.curve)


def measure(model: Any, peer: Peer, documents: list[common.Document]) -> dict[str, Any]:
    """One row of the table: means over documents."""
    found: dict[str, list[dict[str, float]]] = {"natural": [], "copy": []}
    spent, seconds = [], 0.0
    positions = torch.arange(common.CONTEXT)[BODY]
    for document in documents:
        began = time.perf_counter()
        keys, values, bits = peer.recode([k[:, BODY] for k in document.keys], [v[:, BODY] for v in document.values], positions)
        seconds += time.perf_counter() - began
        spent.append(bits)
        whole = [
            [torch.cat([x[:, : BODY.start], y, x[:, BODY.stop :]], 1) for x, y in zip(exact, coded)]
            for exact, coded in ((document.keys, keys), (document.values, values))
        ]
        for name, (log_probability, attention) in common.read_on(model, whole[0], whole[1], document.continuations).items():
            found[name].append(common.compare(document, name, log_probability, attention))
    row: dict[str, Any] = {
        "method": peer.name,
        "bits": statistics.mean(spent),
        "seconds_per_document": seconds / len(documents),
    }
    for name, results in found.items():
        row[name] = {key: statistics.mean(r[key] for r in results) for key in results[0]}
    return row


def main() -> None:
    """Measure and write ``results/kv_quality[_DOMAIN]_PART.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", required=True, help="folder of a profile; made there when missing")
    parser.add_argument("--documents", type=int, default=8)
    parser.add_argument("--domain", choices=["wikipedia", "pydoc"], default="wikipedia")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--parts", nargs="+", default=["ours", "free", "simple", "stock", "svd", "pca"])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model, tokenizer = common.model_and_tokenizer()
    profile = common.profile(model, tokenizer, options.profile)
    length = common.CONTEXT + common.AHEAD
    texts = common.heldout_ids if options.domain == "wikipedia" else common.second_domain_ids
    documents = common.documents(model, texts(tokenizer, length, options.documents))
    with Runner(model) as runner:
        rotary = runner.recorder.rotary(runner.style)  # type: ignore[union-attr, arg-type]
    rows = []
    model_bytes = 2 * sum(p.numel() for p in model.parameters())
    for peer in contenders(
        model, tokenizer, profile, rotary, set(options.parts), Path(options.profile) / "moments.safetensors"
    ):
        rows.append(measure(model, peer, documents))
        last = rows[-1]
        print(
            f"{last['method']:38s} {last['bits']:.3f} b  natural {last['natural']['kl']:.5f}  copy {last['copy']['kl']:.5f}  "
            f"top-1 {last['natural']['top1']:.3f}/{last['copy']['top1']:.3f}",
            flush=True,
        )
        common.write(
            f"kv_quality_{options.domain}_{'_'.join(options.parts)}",
            {
                "model": common.MODEL,
                "documents": options.documents,
                "context": common.CONTEXT,
                "coded_tokens": BODY.stop - BODY.start,
                "profile_nbytes": profile.nbytes,
                "profile_share_of_bf16_model": profile.nbytes / model_bytes,
                "profile_numbers": profile.numbers,
                "full_joined_basis_numbers": profile.full_basis_numbers,
                "rows": rows,
            },
        )


if __name__ == "__main__":
    main()

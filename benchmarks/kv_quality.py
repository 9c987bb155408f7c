"""Quality of a cache at equal bits: ours in both modes against peers (issue: storage and live tables).

Protocol: a context of 1024 tokens; 4 sinks and the last 64 tokens stay exact; everything between is coded; then 128 tokens are
read with the coded cache, a natural continuation and a verbatim copy of a far span. All payload bits are counted; what
calibration learned is stated once, beside the table.

    python benchmarks/kv_quality.py [--profile FOLDER] [--documents 8] [--domain wikipedia|pydoc] [--resume]

The stock quantised caches need ``make peers`` and ``PYTHONPATH=.peers``; without them they are reported as skipped.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import kv_common as common
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import tensornet_compress.kv as kv
from tensornet_compress.bench.cache_case import CachePeer as Peer
from tensornet_compress.bench.ours.caches import Live, Storage
from tensornet_compress.bench.peers.caches.kvtc import Pca
from tensornet_compress.bench.peers.caches.rounding import Kivi, PerToken
from tensornet_compress.bench.peers.caches.sequence import SequenceSvd, SequenceTrain, SequenceTucker
from tensornet_compress.bench.peers.caches.stock import Stock
from tensornet_compress.bench.peers.caches.turboquant import TurboQuant
from tensornet_compress.bench.side import Unavailable
from tensornet_compress.kv.profile.capture import Runner, windows
from tensornet_compress.kv.profile.moments import SideMoments, side_rows
from tensornet_compress.kv.rope import Rotary
from tensornet_compress.kv.storage.codec import BlockCodec, JointCodec
from tensornet_compress.kv.storage.sequence_codec import FreeCodec

BODY = slice(common.SINKS, common.CONTEXT - common.WINDOW)
RATES = (4.0, 3.0, 2.0, 1.5, 1.25, 1.0)
PARTS = ("ours", "free", "simple", "stock", "sequence", "pca")


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
) -> Iterator[tuple[str, Callable[[], Peer]]]:
    """Everything in the table, ours first: the name and how to make it."""
    width = profile.trees["key"].width
    if "ours" in which:
        for bits in RATES:
            yield f"ours, storage {bits:g} b", partial(storage, bits, JointCodec, profile)
        for bits in RATES:
            yield f"ours, live {bits:g} b", partial(Live, profile, bits, rotary)
    if "free" in which:
        for bits in (3.0, 2.0):
            yield f"ours, no calibration {bits:g} b", partial(storage, bits, FreeCodec)
    if "simple" in which:
        made: list[Peer] = [Kivi(bits, rotary) for bits in (4, 3, 2)]
        made += [PerToken(bits, rotary) for bits in (4, 3, 2)]
        made += [TurboQuant(bits, rotary, width) for bits in (4, 3, 2, 1)]
        for peer in made:
            yield peer.name, partial(_same, peer)
    if "stock" in which:
        for backend in ("quanto", "hqq"):
            for bits in (4, 2):
                yield f"QuantizedCache {backend} int{bits}", partial(Stock, backend, bits, rotary)
    if "sequence" in which:
        for kind in (SequenceSvd, SequenceTrain, SequenceTucker):
            for bits in (4.0, 2.0):
                yield kind(bits).name, partial(kind, bits)
    if "pca" in which:
        moments = calibrated_moments(model, tokenizer, moments_file)
        layer = dict.fromkeys(moments, width * profile.spec.heads[0])
        whole = {side: len(mean) for side, (mean, _) in moments.items()}
        for label, span in (("all layers PCA (KVTC-like)", whole), ("per-layer PCA (KVTC-like)", layer)):
            for bits in RATES:
                yield f"{label} {bits:g} b", partial(Pca, label, moments, span, bits, profile.curve)


def storage(bits: float, codec: Callable[..., BlockCodec], *profile: kv.Profile) -> Storage:
    """Our storage codec, with a profile or without."""
    return Storage("", codec(*profile, bits))


def _same(peer: Peer) -> Peer:
    return peer


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
        "bits": statistics.mean(spent),
        "seconds_per_document": seconds / len(documents),
    }
    for name, results in found.items():
        row[name] = {key: statistics.mean(r[key] for r in results) for key in results[0]}
    return row


def main() -> None:
    """Measure and write ``results/kv_quality[_DOMAIN]_PART.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", default=common.PROFILE, help="folder of a profile; made there when missing")
    parser.add_argument("--documents", type=int, default=8)
    parser.add_argument("--domain", choices=["wikipedia", "pydoc"], default="wikipedia")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--resume", action="store_true", help="keep the rows of the result file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model, tokenizer = common.model_and_tokenizer()
    profile = common.profile(model, tokenizer, options.profile)
    length = common.CONTEXT + common.AHEAD
    texts = common.heldout_ids if options.domain == "wikipedia" else common.second_domain_ids
    documents = common.documents(model, texts(tokenizer, length, options.documents))
    with Runner(model) as runner:
        rotary = runner.recorder.rotary(runner.style)  # type: ignore[union-attr, arg-type]
    stored = common.RESULTS / f"kv_quality_{options.domain}.json"
    rows: list[dict[str, Any]] = json.loads(stored.read_text())["rows"] if options.resume and stored.exists() else []
    model_bytes = 2 * sum(p.numel() for p in model.parameters())
    moments_file = Path(options.profile) / "moments.safetensors"
    for name, make in contenders(model, tokenizer, profile, rotary, set(options.parts), moments_file):
        if any(row["method"] == name and "skipped" not in row for row in rows):
            continue
        rows = [row for row in rows if row["method"] != name]
        try:
            peer = make()
        except (ImportError, Unavailable) as error:
            rows.append({"method": name, "skipped": str(error)})
            print(f"{name:38s} skipped: {error}", flush=True)
        else:
            rows.append({"method": name} | measure(model, peer, documents))
            last = rows[-1]
            print(
                f"{name:38s} {last['bits']:.3f} b  natural {last['natural']['kl']:.5f}  copy {last['copy']['kl']:.5f}  "
                f"top-1 {last['natural']['top1']:.3f}/{last['copy']['top1']:.3f}",
                flush=True,
            )
        common.write(
            f"kv_quality_{options.domain}",
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

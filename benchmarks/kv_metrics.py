"""Which metric should weigh errors of a cache: Fisher information, what queries see, or none? At equal bits, in both modes.

    python benchmarks/kv_metrics.py [--profile FOLDER] [--documents 4] [--resume]

Every metric calibrates on the same windows with the defaults of ``kv.calibrate``; the Fisher profile is that of the other
KV benchmarks. Protocol and documents are those of ``kv_quality.py``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from time import process_time
from typing import Any

import kv_common as common
import torch
from kv_quality import Live, measure, storage

import tensornet_compress.kv as kv
from tensornet_compress.kv.profile.capture import Runner
from tensornet_compress.kv.storage.codec import JointCodec

METRICS = ("fisher", "queries", "euclidean")
RATES = (2.0, 1.25)


def calibrated(model: Any, tokenizer: Any, metric: Any, folder: Path) -> tuple[kv.Profile, float | None]:
    """The profile of a metric, and the processor seconds it took if it was made now."""
    if (folder / "profile.json").exists():
        return kv.Profile.load(folder), None
    began = process_time()
    found = kv.calibrate(model, common.calibration_windows(tokenizer).split(1), metric=metric)
    seconds = process_time() - began
    found.save(folder)
    return found, seconds


def main() -> None:
    """Measure and write ``results/kv_metrics.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", default=common.PROFILE, help="folder of the Fisher profile; others lie beside it")
    parser.add_argument("--documents", type=int, default=4)
    parser.add_argument("--resume", action="store_true", help="keep the rows of the result file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = common.model_and_tokenizer()
    documents = common.documents(model, common.heldout_ids(tokenizer, common.CONTEXT + common.AHEAD, options.documents))
    with Runner(model) as runner:
        rotary = runner.rotary()
    assert rotary is not None
    stored = common.RESULTS / "kv_metrics.json"
    rows: list[dict[str, Any]] = json.loads(stored.read_text())["rows"] if options.resume and stored.exists() else []
    for metric in METRICS:
        folder = Path(options.profile)
        if metric != "fisher":
            folder = folder.with_name(f"{folder.name}_{metric}")
        profile, seconds = calibrated(model, tokenizer, metric, folder)
        for mode in ("storage", "live"):
            for bits in RATES:
                key = {"metric": metric, "mode": mode, "budget": bits}
                if any(all(row[name] == value for name, value in key.items()) for row in rows):
                    continue
                peer: Any = storage(bits, JointCodec, profile) if mode == "storage" else Live(profile, bits, rotary)
                rows.append(key | {"calibration_processor_seconds": seconds} | measure(model, peer, documents))
                last = rows[-1]
                print(f"{key} natural {last['natural']['kl']:.5f} copy {last['copy']['kl']:.5f}", flush=True)
                common.write("kv_metrics", {"model": common.MODEL, "documents": options.documents, "rows": rows})


if __name__ == "__main__":
    main()

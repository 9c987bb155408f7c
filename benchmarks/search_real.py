"""Real tensors: bytes at equal error of the usual formats, of TTNOpt's tree, and of the search.

    PYTHONPATH=.peers python benchmarks/search_real.py [--errors 0.1 0.3] [--budget 30]

Every row chooses among the same number formats (4, 6 and 8 bit integers, bf16, fp32; ``dense`` also 2, 3 and 5 bits) and
ranks by the same rule. SVD cuts axes; TT and the balanced tree (HT) take the digits of the axes in native order; TTNOpt takes
the same digits, its tree is given our ranks and formats, and it is left out, with the reason, above 65,536 entries, where its
four-legged tensors take hours. What is not ``measured`` is predicted from spectra: more than 1.3 times the dense size.
"""

from __future__ import annotations

import argparse
import json
from time import perf_counter
from typing import Any

from common import MODEL, RESULTS, write_result

import tensornet_compress as tnc
from tensornet_compress.bench.peers.search.native import peer
from tensornet_compress.bench.peers.search.ttnopt import smallest
from tensornet_compress.bench.tensors import BLOCK, LAYER, TENSORS
from tensornet_compress.errors import MissingExtraError

PEERS = {"SVD": "svd", "TT, native order": "tt", "HT, balanced": "tree"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--errors", type=float, nargs="+", default=[0.1, 0.3])
    parser.add_argument("--budget", type=float, default=30.0, help="seconds for a search, null control included")
    parser.add_argument("--only", nargs="+", default=[""], help="tensors whose names hold one of these; other rows stay")
    arguments = parser.parse_args()
    path = RESULTS / "search_real.json"
    rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    cases = []
    for entry in TENSORS:
        try:
            cases.append((entry.title, entry.load()))
        except MissingExtraError as error:
            print(f"{entry.title}: {error}", flush=True)
    for error in arguments.errors:
        for name, tensor in cases:
            if not any(part in name for part in arguments.only):
                continue
            limit = error / 10 if "field" in name else error
            began = perf_counter()
            result = tnc.search(tensor, max_error=limit, time_budget=arguments.budget)
            seconds = perf_counter() - began
            assert result.null is not None
            row: dict[str, Any] = {"tensor": name, "shape": list(tensor.shape), "error": limit}
            row["dense"] = min(f.nbytes for f in result.found if f.family == "dense" and f.error <= limit)
            row |= {label: peer(tensor, family, limit) for label, family in PEERS.items()}
            row["TTNOpt's tree"] = smallest(tensor, limit)
            row["ours"] = {"nbytes": result.best.nbytes, "family": result.choice.family, "ordered": result.choice.ordered}
            row["ours"] |= {"error": result.error, "seconds": seconds, "finished": result.finished}
            row["gain"], row["null_gain"] = result.gain, result.null.gain
            others = [row["dense"], *(row[label]["nbytes"] for label in (*PEERS, "TTNOpt's tree") if "nbytes" in row[label])]
            row["ours_over_best"] = row["ours"]["nbytes"] / min(others)
            rows = [r for r in rows if (r["tensor"], r["error"]) != (name, limit)] + [row]
            names = [other for other, _ in cases]
            rows = sorted((r for r in rows if r["tensor"] in names), key=lambda r: (names.index(r["tensor"]), r["error"]))
            print(row, flush=True)
            settings = {"model": MODEL, "layer": LAYER, "block": BLOCK, "budget": arguments.budget}
            write_result("search_real", {"settings": settings, "rows": rows})


if __name__ == "__main__":
    main()

"""Is the GPTQ baseline healthy? Its options one by one on SmolLM2-135M, judged on validation windows (never on held-out ones).

python benchmarks/geometry_gptq.py [--resume]
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, replace
from time import process_time
from typing import Any

import torch
from common import LENGTH, MODEL
from geometry_common import CALIBRATION, VALIDATION, Language, Rows, qualities
from geometry_peers import GPTQ, quantise_model

DEFAULT = GPTQ("int4g64z")
REFERENCE = replace(DEFAULT, act_order=False, static_groups=False)
VARIANTS: dict[str, tuple[GPTQ, int]] = {
    "act order, static groups": (DEFAULT, CALIBRATION),
    "column order, groups refreshed": (REFERENCE, CALIBRATION),
    "column order, refreshed, 4 windows": (REFERENCE, 4),
    "column order, refreshed, not sequential": (replace(REFERENCE, sequential=False), CALIBRATION),
    "act order, mse grids": (replace(DEFAULT, mse=True), CALIBRATION),
    "act order, symmetric": (replace(DEFAULT, fmt="int4g64"), CALIBRATION),
    "act order, offsets": (replace(DEFAULT, fmt="int4g64o"), CALIBRATION),
    "act order, damping 1e-4": (replace(DEFAULT, damping=1e-4), CALIBRATION),
    "act order, first token left out": (replace(DEFAULT, skip_first=1), CALIBRATION),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--resume", action="store_true", help="keep the rows of the result file")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3])
    parser.add_argument("--only", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    arguments = parser.parse_args()
    language = Language.load()
    references = language.references(heldout=False)
    settings = {"model": MODEL, "length": LENGTH, "validation_windows": VALIDATION, "precision": "bfloat16 autocast"}
    rows = Rows("geometry_gptq", settings, arguments.resume)
    for label in arguments.only:
        for bits in arguments.bits:
            if rows.has(variant=label, bits=bits, windows=VARIANTS[label][1]):
                continue
            variant, windows = VARIANTS[label]
            variant = replace(variant, fmt=variant.fmt.replace("int4", f"int{bits}"))
            model: Any = language.model()
            weights = sum(p.numel() for n, p in model.named_parameters() if n.endswith("proj.weight"))
            started = process_time()
            nbytes = quantise_model(model, language.calibration[: windows // 4], variant, torch.bfloat16)
            seconds = process_time() - started
            quality = qualities(model, references)
            rows.add(
                variant=label,
                bits=bits,
                windows=windows,
                bits_per_weight=8 * nbytes / weights,
                seconds=seconds,
                gptq=asdict(variant),
                **quality,
            )


if __name__ == "__main__":
    main()

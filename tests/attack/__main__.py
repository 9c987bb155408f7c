"""The long form of the attack: ``python -m tests.attack --json FILE`` counts kills, damage and bad inputs in a ``Result``."""

from __future__ import annotations

import argparse
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter

from tensornet_compress.report import Measure, Result, Row, write_result
from tensornet_compress.report.made import this_machine
from tensornet_compress.version import __version__
from tests.attack.fuzz import fuzz
from tests.attack.inputs import inputs
from tests.attack.kills import kills

KINDS = {
    "kills": (kills, "Writers killed at file-system events and at random moments, then a reader and the next run."),
    "damaged files": (fuzz, "Files and folders with flipped bits, cut ends, wrong JSON and tensors, with and without hashes."),
    "bad inputs": (inputs, "Command lines that cannot work."),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True, help="the result file to write")
    parser.add_argument("--kills", type=int, default=400)
    parser.add_argument("--damaged-files", type=int, default=3200)
    parser.add_argument("--bad-inputs", type=int, default=None, help="all by default")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    rows: list[Row] = []
    measures: dict[str, Measure] = {}
    bad: list[str] = []
    began = perf_counter()
    for kind, (attack, explanation) in KINDS.items():
        with tempfile.TemporaryDirectory() as place:
            outcomes, told = attack(Path(place), getattr(asked, kind.replace(" ", "_")), asked.seed)
        values = {name.replace(" ", "_"): float(count) for name, count in outcomes.items()}
        values |= {"cases": float(outcomes.total()), "faults": float(len(told))}
        measures |= {name: Measure(title=name.replace("_", " "), role="other") for name in values}
        row = {"task": "speed", "subject": "attack", "method": kind, "ours": True, "note": explanation, "seed": asked.seed}
        rows.append(Row.model_validate(row | {"values": values}))
        print(kind, dict(outcomes), *told, sep="\n  ", flush=True)
        bad += told
    measures["faults"] = Measure(title="faults", better="lower", role="quality")
    result = Result(
        name="attack",
        command="make attack",
        version=__version__,
        made=datetime.now(UTC).isoformat(timespec="seconds"),
        machine=this_machine(),
        settings={"seconds_a_case": 10, "nbytes_a_case": 1 << 30},
        measures=measures,
        rows=tuple(rows),
        seconds=perf_counter() - began,
    )
    write_result(result, asked.json)
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()

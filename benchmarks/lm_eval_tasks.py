"""Does lm-eval measure on a compressed model what ``eval --suite`` does? Needs the extra ``lm-eval``.

The two tasks that come with the package, their first items, on SmolLM2 as it is and in integers of 4.5 bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from experiments import LANGUAGE, experiment

import tensornet_compress as tnc
from tensornet_compress.bench.harness import Job
from tensornet_compress.evaluate import Suite
from tensornet_compress.inputs import agreement_pairs, last_words, load_causal_lm, load_tokenizer
from tensornet_compress.integrations.lm_eval_tasks import find_tasks, run_tasks
from tensornet_compress.report import Measure

ITEMS = 60
TASKS = {"last_words": "tensornet_last_words", "agreement": "tensornet_agreement"}
MEASURES = {
    f"{name}{by}": Measure(title=f"{name.replace('_', ' ')}, {title}", better="higher")
    for name in TASKS
    for by, title in (("_lm_eval", "lm-eval"), ("", "our suite"))
}


def row(bits: float | None) -> dict[str, Any]:
    model, tokenizer = load_causal_lm(LANGUAGE), load_tokenizer(LANGUAGE)
    if bits is not None:
        tnc.compress(model, tnc.Budget(bits_per_weight=bits), allocator="energy", method="dense", workers=1)
    found = run_tasks(model, tokenizer, find_tasks(list(TASKS.values())), ITEMS)
    values = {f"{name}_lm_eval": found[f"{task}.acc"] for name, task in TASKS.items()}
    return {"values": values | Suite({}, last_words(ITEMS), agreement_pairs()[:ITEMS]).measure(model, tokenizer)}


def jobs() -> Iterator[Job]:
    yield Job("weights", "SmolLM2", "dense", partial(row, None))
    yield Job("weights", "SmolLM2", "compressed", partial(row, 4.5), 4.5, "bits/weight", ours=True)


if __name__ == "__main__":
    experiment(jobs(), MEASURES, {"model": LANGUAGE, "items": ITEMS})

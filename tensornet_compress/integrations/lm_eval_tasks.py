"""Tasks of lm-eval on a model in memory, and the zero-shot sets of this package as such tasks (``tasks/*.yaml``)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tensornet_compress.errors import MissingExtraError, TensorNetError
from tensornet_compress.inputs import agreement_pairs, last_words
from tensornet_compress.nn import decoded

TASKS = Path(__file__).parent / "tasks"
"""Files of the tasks that come with the package; a task is named like its file."""


def find_tasks(names: Sequence[str]) -> list[Any]:
    """Tasks of lm-eval, loaded with their data.

    Args:
        names: names that lm-eval knows, ours (``tensornet_last_words``, ``tensornet_agreement``), or files of tasks; such a
            file may name Python functions beside it, which are run.

    Raises:
        MissingExtraError: lm-eval is not installed.
        TensorNetError: a task that is unknown or cannot be loaded.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise MissingExtraError(
            f"tasks are run by lm-eval ({error}); run: python -m pip install 'tensornet-compress[lm-eval]'"
        ) from error
    ours = {path.stem: str(path) for path in TASKS.glob("*.yaml")}
    theirs = [name for name in names if name not in ours and not Path(name).is_file()]
    # Reading the list of all that lm-eval knows takes a while.
    manager = TaskManager(include_defaults=bool(theirs))
    unknown = [name for name in theirs if not manager.match_tasks([name])]
    if unknown:
        raise TensorNetError(f"no task or file is named {unknown[0]!r}; lm-eval ls tasks lists its own, ours are {[*ours]}")
    try:
        return list(manager.load([ours.get(name, name) for name in names])["tasks"].values())
    except Exception as error:  # A file may be anything, and its data anywhere.
        raise TensorNetError(f"lm-eval cannot load {list(names)}: {type(error).__name__}: {error}") from error


def run_tasks(model: Any, tokenizer: Any, tasks: Sequence[Any], limit: int | None = None, batch: int = 8) -> dict[str, float]:
    """What lm-eval measures on tasks that ``find_tasks`` gave: ``{"TASK.METRIC": value}``.

    ``model``, ``tokenizer``: a causal language model of transformers, compressed or not; compressed layers are held decoded
    meanwhile. ``limit``: only the first so many items of each task. ``batch``: items at once.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    with decoded(model):
        language = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch)
        found = simple_evaluate(language, tasks=list(tasks), limit=limit, log_samples=False, bootstrap_iters=0)
    return {
        f"{task}.{metric.removesuffix(',none').replace(',', '.')}": float(value)
        for task, measured in found["results"].items()
        for metric, value in measured.items()
        if isinstance(value, int | float) and "," in metric and "stderr" not in metric
    }


def last_word_documents(**_: Any) -> dict[str, Any]:
    """Passages and their last words, as lm-eval takes documents."""
    return _documents([{"context": context, "word": word} for context, word in last_words()])


def agreement_documents(**_: Any) -> dict[str, Any]:
    """Minimal pairs, as lm-eval takes documents."""
    return _documents([{"context": context, "choices": [right, wrong]} for context, right, wrong in agreement_pairs()])


def _documents(rows: list[dict[str, Any]]) -> dict[str, Any]:
    from datasets import Dataset  # comes with lm-eval

    return {"test": Dataset.from_list(rows)}

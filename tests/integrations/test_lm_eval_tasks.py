"""Tasks of lm-eval: the files that come with the package, what is said without lm-eval, and equal results with it."""

import json
import sys
from importlib import import_module
from types import SimpleNamespace

import pytest
import yaml
from typer.testing import CliRunner

import tensornet_compress as tnc
from tensornet_compress.cli.main import app
from tensornet_compress.errors import TensorNetError
from tensornet_compress.evaluate import Suite
from tensornet_compress.inputs import agreement_pairs, last_words
from tensornet_compress.integrations import lm_eval_tasks
from tests.models import batches, tiny_llama, tiny_tokenizer


class Loader(yaml.SafeLoader):
    """Gives the dotted name of a function."""


Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))


def documents(monkeypatch, file):
    """A task's file, and its documents as plain rows."""
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(Dataset=SimpleNamespace(from_list=list)))
    task = yaml.load(file.read_text(), Loader)
    module, _, function = task["custom_dataset"].rpartition(".")
    return task, getattr(import_module(module), function)()[task["test_split"]]


def test_files_of_tasks_name_fields_of_their_documents(monkeypatch):
    sets = {"tensornet_last_words": last_words(), "tensornet_agreement": agreement_pairs()}
    assert {file.stem for file in lm_eval_tasks.TASKS.iterdir()} == set(sets)
    for name, items in sets.items():
        task, rows = documents(monkeypatch, lm_eval_tasks.TASKS / f"{name}.yaml")
        assert task["task"] == name
        assert len(rows) == len(items)
        for row, (context, right, *wrong) in zip(rows, items):
            assert row[task["doc_to_text"].strip("{}")] == context
            if task["output_type"] == "multiple_choice":
                # A list of templates would be taken as it stands; the name of a field is not.
                assert row[task["doc_to_choice"]] == [right, *wrong]
                assert task["doc_to_target"] == 0
            else:
                assert row[task["doc_to_target"].strip("{}")] == right


def test_without_lm_eval_the_command_says_what_to_install(monkeypatch, llama_folder):
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    result = CliRunner().invoke(app, ["eval", str(llama_folder), "--tasks", "arc_easy"])
    assert result.exit_code == 2
    assert "tensornet-compress[lm-eval]" in result.output
    result = CliRunner().invoke(app, ["eval", str(llama_folder), "--task-limit", "3"])
    assert result.exit_code == 2
    assert "--task-limit belongs to --tasks" in result.output


def test_lm_eval_measures_what_the_suite_does(tmp_path):
    pytest.importorskip("lm_eval")
    words = ["bank", "tree", "river", "star", "road"]
    rows = [{"context": "the old " + one, "choices": [f" {one}", f" {words[i - 1]}"]} for i, one in enumerate(words)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = {
        "task": "own_pairs", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{context}}", "doc_to_choice": "choices",
        "doc_to_target": 0, "target_delimiter": "", "metric_list": [{"metric": "acc"}],
    }  # fmt: skip
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(task))
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    tnc.compress(model, tnc.Budget(bits_per_weight=6.5), batches(2), method="coded", workers=1)
    found = lm_eval_tasks.run_tasks(model, tokenizer, lm_eval_tasks.find_tasks([str(tmp_path / "own.yaml")]))
    suite = Suite({}, pairs=[(row["context"], *row["choices"]) for row in rows])
    assert found == {"own_pairs.acc": suite.measure(model, tokenizer)["agreement"]}
    with pytest.raises(TensorNetError, match="no task or file is named 'no_such_task'"):
        lm_eval_tasks.find_tasks(["no_such_task"])
    (tmp_path / "bad.yaml").write_text("task: bad\ndataset_path: json\n")
    with pytest.raises(TensorNetError, match="cannot load"):
        lm_eval_tasks.find_tasks([str(tmp_path / "bad.yaml")])

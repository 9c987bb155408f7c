from functools import partialmethod
from pathlib import Path
from shutil import rmtree
from threading import Thread
from types import SimpleNamespace

import pytest
import torch

import tensornet_compress as tnc
from tensornet_compress.errors import BudgetError, TensorNetError
from tensornet_compress.files.manifest import read_manifest
from tensornet_compress.files.steps import Steps
from tensornet_compress.files.whole import locked
from tests.architectures import inputs, sharp
from tests.models import batches, tiny_llama

BUDGET = tnc.Budget(bits_per_weight=5.0)
DATA = [batch[:1] for batch in batches(3)]


class PowerFailureError(BaseException):
    pass


@pytest.fixture
def source(tmp_path):
    tiny_llama(layers=2).save_pretrained(tmp_path / "large", max_shard_size="40KB")
    assert len(list((tmp_path / "large").glob("*.safetensors"))) > 1
    return tmp_path / "large"


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def small(source: Path, name: str = "small", **options) -> Path:
    target = source.parent / name
    tnc.compress_folder(source, target, BUDGET, DATA, **({"workers": 1} | options))
    return target


def test_a_folder_gives_the_bytes_of_a_model_in_memory(source):
    model = tiny_llama(layers=2)
    report = tnc.compress(model, BUDGET, DATA, workers=1)
    tnc.save(model, source.parent / "other", report=report)
    assert content(small(source)) == content(source.parent / "other")
    assert content(small(source, "two", workers=2)) == content(source.parent / "other")


def test_a_run_that_was_cut_off_anywhere_goes_on_to_the_same_bytes(source, monkeypatch):
    finish, finished = Steps.finish, []

    def recording(self, step, given, files=(), stop=None):
        if len(finished) == stop:
            raise PowerFailureError
        finish(self, step, given, files)
        finished.append(step)

    monkeypatch.setattr(Steps, "finish", recording)
    undisturbed, total = content(small(source, "whole")), finished.copy()
    assert len(total) > 25
    for stop in range(1, len(total), 9):
        finished.clear()
        monkeypatch.setattr(Steps, "finish", partialmethod(recording, stop=stop))
        with pytest.raises(PowerFailureError):
            small(source)
        assert not (source.parent / "small").exists()
        monkeypatch.setattr(Steps, "finish", recording)
        folder = small(source)
        # No step was taken twice.
        assert finished == total
        assert content(folder) == undisturbed
        assert sorted(path.name for path in source.parent.iterdir()) == ["large", "small", "whole"]
        rmtree(folder)


def test_another_setting_is_named_and_fresh_starts_over(source, monkeypatch):
    finish = Steps.finish

    def failing(self, step, given, files=()):
        if step == "metrics":
            raise PowerFailureError
        finish(self, step, given, files)

    monkeypatch.setattr(Steps, "finish", failing)
    with pytest.raises(PowerFailureError):
        small(source)
    monkeypatch.setattr(Steps, "finish", finish)
    with pytest.raises(TensorNetError, match=r"other settings \(options was .*coded.*fresh=True"):
        small(source, method="coded")
    assert content(small(source, method="coded", fresh=True)) != content(small(source, "auto"))
    assert not list(source.parent.glob(".*"))


def stopped(source: Path, step: str, monkeypatch) -> Path:
    """A run that a power failure ended behind a step; its work folder."""
    finish = Steps.finish

    def failing(self, name, given, files=()):
        finish(self, name, given, files)
        if name == step:
            raise PowerFailureError

    with monkeypatch.context() as patched:
        patched.setattr(Steps, "finish", failing)
        with pytest.raises(PowerFailureError):
            small(source)
    return source.parent / ".small.tnc-work"


@pytest.mark.parametrize(
    ("step", "file"),
    [
        ("backwards-0", "backwards-0-rows-*"),
        ("metrics", "metrics.json"),
        ("survey-2", "survey-1.json"),
        ("make-0-2", "make-0-1-0.safetensors"),
    ],
)
def test_damaged_steps_are_refused_and_fresh_starts_over(step, file, source, monkeypatch):
    work = stopped(source, step, monkeypatch)
    (damaged,) = sorted(work.glob(file))[:1]
    data = bytearray(damaged.read_bytes())
    data[-3] ^= 1
    damaged.write_bytes(data)
    for _ in range(2):
        with pytest.raises(TensorNetError, match=r"a step of an earlier run, is damaged .*--fresh"):
            small(source)
    assert content(small(source, fresh=True)) == content(small(source, "whole"))
    assert not list(source.parent.glob(".*"))


def test_other_pickled_weights_are_another_model(source, monkeypatch):
    for file in source.glob("*.safetensors*"):
        file.unlink()
    torch.save(tiny_llama(layers=2).state_dict(), source / "pytorch_model.bin")
    stopped(source, "survey-2", monkeypatch)
    torch.save(tiny_llama(layers=2, seed=7).state_dict(), source / "pytorch_model.bin")
    with pytest.raises(TensorNetError, match=r"other settings \(model was"):
        small(source)


def test_a_work_folder_that_somebody_else_laid_is_not_emptied(source):
    victim = source.parent / "victim"
    victim.mkdir()
    (victim / "precious").write_text("x")
    (source.parent / ".small.tnc-work").symlink_to(victim)
    with pytest.raises(TensorNetError, match="is no folder that this tool made"):
        small(source)
    assert [path.name for path in victim.iterdir()] == ["precious"]


def test_a_model_of_the_hub_is_fetched_at_one_commit_which_is_written_down(source, monkeypatch):
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = source.parent / "models--owner--name" / "snapshots" / commit
    snapshot.parent.mkdir(parents=True)
    source.rename(snapshot)
    asked = []

    def fetch(name, revision, allow_patterns):
        asked.append((name, revision))
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    report = tnc.compress_folder("owner/name", source.parent / "small", BUDGET, DATA, workers=1, revision="v1")
    assert asked == [("owner/name", "v1")]
    assert report.source == read_manifest(source.parent / "small").source == f"owner/name@{commit}"
    with pytest.raises(TensorNetError, match="is no hub id, so it has no revision 'v1'"):
        tnc.compress_folder(snapshot, source.parent / "other", BUDGET, DATA, workers=1, revision="v1")

    def fail(name, revision, allow_patterns):
        raise OSError("no route to host")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(TensorNetError, match="cannot be fetched from the hub; give a local folder"):
        tnc.compress_folder("owner/name", source.parent / "other", BUDGET, DATA, workers=1)


def test_any_model_of_transformers_comes_from_a_folder(tmp_path):
    model = sharp("T5")
    model.save_pretrained(tmp_path / "t5")
    tnc.compress_folder(tmp_path / "t5", tmp_path / "small", tnc.Budget(bits_per_weight=9), [inputs("T5")], workers=1)
    assert type(tnc.load(tmp_path / "small")) is type(model)


def test_steps_of_a_run_that_was_killed_at_its_very_end_are_swept(source, monkeypatch):
    def killed(folder):
        raise PowerFailureError

    with monkeypatch.context() as patched:
        patched.setattr("tensornet_compress.files.steps.shutil", SimpleNamespace(rmtree=killed))
        with pytest.raises(PowerFailureError):
            small(source)
    assert (source.parent / ".small.tnc-work").is_dir()
    with pytest.raises(TensorNetError, match="exists; choose another folder"):
        small(source)
    assert sorted(path.name for path in source.parent.iterdir()) == ["large", "small"]


def test_a_budget_that_cannot_be_met_leaves_nothing(source):
    with pytest.raises(BudgetError):
        tnc.compress_folder(source, source.parent / "small", tnc.Budget(bits_per_weight=0.01), DATA, workers=1)
    assert [path.name for path in source.parent.iterdir()] == ["large"]


def test_memory_or_room_that_does_not_suffice_is_refused_at_once(source, monkeypatch):
    with pytest.raises(TensorNetError, match=r"1,000,000 bytes of memory do not suffice .* at least [\d,]+ \("):
        small(source, memory=1_000_000)
    monkeypatch.setattr("shutil.disk_usage", lambda _place: SimpleNamespace(free=5000))
    with pytest.raises(TensorNetError, match=r"needs about [\d,]+ bytes, the disk has 5,000 left"):
        small(source)
    monkeypatch.undo()
    assert not list(source.parent.glob(".*"))
    with pytest.raises(TensorNetError, match="choose another folder, or pass overwrite"):
        small(source, "large")
    assert content(small(source, "other", memory=1 << 40)) == content(small(source))


def test_a_second_run_is_refused(source):
    def other_process():
        with pytest.raises(TensorNetError, match="is being written by another thread of this process"):
            small(source)

    with locked(source.parent / "small"):
        thread = Thread(target=other_process)
        thread.start()
        thread.join()

"""Stages: what is reported is what was measured, and only what helped is kept."""

import copy
from contextlib import contextmanager

import pytest
import torch

import tensornet_compress as tnc
from tensornet_compress.compressing import model_nbytes
from tensornet_compress.errors import TensorNetError
from tensornet_compress.progress import SilentProgress
from tensornet_compress.train import Schedule, compress_in_stages
from tests.models import batches, tiny_bert, tiny_llama

DENSE = {"method": "dense", "formats": ["int3g16z"], "workers": 1, "refine": 0}


def stages(model, bits=5.0, data=None, **options):
    return compress_in_stages(model, tnc.Budget(bits_per_weight=bits), data or batches(8, rows=4), **options)


def divergence(model, other, data):
    with torch.no_grad():
        pairs = [(model(ids).logits.log_softmax(-1), other(ids).logits.log_softmax(-1)) for ids in data]
    return sum(float((p.exp() * (p - q)).sum(-1).mean()) for p, q in pairs) / len(pairs)


def test_the_metric_that_diverges_least_where_it_is_chosen_is_kept():
    model, chosen_by, held = tiny_llama(), batches(2, rows=4, seed=3), batches(2, rows=4, seed=4)
    other = copy.deepcopy(model)
    options = {"selection": chosen_by, "heldout": held, "method": "svd", "formats": ["bf16"], "workers": 1, "bits": 9.0}
    report = stages(other, metric="auto", **options)
    assert [stage.name for stage in report.stages] == [
        "metric euclidean", "metric row-fisher", "metric input", "metric kronecker", "metric fisher",
    ]  # fmt: skip
    best = min(report.stages, key=lambda stage: stage.selection)
    assert [stage.name for stage in report.stages if stage.kept] == [best.name]
    assert best.name == f"metric {report.metric}"
    assert divergence(model, other, held) == pytest.approx(best.divergence, rel=1e-2)
    assert divergence(model, other, chosen_by) == pytest.approx(best.selection, rel=1e-2)
    single = copy.deepcopy(model)
    stages(single, metric=report.metric, **options)
    assert all(torch.equal(a, b) for a, b in zip(single.state_dict().values(), other.state_dict().values()))


@pytest.mark.parametrize("count", [3, 8, 24])
def test_no_batch_has_two_uses(count, monkeypatch):
    """Batches are told apart by their numbers: none that is chosen by or reported on is fitted, and none has both uses."""
    from tensornet_compress.train import stages as module

    fitted, healed, chosen_by = [], [], []

    def spy(name, kept):
        original = getattr(module, name)

        def run(*arguments, **options):
            kept(*arguments, **options)
            return original(*arguments, **options)

        monkeypatch.setattr(module, name, run)

    spy("compress", lambda model, budget, data, **_: fitted.extend(data))
    spy("propagate", lambda model, plan, data, *_: fitted.extend(data))
    spy("heal", lambda model, data, validation, **_: (healed.extend(data), chosen_by.extend(validation)))
    data = batches(count, rows=4)
    options = {key: value for key, value in DENSE.items() if key != "refine"}
    stages(tiny_llama(layers=1), data=data, refine=True, heal_steps=1, **options)

    def numbers(found):
        found = [part["input_ids"] if isinstance(part, dict) else part for part in found]
        return {number for number, ids in enumerate(data) for part in found if torch.equal(ids, part)}

    cut = max(1, count // 8)
    assert numbers(fitted) == numbers(healed) == set(range(count - 2 * cut))
    assert numbers(chosen_by) == set(range(count - 2 * cut, count - cut))


def test_refinement_and_healing_follow_and_the_result_can_be_saved(tmp_path, llama_folder):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(llama_folder).eval()
    original, chosen_by, held = copy.deepcopy(model), batches(2, rows=4, seed=3), batches(2, rows=4, seed=4)
    options = {**DENSE, "formats": ["int3g16o"]}
    compress_options = {key: value for key, value in options.items() if key != "refine"}
    uses = {"selection": chosen_by, "heldout": held, "data": batches(16, rows=8)}
    report = stages(model, refine=True, heal_steps=20, **uses, **compress_options)
    assert [stage.name for stage in report.stages] == ["fisher", "refine", "heal"]
    last = report.stages[-1]
    assert last.selection <= min(stage.selection for stage in report.stages if stage.kept) * 1.02
    assert divergence(original, model, held) == pytest.approx(last.divergence, rel=1e-2)
    assert divergence(original, model, chosen_by) == pytest.approx(last.selection, rel=1e-2)
    assert model_nbytes(model) == report.nbytes
    tnc.save(model, tmp_path / "out", report=report)
    loaded = tnc.load(tmp_path / "out")
    assert divergence(model, loaded, held) < 1e-6
    assert "held-out batches" in str(report)


def test_a_refinement_that_does_not_help_is_undone():
    """Fitted to one short batch, it cannot help on others."""
    model = tiny_llama()
    options = {key: value for key, value in DENSE.items() if key != "refine"}
    uses = {"selection": batches(4, rows=4, seed=3), "heldout": batches(4, rows=4, seed=4)}
    plain = copy.deepcopy(model)
    stages(plain, data=batches(1, rows=1, length=4), **uses, **options)
    report = stages(model, refine=True, data=batches(1, rows=1, length=4), **uses, **options)
    if not report.stages[-1].kept:
        assert all(torch.equal(a, b) for a, b in zip(plain.state_dict().values(), model.state_dict().values()))
    assert report.stages[-1].kept == (report.stages[1].selection < report.stages[0].selection)


LAST_STAGES = {
    "compress": {**DENSE, "refine": False},
    "refine": {**DENSE, "refine": True},
    "heal": {**DENSE, "refine": False, "heal_steps": 20, "by_block": True},
    "isvt": {"rank_schedule": Schedule(steps=3), "bits": 9.0},
}


@pytest.mark.parametrize("last", LAST_STAGES)
def test_layer_errors_are_those_of_the_model_left_behind(last):
    """In the input metric: how much of a layer's output on its dense inputs is lost."""
    model, data = tiny_llama(), batches(6, rows=8)
    other = copy.deepcopy(model)
    uses = {"selection": batches(2, rows=8, seed=3), "heldout": batches(2, rows=8, seed=4), "data": data}
    report = stages(other, metric="input", **uses, **LAST_STAGES[last])
    assert report.stages[-1].kept
    inputs = {layer.name: [] for layer in report.layers}
    for name, found in inputs.items():
        model.get_submodule(name).register_forward_pre_hook(lambda _m, given, found=found: found.append(given[0].flatten(0, 1)))
    with torch.no_grad():
        for ids in data:
            model(ids)
    for layer in report.layers:
        vectors = torch.cat(inputs[layer.name])
        wanted, given = (vectors @ part.get_submodule(layer.name).weight.detach().T for part in (model, other))
        lost = float((wanted - given).square().sum() / wanted.square().sum())
        assert layer.error == pytest.approx(lost, rel=2e-2)


class Interrupted(SilentProgress):
    """An interrupt by hand when the first block was propagated."""

    @contextmanager
    def stage(self, name, total):
        def advance():
            if name == "propagate":
                raise KeyboardInterrupt

        yield advance


def test_an_interrupted_refinement_is_undone():
    model = tiny_llama()
    options = {key: value for key, value in DENSE.items() if key != "refine"}
    plain = copy.deepcopy(model)
    stages(plain, **options)
    with pytest.raises(KeyboardInterrupt):
        stages(model, refine=True, progress=Interrupted(), **options)
    before, after = plain.state_dict(), model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(part, after[name]) for name, part in before.items())


def test_isvt_makes_a_report_whose_bytes_are_those_of_the_model(tmp_path, llama_folder):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(llama_folder).eval()
    report = stages(model, bits=9.0, metric="kronecker", rank_schedule=Schedule(steps=3))
    assert report.bits_per_weight <= 9.0
    assert model_nbytes(model) == report.nbytes
    assert report.stages[0].name == "isvt, kronecker"
    tnc.save(model, tmp_path / "out", report=report)
    assert torch.equal(tnc.load(tmp_path / "out")(batches(1)[0]).logits, model(batches(1)[0]).logits)


def test_encoders_are_measured_by_cosine():
    model = tiny_bert()
    report = stages(model, bits=12.0, metric="kronecker", method="dense", formats=["int8g16"], workers=1)
    assert 0 <= report.stages[0].divergence < 0.05


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metric": "hessian"}, "hessian"),
        ({"data": batches(2)}, "more calibration"),
        ({"data": batches(1), "heldout": batches(1)}, "more calibration"),
        ({"selection": []}, "choose by"),
        ({"rank_schedule": Schedule(), "refine": True}, "isvt goes with"),
    ],
)
def test_bad_requests_are_refused(options, message):
    with pytest.raises(TensorNetError, match=message):
        stages(tiny_llama(layers=1), **options)

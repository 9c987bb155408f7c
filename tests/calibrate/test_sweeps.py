import copy
import itertools
import json

import pytest
import torch
from torch import nn

import tensornet_compress as tnc
from tensornet_compress.calibrate import shared_sweeps
from tensornet_compress.calibrate.fisher_metrics import GROUP, fisher_metrics
from tensornet_compress.calibrate.shared_sweeps import Elsewhere, swept_elsewhere
from tensornet_compress.calibrate.sweeps import FisherSweeps, NotByBlocksError, sweep_steps
from tensornet_compress.errors import TensorNetError
from tensornet_compress.files.steps import Steps
from tensornet_compress.nn import find_targets
from tests.architectures import inputs, sharp
from tests.models import batches, tiny_llama


def both(model, data, folder):
    chosen = find_targets(model, None, (), tables=True)[0]
    swept = dict(FisherSweeps(model, data, chosen, Steps(folder, lasting=False)).metrics())
    return fisher_metrics(model, data, chosen), {name: metric.load() for name, metric in swept.items()}


def same(one, other, exactly=True):
    sides = (one.rows, other.rows), (one.columns, other.columns)
    equal = torch.equal if exactly else torch.allclose
    return one.rate == other.rate and all((a is None and b is None) or equal(a, b) for a, b in sides)


@pytest.mark.parametrize("name", ["Llama", "GPT-2", "Gemma 2", "BLOOM", "Mixtral", "Mamba", "Qwen3-Next", "BERT", "ViT"])
def test_sweeps_give_the_numbers_of_one_pass(name, tmp_path):
    """Embeddings, tied heads, experts and poolers among them."""
    whole, swept = both(sharp(name), [inputs(name)] * 2, tmp_path)
    assert swept.keys() == whole.keys()
    for layer, metric in whole.items():
        # How recurrent layers sum, in their last bit, depends on where tensors lie in memory on some processors.
        assert same(swept[layer], metric, exactly=name not in ("Mamba", "Qwen3-Next"))


def by_workers(model, data, folder, lasting=False, fails_at=None):
    """Sweeps over groups, each over a model that was loaded again."""
    groups = []

    def run(work, tasks, receive):
        for place, task in enumerate(tasks):
            if task.number == fails_at:
                raise OSError("switched off")
            groups.append(task.number)
            receive(place, json.loads(json.dumps(work(task))))

    original = copy.deepcopy(model)
    steps, advanced = Steps(folder, lasting), []
    with swept_elsewhere(Elsewhere(lambda: copy.deepcopy(original), run)):
        chosen = find_targets(model, None, (), tables=True)[0]
        sweeps = FisherSweeps(model, data, chosen, steps, advance=lambda: advanced.append(1))
        found = {name: metric.load() for name, metric in shared_sweeps.swept(sweeps)}
    assert len(advanced) == sweep_steps(model, len(data), [target.name for target in chosen])
    return found, groups


@pytest.mark.parametrize("name", ["Llama", "GPT-2", "Mixtral", "BERT"])
def test_groups_of_batches_give_the_same_numbers_here_and_elsewhere(name, tmp_path):
    model, given = sharp(name), inputs(name)
    data = [dict(given) if isinstance(given, dict) else given.roll(shift, -1) for shift in range(GROUP + 3)]
    whole, swept = both(model, data, tmp_path)
    elsewhere, groups = by_workers(model, data, tmp_path)
    assert groups == [0, 1]
    assert swept.keys() == elsewhere.keys() == whole.keys()
    for layer, metric in whole.items():
        assert same(swept[layer], metric)
        assert same(elsewhere[layer], metric)
    assert not list(tmp_path.glob("sums-block*"))


def test_groups_that_were_swept_before_a_run_was_cut_off_are_not_swept_again(tmp_path):
    model, data = tiny_llama(), batches(2 * GROUP + 1, 1)
    with pytest.raises(OSError, match="switched off"):
        by_workers(model, data, tmp_path, lasting=True, fails_at=2)
    found, groups = by_workers(model, data, tmp_path, lasting=True)
    assert groups == [2]
    chosen = find_targets(model, None, (), tables=True)[0]
    assert all(same(found[name], metric) for name, metric in fisher_metrics(model, data, chosen).items())


def test_a_run_that_was_cut_off_goes_on_without_workers_and_back(tmp_path):
    model, data = tiny_llama(), batches(GROUP + 1, 1)
    chosen = find_targets(model, None, (), tables=True)[0]
    workers = Elsewhere(lambda: copy.deepcopy(model), lambda work, tasks, receive: [*map(receive, range(2), map(work, tasks))])

    def swept(elsewhere, whole):
        with swept_elsewhere(elsewhere):
            metrics = shared_sweeps.swept(FisherSweeps(model, data, chosen, Steps(tmp_path)))
            # The metrics of the last block, and no more.
            return {name: metric.load() for name, metric in (metrics if whole else itertools.islice(metrics, 1))}

    swept(workers, whole=False)
    swept(None, whole=False)
    swept(workers, whole=False)
    wanted = fisher_metrics(model, data, chosen)
    for elsewhere in (None, workers):
        found = swept(elsewhere, whole=True)
        assert all(same(found[name], metric) for name, metric in wanted.items())


@pytest.mark.parametrize("first_shares", [False, True])
def test_a_layer_that_one_group_alone_reaches_counts_with_that_group(first_shares, tmp_path):
    """Experts that no token chose in one of them, and layers that share inputs in one of them alone. The last group calls but
    one of those that shared inputs before."""

    class Choosing(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 5)

        def forward(self, x):
            again = x if float(x[0, 0, 0]) > 0 else x + 0
            state = self.first(x)
            return self.head(state + self.second(again) if float(x[0, 0, 1]) > 0 else state)

    model = Choosing()
    data = [torch.randn(1, 6, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(3 * GROUP)]
    begins = 0 if first_shares else GROUP // 2
    for number, batch in enumerate(data):
        batch[0, 0, 0] = batch[0, 0, 0].abs() * (1 if number < GROUP or first_shares else -1)
        batch[0, 0, 1] = batch[0, 0, 1].abs() * (1 if begins <= number < 2 * GROUP else -1)
    chosen = find_targets(model, None, (), tables=True)[0]
    found = fisher_metrics(model, data, chosen)
    for name, used in (("first", data), ("second", data[begins : 2 * GROUP])):
        inputs_of = torch.cat([batch[0] for batch in used]).double()
        torch.testing.assert_close(found[name].columns, inputs_of.T @ inputs_of / len(inputs_of), rtol=1e-5, atol=1e-6)


def test_padding_and_batches_of_padding_alone(tmp_path):
    data = [{"input_ids": batches(1)[0], "attention_mask": torch.ones_like(batches(1)[0])} for _ in range(3)]
    data[0]["attention_mask"][:, :5] = 0
    data[1]["attention_mask"][:] = 0
    whole, swept = both(tiny_llama(), data, tmp_path)
    assert all(same(swept[layer], metric) for layer, metric in whole.items())
    with pytest.raises(TensorNetError, match="holds a token that is not padding"):
        both(tiny_llama(), data[1:2], tmp_path)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("T5", "cannot be run by themselves"),
        ("BART", "is given more than states"),
        ("ALBERT", "do not give what the model gives"),
        ("RecurrentGemma", "again|a second time"),
    ],
)
def test_models_that_cannot_be_run_by_blocks_are_noticed(name, why, tmp_path):
    with pytest.raises(NotByBlocksError, match=why):
        both(copy.deepcopy(sharp(name)), [inputs(name)] * 2, tmp_path)


def test_what_cannot_be_had_by_blocks_is_collected_at_once_and_said():
    model, data = sharp("ALBERT"), [inputs("ALBERT")] * 2
    reports = [
        tnc.compress(copy.deepcopy(model), tnc.Budget(bits_per_weight=5.0), data, by_block=by_block, workers=1)
        for by_block in (False, True)
    ]
    assert reports[0].layers == reports[1].layers
    assert "in one pass over the whole model" in str(reports[1])
    assert "in one pass" not in str(reports[0])


def test_a_model_is_left_as_found_and_steps_are_counted(tmp_path):
    model, data, steps = tiny_llama(), batches(3), []
    model.model.layers[1].train()
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    chosen = find_targets(model, None, (), tables=True)[0]
    dict(FisherSweeps(model, data, chosen, Steps.passing(), advance=lambda: steps.append(1)).metrics())
    assert len(steps) == sweep_steps(model, len(data), [target.name for target in chosen])
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before
    assert model.model.layers[1].training
    assert not any(module._forward_hooks or "forward" in module.__dict__ for module in model.modules())


class Skipping(nn.Module):
    """A way around the second block."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8)) for _ in range(3))

    def forward(self, x):
        first = self.layers[0](x)
        return self.layers[2](self.layers[1](first)) + first


class Around(Skipping):
    """A layer ahead of the blocks whose output is wanted again behind them, or one between them."""

    def __init__(self, between):
        super().__init__()
        self.other, self.between = nn.Linear(8, 8), between

    def forward(self, x):
        x = x if self.between else self.other(x)
        state = self.layers[0](x)
        state = self.layers[2](self.layers[1](self.other(state) if self.between else state))
        return state if self.between else state + x


@pytest.mark.parametrize(("between", "why"), [(True, "'other' is called between its blocks"), (False, "by another way")])
def test_layers_beside_the_blocks_that_the_sweeps_would_miss_are_noticed(between, why, tmp_path):
    with pytest.raises(NotByBlocksError, match=why):
        both(Around(between), [torch.randn(4, 8)], tmp_path)


@pytest.mark.parametrize("name", ["CLIP", "SigLIP"])
def test_two_towers_are_noticed(name, tmp_path):
    with pytest.raises(NotByBlocksError, match="by another way"):
        both(sharp(name), [inputs(name)], tmp_path)


def test_a_way_around_blocks_is_noticed(tmp_path):
    with pytest.raises(NotByBlocksError, match="do not give what the model gives"):
        both(Skipping(), [torch.randn(4, 8)], tmp_path)

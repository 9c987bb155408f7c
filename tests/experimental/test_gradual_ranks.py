"""Ranks lowered during training: bytes follow the schedule, and it ends in networks that can be healed."""

import pytest
import torch

import tensornet_compress as tnc
from tensornet_compress.errors import TensorNetError
from tensornet_compress.experimental import reduce_gradually
from tensornet_compress.nn import TNLinear
from tensornet_compress.train import Schedule, heal, next_token_loss
from tests.models import batches, tiny_llama


@pytest.mark.parametrize("threshold", ["hard", "soft"])
@pytest.mark.parametrize("kind", ["one-shot", "cubic", "cycles", "multiplier"])
def test_bytes_follow_the_schedule(kind, threshold):
    model = tiny_llama(layers=1)
    schedule = Schedule(kind=kind, steps=4)
    report = reduce_gradually(
        model,
        batches(3),
        tnc.Budget(bits_per_weight=9.0),
        loss=next_token_loss,
        schedule=schedule,
        steps=8,
        threshold=threshold,
    )
    assert len(report.losses) == 8
    assert len(report.nbytes) == schedule.count
    assert report.nbytes[-1] <= report.allowed
    if kind in ("cubic", "multiplier"):
        assert report.nbytes[0] > report.nbytes[-1]
    assert isinstance(model.model.layers[0].mlp.up_proj, TNLinear)
    assert all(parameter.grad is None for parameter in model.parameters())
    healed = heal(model, batches(3), loss=next_token_loss, steps=6)
    assert healed.best <= healed.initial


def test_a_reduced_model_can_be_saved(tmp_path):
    model, data = tiny_llama(layers=1), batches(3)
    schedule = Schedule(steps=2)
    reduce_gradually(model, data, tnc.Budget(bits_per_weight=9.0), loss=next_token_loss, schedule=schedule, steps=4)
    tnc.save(model, tmp_path / "reduced")
    again = tnc.load(tmp_path / "reduced")
    assert torch.equal(again(data[0]).logits, model(data[0]).logits)


def test_the_loss_falls_while_ranks_are_lowered():
    model, data = tiny_llama(layers=1), batches(2)
    report = reduce_gradually(
        model,
        data,
        tnc.Budget(bits_per_weight=9.0),
        loss=next_token_loss,
        schedule=Schedule(kind="cubic", steps=6),
        steps=40,
        metric="euclidean",
    )
    assert torch.tensor(report.losses[-4:]).mean() < torch.tensor(report.losses[:4]).mean()


def test_more_thresholds_than_steps_are_refused():
    with pytest.raises(TensorNetError, match="9 thresholds"):
        reduce_gradually(
            tiny_llama(layers=1),
            batches(1),
            tnc.Budget(bits_per_weight=9.0),
            loss=next_token_loss,
            schedule=Schedule(steps=9),
            steps=3,
        )

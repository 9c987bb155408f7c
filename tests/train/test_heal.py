"""Healing lowers the held-out loss, keeps bytes and dtypes, and keeps the best."""

import copy

import pytest
import torch

import tensornet_compress as tnc
from tensornet_compress.compressing import model_nbytes
from tensornet_compress.errors import TensorNetError
from tensornet_compress.train import heal, next_token_loss
from tests.models import batches, tiny_bert, tiny_llama


def compressed(model, bits=5.0, formats=("int3g16o",), method="dense"):
    other = copy.deepcopy(model)
    tnc.compress(other, tnc.Budget(bits_per_weight=bits), batches(4), method=method, formats=list(formats), workers=1)
    return other


@pytest.mark.parametrize(("formats", "method", "bits"), [(("int3g16o",), "dense", 5.0), (("bf16",), "svd", 8.0)])
def test_distillation_lowers_the_heldout_divergence(formats, method, bits):
    model = tiny_llama()
    other = compressed(model, bits, formats, method)
    before = {name: (value.dtype, tuple(value.shape)) for name, value in other.state_dict().items()}
    nbytes = model_nbytes(other)
    report = heal(other, batches(12, rows=8), teacher=model, steps=40, every=10)
    assert report.best < 0.97 * report.initial
    assert report.best == min(loss for _, loss in report.heldout)
    assert before == {name: (value.dtype, tuple(value.shape)) for name, value in other.state_dict().items()}
    assert model_nbytes(other) == nbytes


def test_the_reported_loss_is_that_of_the_model_left_behind():
    model, held = tiny_llama(), batches(2, seed=7)
    other = compressed(model)
    report = heal(other, batches(6, rows=8), teacher=model, steps=20, validation=held)
    with torch.no_grad():
        pairs = [(model(ids).logits.log_softmax(-1), other(ids).logits.log_softmax(-1)) for ids in held]
    kl = sum(float((p.exp() * (p - q)).sum(-1).mean()) for p, q in pairs) / len(pairs)
    # Trained in float32, stored in half precision.
    assert kl == pytest.approx(report.best, rel=2e-2)


def test_a_useless_rate_keeps_the_starting_parameters_and_stops_early():
    model = tiny_llama()
    other = compressed(model)
    before = {name: value.clone() for name, value in other.state_dict().items()}
    report = heal(other, batches(6), teacher=model, steps=60, rate=0.5, every=2, patience=2)
    assert report.stopped_early
    assert report.best_step == 0
    assert report.best == report.initial
    assert all(torch.equal(before[name], value) for name, value in other.state_dict().items())


@pytest.mark.parametrize(
    ("error", "message"),
    [(KeyboardInterrupt, "by hand"), (TensorNetError, "held-out loss is nan after step 8; lower the rate")],
)
def test_the_best_parameters_are_kept_when_training_does_not_come_to_its_end(error, message):
    """The best are those of step 4; training ends between it and the measurement at step 8, or there."""
    model, train, held = tiny_llama(), batches(4, rows=8), batches(1, rows=8)
    other = compressed(model)
    best, trained = {}, []

    def loss(model, batch):
        value = next_token_loss(model, batch)
        if batch is not held[0]:
            trained.append(float(value.detach()))
            if error is KeyboardInterrupt and len(trained) == 7:
                raise error("by hand")
        elif len(trained) == 4:
            best.update({name: part.detach().clone() for name, part in model.named_parameters()})
        elif len(trained) == 8:
            return value * float("nan")
        return value

    before = next_token_loss(other, held[0])
    with pytest.raises(error, match=message):
        heal(other, train, loss=loss, steps=12, every=4, validation=held)
    assert all(torch.equal(part, best[name].to(part.dtype)) for name, part in other.named_parameters())
    assert next_token_loss(other, held[0]) < before


@pytest.mark.parametrize("masked", [False, True])
def test_recomputed_activations_give_the_same_training(masked):
    """Blocks that run again must not add to the key-value cache that they were given."""
    model, data = tiny_llama(), batches(4)
    if masked:
        data = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in data]
    plain, again = compressed(model), compressed(model)
    a = heal(plain, data, teacher=model, steps=6, cache_teacher=True)
    b = heal(again, data, teacher=model, steps=6, checkpointing=True)
    assert a.losses == pytest.approx(b.losses, rel=1e-2)
    assert not any("forward" in module.__dict__ for module in again.modules())


def test_task_loss_and_encoders():
    model = tiny_llama()
    report = heal(compressed(model), batches(4), loss=next_token_loss, steps=10)
    assert report.best < report.initial
    encoder = tiny_bert()
    report = heal(compressed(encoder, 8.0), batches(6), teacher=encoder, steps=20)
    assert report.best < report.initial


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_model_heals_in_its_own_dtype_whose_norms_stay_in_it(dtype):
    """The norms of a Llama pass their dtype on to the dense head, which takes no other than its own."""
    model, held = tiny_llama().to(dtype), batches(2, seed=7)
    other = compressed(model)
    before = [(name, parameter, parameter.dtype) for name, parameter in other.named_parameters()]
    classes = [type(module) for module in other.modules()]
    report = heal(other, batches(12, rows=8), teacher=model, steps=40, validation=held)
    assert report.best < 0.97 * report.initial
    after = list(other.named_parameters())
    assert [(name, part.dtype) for name, part in after] == [(name, dtype) for name, _, dtype in before]
    assert all(part is kept for (_, part), (_, kept, _) in zip(after, before))
    assert classes == [type(module) for module in other.modules()]
    with torch.no_grad():
        pairs = [(model(ids).logits.float().log_softmax(-1), other(ids).logits.float().log_softmax(-1)) for ids in held]
    assert sum(float((p.exp() * (p - q)).sum(-1).mean()) for p, q in pairs) / 2 == pytest.approx(report.best, rel=3e-2)


def test_nothing_else_changes():
    model = tiny_llama()
    other = compressed(model).train()
    random, embedding = torch.get_rng_state(), other.model.embed_tokens.weight.clone()
    flags = {name: parameter.requires_grad for name, parameter in other.named_parameters()}
    heal(other, batches(4), teacher=model, steps=4)
    assert torch.equal(random, torch.get_rng_state())
    assert torch.equal(embedding, other.model.embed_tokens.weight)
    assert other.training
    assert not model.training
    assert flags == {name: parameter.requires_grad for name, parameter in other.named_parameters()}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "either a teacher"),
        ({"teacher": tiny_llama(), "loss": next_token_loss}, "either a teacher"),
        ({"loss": next_token_loss, "steps": 0}, "at least 1"),
        ({"loss": lambda model, batch: next_token_loss(model, batch) * float("nan")}, "held-out loss is nan after step 0"),
    ],
)
def test_bad_requests_are_refused(options, message):
    with pytest.raises(TensorNetError, match=message):
        heal(compressed(tiny_llama(layers=1)), batches(3), **options)
    with pytest.raises(TensorNetError, match="more batches"):
        heal(tiny_llama(layers=1), batches(1), loss=next_token_loss)

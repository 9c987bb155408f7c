"""A real model from end to end."""

import copy

import pytest
import torch

import tensornet_compress as tnc
from tensornet_compress.evaluate import Reference, evaluate_language
from tensornet_compress.nn import replace_module
from tensornet_compress.tensor import NetworkSpec

TARGETS = ["layers.12.mlp.*", "layers.13.self_attn.*"]


@pytest.mark.model
def test_two_half_blocks_of_a_real_model_lose_less_than_by_round_to_nearest(tmp_path):
    from tensornet_compress.inputs import calibration_windows, heldout_windows, load_causal_lm, load_tokenizer

    tokenizer = load_tokenizer("smollm2-135m")
    calibration = list(calibration_windows(tokenizer, 128, 8).split(4))
    windows = heldout_windows(tokenizer, 128, 4)
    model = load_causal_lm("smollm2-135m", torch.float32)
    reference = Reference(model, windows)
    baseline = copy.deepcopy(model)
    budget = tnc.Budget(bits_per_weight=3.5)
    report = tnc.compress(model, budget, calibration, targets=TARGETS, method="dense", workers=1)
    nearest = 0
    for layer in report.layers:
        weight = baseline.get_submodule(layer.name).weight.detach()
        network = tnc.realise(weight, NetworkSpec.dense(tuple(weight.shape), tnc.parse_format("int3g64o")))
        nearest += network.nbytes
        replace_module(baseline, layer.name, network)
    assert report.bits_per_weight <= 3.5
    assert report.targeted_nbytes <= nearest
    ours, theirs = (evaluate_language(m, windows, reference).kl for m in (model, baseline))
    assert ours < theirs
    tnc.save(model, tmp_path / "out", tokenizer=tokenizer, report=report)
    loaded = tnc.load(tmp_path / "out")
    assert evaluate_language(loaded, windows, reference).kl == pytest.approx(ours, rel=1e-4)
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    text = loaded.generate(**prompt, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert text.shape[1] == prompt["input_ids"].shape[1] + 5

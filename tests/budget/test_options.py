"""What a layer may become: bytes are exact, errors are those of the network that is made."""

import pytest
import torch

import tensornet_compress as tnc
from tensornet_compress.budget import LayerJob, LayerStatistics, WeightSource, layer_options, realise_layer
from tensornet_compress.compression import model_nbytes
from tensornet_compress.metric import KroneckerMetric
from tests.generators import correlated_moment, random_tensor
from tests.models import batches, tiny_llama

WEIGHT = random_tensor((48, 64), 2, torch.float32)
METRICS = {"euclidean": KroneckerMetric(), "input": KroneckerMetric(columns=correlated_moment(64, 1))}
SHARES = (0.2, 0.4, 0.6, 0.8, 0.95)


def realised(option, metric):
    return realise_layer((LayerJob("layer", WeightSource(tensor=WEIGHT), metric), option.spec))


@pytest.mark.parametrize("metric", METRICS)
def test_pivoted_cores_are_offered_at_the_sizes_asked_for(metric):
    metric = METRICS[metric]
    statistics = LayerStatistics(WEIGHT, metric)
    options = [o for o in layer_options(statistics, ["svd"], ["bf16", "bf16p"], SHARES) if o.family == "svd"]
    plain, pivoted = ([o for o in options if o.spec.terms[0].formats[0].name == name] for name in ("bf16", "bf16p"))
    assert len(plain) == len(pivoted) == len(SHARES)
    for share, pair in zip(SHARES, zip(plain, pivoted)):
        for option in pair:
            assert share - 0.04 < option.nbytes / (2 * 48 * 64) < share + 0.01
            found = realised(option, metric)
            assert found.network.nbytes == option.nbytes
            assert found.error == pytest.approx(option.error, rel=0.05, abs=1e-4 * metric.norm2(WEIGHT))
        assert (pair[1].error, pair[1].nbytes) < (pair[0].error, pair[0].nbytes)


def test_dense_forms_of_pivoted_formats_are_plain():
    options = layer_options(LayerStatistics(WEIGHT, KroneckerMetric()), ["dense", "svd", "tt"], ["bf16p"], SHARES)
    assert [o.spec.terms[0].formats[0].name for o in options if o.family == "dense"] == ["bf16"]
    assert not [o for o in options if o.family == "tt"]


def test_a_model_is_nearer_with_pivots_at_equal_bytes_and_can_be_healed():
    data, errors = batches(3), {}
    for formats in (["bf16"], ["bf16", "bf16p"]):
        model = tiny_llama(layers=1)
        options = {"method": "svd", "formats": formats, "allocator": "uniform", "workers": 1}
        report = tnc.compress(model, tnc.Budget(bits_per_weight=12.0), data, **options)
        assert report.bits_per_weight <= 12
        errors[len(formats)] = sum(layer.error for layer in report.layers)
        assert any("bf16p" in layer.network for layer in report.layers) == (len(formats) == 2)
    assert errors[2] < 0.8 * errors[1]
    healed = tnc.train.heal(model, data, teacher=tiny_llama(layers=1), steps=5, validation=batches(1, seed=9))
    assert healed.best <= healed.initial
    assert model_nbytes(model) == report.nbytes

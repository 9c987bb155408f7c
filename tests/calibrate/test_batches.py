"""What models are called with and give back, and which of that is not padding."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

import tensornet_compress as tnc
from tensornet_compress.calibrate import kept_output, model_inputs
from tensornet_compress.calibrate.batches import calibration_fingerprint
from tensornet_compress.calibrate.layer_metrics import calibrated_metrics
from tensornet_compress.errors import TensorNetError
from tests.models import batches, tiny_llama


@pytest.mark.parametrize(
    "batch", [torch.zeros(4, dtype=torch.int64), {"attention_mask": torch.ones(1, 2)}, {}, [], "text", 3, None]
)
def test_what_is_no_batch_is_refused_with_what_was_given(batch):
    with pytest.raises(TensorNetError, match="input_ids of shape"):
        model_inputs(batch, torch.device("cpu"))


def test_outputs_are_those_of_real_positions():
    model, ids = tiny_llama(), batches(1, rows=2, length=5)[0]
    mask = torch.tensor([[1, 1, 1, 0, 0], [0, 1, 1, 1, 1]])
    with torch.no_grad():
        output, logits = kept_output(model, {"input_ids": ids, "attention_mask": mask})
        whole = model(input_ids=ids, attention_mask=mask).logits
    assert logits
    assert torch.equal(output, whole[mask.bool()])


class Gives(nn.Module):
    """Gives the same whatever it is called with."""

    def __init__(self, given, config=None):
        super().__init__()
        self.given, self.config = given, config

    def forward(self, input_ids):
        return self.given


_IDS = {"input_ids": torch.ones(2, 3, dtype=torch.long)}


_UNLIKE = [torch.ones(2, 3), torch.ones(4)]


@pytest.mark.parametrize("given", [_UNLIKE, {"ids": torch.ones(2, 3, dtype=torch.long)}, None, [], ()])
def test_outputs_without_a_known_tensor_are_refused(given):
    with pytest.raises(TensorNetError, match=r"Gives gives a .* without 'logits'.*pass loss="):
        kept_output(Gives(given), _IDS)


@pytest.mark.parametrize(
    ("given", "shape"),
    [
        ({"start_logits": torch.ones(2, 3), "end_logits": torch.ones(2, 3), "loss": torch.ones(())}, (2, 6)),
        ([torch.ones(2, 4, 5), torch.ones(2)], (2, 21)),
        ((torch.ones(2, 3, 4), torch.ones(2, 4)), (6, 4)),
        ({"boxes": [torch.ones(2, 3)], "ids": torch.ones(2, 3, dtype=torch.long)}, (2, 3)),
        (torch.ones(2, 3, 4), (6, 4)),
    ],
)
def test_outputs_of_any_kind_are_vectors(given, shape):
    output, logits = kept_output(Gives(given), _IDS)
    assert (tuple(output.shape), logits) == (shape, False)


@pytest.mark.parametrize(
    ("shape", "wanted", "logits"),
    [((2, 7), (2, 7), True), ((2, 7, 4, 5), (40, 7), True), ((2, 1), (1, 2), False), ((2, 6, 1), (2, 6), False)],
)
def test_logits_are_over_labels(shape, wanted, logits):
    """Of a segmentation the labels are not the last axis; a single label has no distribution."""
    model = Gives(SimpleNamespace(logits=torch.ones(shape)), SimpleNamespace(num_labels=7))
    output, found = kept_output(model, _IDS)
    assert (tuple(output.shape), found) == (wanted, logits)


def test_padding_of_an_encoder_is_none_of_its_decoder():
    inputs = _IDS | {"attention_mask": torch.tensor([[1, 0, 0], [1, 1, 0]]), "decoder_input_ids": torch.ones(2, 3)}
    model = Gives(SimpleNamespace(logits=torch.ones(2, 3, 5)))
    model.forward = lambda **_: model.given
    assert len(kept_output(model, inputs)[0]) == 6


@pytest.mark.parametrize(
    "batch", [torch.ones(2, 4), [torch.ones(2, 4)], {"x": torch.ones(2, 4)}, {"x": torch.ones(2, 4), "scale": 1.0}]
)
def test_batches_are_whatever_the_model_is_called_with(batch):
    class Scaled(nn.Module):
        def forward(self, x, scale=1.0):
            return scale * x

    inputs = model_inputs(batch, torch.device("cpu"))
    assert torch.equal(kept_output(Scaled(), inputs)[0], torch.ones(2, 4))
    assert calibration_fingerprint([batch]) == calibration_fingerprint([batch]) != calibration_fingerprint([torch.ones(4, 2)])
    ids = model_inputs(torch.ones(2, 4, dtype=torch.long), torch.device("cpu"))
    assert kept_output(nn.Sequential(nn.Embedding(9, 3), nn.Linear(3, 2)), ids)[0].shape == (8, 2)


def padded(ids, lengths, width, side):
    """Batch of the first ``lengths[row]`` ids of each row with padding on one side, (rows, width)."""
    mask, placed = torch.zeros(len(ids), width, dtype=torch.long), torch.zeros(len(ids), width, dtype=torch.long)
    for row, length in enumerate(lengths):
        where = slice(width - length, width) if side == "left" else slice(length)
        placed[row, where], mask[row, where] = ids[row, :length], 1
    return {"input_ids": placed, "attention_mask": mask}


def test_batches_of_padding_alone_are_passed_over_and_refused_when_there_are_no_others():
    model = tiny_llama(layers=1)
    targets, _ = tnc.nn.find_targets(model)
    text = padded(batches(1)[0], [3, 3], 8, "left")
    blank = {"input_ids": text["input_ids"], "attention_mask": torch.zeros(2, 8, dtype=torch.long)}
    given = [calibrated_metrics(model, data, targets, "fisher") for data in ([text], [text, blank])]
    for one, other in zip(given[0].values(), given[1].values()):
        assert torch.allclose(one.rows, other.rows, rtol=1e-5)
        assert torch.allclose(one.columns, other.columns, rtol=1e-5)
    with pytest.raises(TensorNetError, match=r"not padding.*attention_mask"):
        calibrated_metrics(model, [blank, blank], targets, "fisher")

"""What models are called with and give back, and which of that is not padding."""

import pytest
import torch
from torch import nn

import tensornet_compress as tnc
from tensornet_compress.calibrate import kept_output, model_inputs
from tensornet_compress.calibrate.layer_metrics import calibrated_metrics
from tensornet_compress.errors import TensorNetError
from tests.models import batches, tiny_llama


@pytest.mark.parametrize(
    "batch", [torch.zeros(4, dtype=torch.int64), torch.zeros(2, 3), {"attention_mask": torch.ones(1, 2)}, {}]
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


@pytest.mark.parametrize("given", [{"start_logits": torch.ones(2, 3)}, [torch.ones(2, 3)], None])
def test_outputs_without_a_known_tensor_are_refused(given):
    class Odd(nn.Module):
        def forward(self, input_ids):
            return given

    with pytest.raises(TensorNetError, match=r"Odd gives a .* without a tensor 'logits'"):
        kept_output(Odd(), {"input_ids": torch.ones(2, 3, dtype=torch.long)})


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

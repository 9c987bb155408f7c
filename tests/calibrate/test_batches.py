"""What models are called with and give back, and which of that is not padding."""

import pytest
import torch
from torch import nn

from tensornet_compress.calibrate import first_tokens, kept_output, model_inputs
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


@pytest.mark.parametrize(
    ("tokens", "longest", "shapes"), [(70, 12, [(2, 12), (2, 12), (1, 12), (1, 10)]), (20, 16, [(1, 16), (1, 4)])]
)
def test_the_first_tokens_of_plain_and_right_padded_batches(tokens, longest, shapes):
    """Padding behind the text is kept and counted with it."""
    plain = [*batches(2), *(ids[:1] for ids in batches(3, seed=1))]
    right = [padded(ids, [16, 5][: len(ids)], 16, "right") for ids in plain]
    kept, kept_right = first_tokens(plain, tokens, longest), first_tokens(right, tokens, longest)
    assert [tuple(ids.shape) for ids in kept] == shapes
    for number, (rows, length) in enumerate(shapes):
        assert torch.equal(kept[number], plain[number][:rows, :length])
        assert all(torch.equal(value, right[number][name][:rows, :length]) for name, value in kept_right[number].items())


def test_padding_before_the_text_is_left_out():
    ids = batches(1, rows=3)[0]
    (kept,) = first_tokens([padded(ids, [6, 2, 9], 40, "left")], 100, 8)
    assert torch.equal(kept["attention_mask"], torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1], [0] * 7 + [1], [1] * 8]))
    assert torch.equal(kept["input_ids"][0, 3:], ids[0, :5])
    (cut,) = first_tokens([padded(ids, [6, 2, 9], 40, "left")], 100, 6)
    assert torch.equal(cut["input_ids"], torch.stack([torch.cat([torch.zeros(3, dtype=ids.dtype), ids[0, :3]]), ids[2, :6]]))


def test_only_real_tokens_of_left_padded_batches_count():
    given = [padded(ids, [16, 4], 40, "left") for ids in batches(3)]
    kept = first_tokens(given, 40, 64)
    assert [int(batch["attention_mask"].sum()) for batch in kept] == [20, 20]


def test_batches_of_padding_alone_are_passed_over_and_refused_when_there_are_no_others():
    text = padded(batches(1)[0], [3, 3], 8, "left")
    blank = {"input_ids": text["input_ids"], "attention_mask": torch.zeros(2, 8)}
    assert len(first_tokens([blank, torch.zeros(2, 0, dtype=torch.long), text], 100, 8)) == 1
    with pytest.raises(TensorNetError, match=r"none of the 2 calibration batches.*attention_mask"):
        first_tokens([blank, blank], 100, 8)

"""Tiny random models of the kinds that the package works on; transformers is imported when one is asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

VOCABULARY = 64


def tiny_llama(tied: bool = True, layers: int = 2, seed: int = 0) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


def tiny_gpt2(seed: int = 0) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
    )
    return GPT2LMHeadModel(config).eval()


def tiny_bert(seed: int = 0) -> Any:
    from transformers import BertConfig, BertModel

    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    return BertModel(config).eval()


class ConvNet(nn.Module):
    """Convolutions with stride, dilation and groups, a norm with running statistics, and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding="same", groups=8, bias=False)
        self.wide = nn.Conv2d(8, 12, (3, 1), dilation=2, padding=2)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.wide(self.depthwise(self.norm(self.stem(x)).relu()).relu())
        return self.head(x.mean((2, 3)))


def tiny_convnet(seed: int = 0) -> ConvNet:
    torch.manual_seed(seed)
    return ConvNet().eval()


def batches(count: int = 3, rows: int = 2, length: int = 16, seed: int = 0) -> list[Tensor]:
    """Random token ids."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCABULARY, (rows, length), generator=generator) for _ in range(count)]


_TEXT = (
    "the a an of to and in is it on bank bird tree river runs sings falls old new green small large "
    "stone water light night day wind rain sun moon star road house door hand eye word book page line"
)
WORDS = _TEXT.split()


def tiny_tokenizer() -> Any:
    """A word-level tokenizer of at most ``VOCABULARY`` words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>", "<unk>"]
    words = {word: number for number, word in enumerate([*special, *WORDS][:VOCABULARY])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def random_text(words: int, seed: int = 0) -> str:
    generator = torch.Generator().manual_seed(seed)
    return " ".join(WORDS[i] for i in torch.randint(0, len(WORDS), (words,), generator=generator).tolist())


class Residual(nn.Module):
    """Adds to the output of ``entrance``, of a width, what a layer ``map`` makes of it, perhaps in place; ``map`` may go by a
    second name."""

    def __init__(self, entrance: nn.Module, width: int, in_place: bool = False, alias: bool = False):
        super().__init__()
        self.in_place, self.entrance, self.map = in_place, entrance, nn.Linear(width, width)
        if alias:
            self.alias = self.map

    def forward(self, input_ids: Tensor) -> Tensor:
        """(..., width)."""
        x = self.entrance(input_ids)
        if not self.in_place:
            return x + self.map(x)
        x += self.map(x)
        return x


def residual(entrance: Callable[[], nn.Module], width: int, **options: bool) -> Residual:
    """A ``Residual`` of seeded weights."""
    torch.manual_seed(0)
    return Residual(entrance(), width, **options)

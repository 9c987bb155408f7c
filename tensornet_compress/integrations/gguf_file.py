"""Models in one GGUF file, as llama.cpp reads them: decoders of the Llama and Qwen families, integers in blocks of 32."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tensornet_compress.errors import MissingExtraError, TensorNetError
from tensornet_compress.integrations.grids import Grid
from tensornet_compress.version import __version__

# By transformers' model_type: the name of the architecture, and whether heads keep the halves of rotary pairs interleaved.
_ARCHITECTURES = {"llama": ("llama", True), "mistral": ("llama", True), "qwen2": ("qwen2", False), "qwen3": ("qwen3", False)}
_BLOCK = 32
_FLOATS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_NORMAL, _CONTROL, _USER, _UNUSED = 1, 3, 4, 5


@dataclass(frozen=True)
class Stored:
    """A tensor as a file holds it: ``kind``, its type in GGML, and ``data``, uint8 (rows, bytes of a row)."""

    kind: str
    data: Tensor

    def to_dense(self) -> Tensor:
        """What a reader makes of it, fp32."""
        gguf = _gguf()
        return torch.from_numpy(gguf.dequantize(self.data.numpy(), gguf.GGMLQuantizationType[self.kind]).copy())


def in_floats(tensor: Tensor) -> Stored:
    """Floating point; vectors in single precision, as llama.cpp wants them."""
    tensor = tensor.float() if tensor.ndim == 1 else tensor
    return Stored(_FLOATS[tensor.dtype], tensor.contiguous().view(torch.uint8).view(*tensor.shape[:-1], -1))


def in_blocks(grid: Grid) -> Stored | None:
    """The smallest block type that holds a grid without loss: Q4_0, Q5_0 or Q8_0, and with offsets Q4_1 or Q5_1. None where
    none does: groups that are no multiple of 32, scales that fp16 does not hold, more than 8 bits with their zero points."""
    if grid.width % _BLOCK:
        return None
    grid = grid.regrouped(_BLOCK)
    scale, offset = grid.scale.half(), None if grid.offset is None else grid.offset.half()
    exact = torch.equal(scale.float(), grid.scale.float())
    if not exact or (offset is not None and grid.offset is not None and not torch.equal(offset.float(), grid.offset.float())):
        return None
    values = grid.values()
    low, high = int(values.min()), int(values.max())
    head = [scale] if offset is None else [scale, offset]
    for bits, kind in ((4, "Q4_0"), (5, "Q5_0"), (8, "Q8_0")) if offset is None else ((4, "Q4_1"), (5, "Q5_1")):
        middle = 1 << (bits - 1) if offset is None else 0
        if low + middle >= 0 and high + middle < 1 << bits:
            codes = (values + (0 if bits == 8 else middle)).view(len(values), -1, _BLOCK)
            parts = [part.view(torch.uint8).view(len(values), -1, 2) for part in head]
            return Stored(kind, torch.cat([*parts, *_code_bytes(codes, bits)], 2).flatten(1))
    return None


def _code_bytes(codes: Tensor, bits: int) -> list[Tensor]:
    """Codes (rows, blocks, 32) -> their bytes: the fifth bits as one word, then nibbles of the first half below the second."""
    if bits == 8:
        return [codes.to(torch.int8).view(torch.uint8)]
    nibbles = codes & 15
    low = (nibbles[..., :16] | nibbles[..., 16:] << 4).to(torch.uint8)
    if bits == 4:
        return [low]
    fifth = (codes >> 4).view(*codes.shape[:2], 4, 8) << torch.arange(8, dtype=torch.int16)
    return [fifth.sum(-1).to(torch.uint8), low]


def check_architecture(config: Any) -> None:
    """Refuse what no file is written for, before any work.

    Raises:
        TensorNetError: an architecture or a kind of rotary embedding that is not known here.
        MissingExtraError: the package ``gguf`` is not installed.
    """
    _gguf()
    if config.model_type not in _ARCHITECTURES:
        raise TensorNetError(f"GGUF files are written for {', '.join(_ARCHITECTURES)}, not for {config.model_type!r}")
    if (kind := _rope(config).get("rope_type", "default")) != "default":
        raise TensorNetError(f"rotary embeddings of type {kind!r} are not written to GGUF files; only 'default' is")


def write(file: Path, config: Any, folder: Path, tensors: Mapping[str, Stored]) -> list[str]:
    """Write a file of a model's tensors by their names in transformers; returns what is to be said of it."""
    gguf = _gguf()
    name, interleaved = _ARCHITECTURES[config.model_type]
    writer = gguf.GGUFWriter(file, name)
    heads, pairs = config.num_attention_heads, getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_name(Path(config.name_or_path or folder).name)
    writer.add_quantized_by(f"tensornet_compress {__version__}")
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(pairs)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(_rope(config).get("rope_theta", 10000.0))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    said = _add_tokenizer(writer, folder, config.vocab_size)
    if any(kind == "sliding_attention" for kind in getattr(config, "layer_types", None) or ()):
        said.append("attention of sliding windows is written as full attention: answers are equal within a window only")
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, name.upper()), config.num_hidden_layers)
    for key, stored in tensors.items():
        known = names.get_name(key, try_suffixes=(".weight", ".bias"))
        if known is None:
            raise TensorNetError(f"the tensor {key!r} has no place in a GGUF file of a {name!r}")
        data = stored.data
        if interleaved and any(part in key for part in ("q_proj", "k_proj")):
            data = _interleaved(data, heads if "q_proj" in key else pairs)
        writer.add_tensor(known, data.numpy(), raw_dtype=gguf.GGMLQuantizationType[stored.kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return said


def _interleaved(rows: Tensor, heads: int) -> Tensor:
    """Rows of queries or keys with the two halves of each head's rotary pairs side by side."""
    if rows.ndim == 1:  # a bias, as bytes of fp32
        return _interleaved(rows.view(-1, 4), heads).flatten()
    half = len(rows) // heads // 2
    return rows.view(heads, 2, half, -1).transpose(1, 2).reshape(len(rows), -1)


def _rope(config: Any) -> dict[str, Any]:
    return dict(getattr(config, "rope_parameters", None) or {})


def _add_tokenizer(writer: Any, folder: Path, size: int) -> list[str]:
    """The byte-level pairs of ``tokenizer.json``; other kinds of tokenizers are left out, and said to be."""
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"model": {}}
    model, steps = content["model"], json.dumps(content.get("pre_tokenizer"))
    if model.get("type") != "BPE" or "ByteLevel" not in steps:
        writer.add_tokenizer_model("no_vocab")
        return ["the file holds no tokenizer: only byte-level BPE in tokenizer.json is written"]
    words = {number: word for word, number in model["vocab"].items()}
    kinds = dict.fromkeys(words, _NORMAL)
    for token in content.get("added_tokens", ()):
        words[token["id"]], kinds[token["id"]] = token["content"], _CONTROL if token["special"] else _USER
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_splitting(steps))
    writer.add_token_list([words.get(number, f"[unused{number}]") for number in range(size)])
    writer.add_token_types([kinds.get(number, _UNUSED) for number in range(size)])
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]])
    config_file = folder / "tokenizer_config.json"
    options = json.loads(config_file.read_text(encoding="utf-8")) if config_file.is_file() else {}
    numbers = {word: number for number, word in words.items()}
    for role, add in (("bos", writer.add_bos_token_id), ("eos", writer.add_eos_token_id), ("pad", writer.add_pad_token_id)):
        token = options.get(f"{role}_token")
        token = token.get("content") if isinstance(token, dict) else token
        if token in numbers:
            add(numbers[token])
    writer.add_add_bos_token(bool(options.get("add_bos_token", False)))
    template = folder / "chat_template.jinja"
    if template.is_file():
        writer.add_chat_template(template.read_text(encoding="utf-8"))
    return []


def _splitting(steps: str) -> str:
    """llama.cpp's name of how a tokenizer splits text before it joins pairs, from its pre-tokenizer as JSON."""
    if "{1,3}" in steps:
        return "llama-bpe"
    if "Split" in steps and "\\\\p{N}" in steps:
        return "qwen2"
    return "smollm" if "Digits" in steps else "gpt-2"


def _gguf() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise MissingExtraError(f"GGUF files need the 'hf' extra ({error}); pip install 'tensornet-compress[hf]'") from error
    return gguf

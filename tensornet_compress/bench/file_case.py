"""What a method that makes a whole model file is given and what it gives back."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from tensornet_compress.bench.registry import Method, Registry
from tensornet_compress.compressing import Budget, compress, model_nbytes, survey_model
from tensornet_compress.files import load, save
from tensornet_compress.nn import KeptModules

Decode = Callable[[Tensor, int], object]


@dataclass(frozen=True)
class WholeFile:
    """A compressed model as it was read back from disk.

    ``model``: a module whose answers have ``logits``; ``nbytes``: its stored tensors, ``file_nbytes``: everything written, with
    tokenizer and header; ``resident_nbytes``: its tensors in memory; ``load_seconds``: from disk to memory; ``decode``:
    continues a prompt (1, n) greedily by so many tokens, for the clock. The last four are None where they are not known.
    """

    model: Any
    nbytes: int
    file_nbytes: int | None = None
    resident_nbytes: int | None = None
    load_seconds: float | None = None
    decode: Decode | None = None
    note: str = ""
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass
class FileCase:
    """A causal language model in fp32 with its tokenizer and calibration ids, and a folder to write into."""

    name: str
    model: Any
    tokenizer: Any
    batches: list[Tensor]
    folder: Path
    memo: dict[Any, Any] = field(default_factory=dict)

    @cached_property
    def weights(self) -> int:
        """Numbers of the model, shared ones counted once."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    @cached_property
    def kept(self) -> KeptModules:
        """The original modules, taken while the model has them."""
        return KeptModules(self.model)

    def place(self) -> Path:
        """A fresh path in the folder."""
        self.memo["files"] = self.memo.get("files", 0) + 1
        return self.folder / str(self.memo["files"])


FILE_METHODS: Registry[Method[FileCase, WholeFile]] = Registry("file method")


def folder_nbytes(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def resident_nbytes(model: nn.Module) -> int:
    """Bytes of a model's tensors in memory, shared ones counted once."""
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


@torch.no_grad()
def decode(model: Any, prompt: Tensor, tokens: int) -> None:
    """Greedy decoding with a cache, token by token."""
    from transformers import DynamicCache

    cache, ids = DynamicCache(config=model.config), prompt
    for _ in range(tokens):
        logits = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        ids = logits[:, -1:].argmax(-1)


def compressed_file(method: Any, case: FileCase, bits: float) -> WholeFile:
    """Survey once, spend ``bits`` on each number of the model, write the folder and load it again."""
    key = ("survey", method)
    if key not in case.memo:
        case.memo[key] = survey_model(case.model, case.batches, method=method, workers=1)
    budget = Budget(nbytes=int(bits * case.weights / 8))
    try:
        report = compress(case.model, budget, case.batches, method=method, workers=1, survey=case.memo[key])
        folder = save(case.model, case.place(), case.tokenizer, report)
    finally:
        case.kept.put_back()
    load(folder)  # compiles what decoding needs, once a machine
    began = perf_counter()
    model = load(folder)
    seconds = perf_counter() - began
    return WholeFile(
        model,
        model_nbytes(model),
        folder_nbytes(folder),
        resident_nbytes(model),
        seconds,
        partial(decode, model),
        "; ".join(report.notes),
        {"metric": report.metric, "calibration_windows": len(torch.cat(case.batches))},
    )


def decoded_file(case: FileCase, weights: Mapping[str, Tensor], nbytes: int, note: str) -> WholeFile:
    """A peer's tensors without a program of their own: the decoded ``weights``, by parameter, in a copy of the model."""
    model = copy.deepcopy(case.model)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, weight in weights.items():
            parameters[name].copy_(weight)
    return WholeFile(model, nbytes, note=note)


for _name, _method, _explanation in (
    ("ours", "auto", "entropy-coded integers and two cores of such, embeddings included, one step for everything"),
    ("ours-coded", "coded", "entropy-coded integers, embeddings included, one step for everything"),
):
    FILE_METHODS.add(Method(_name, partial(compressed_file, _method), _explanation, ours=True))

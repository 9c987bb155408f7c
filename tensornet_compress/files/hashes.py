"""Hashes of what files hold, and the refusal of numbers that mean damage."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor
from xxhash import xxh3_128

from tensornet_compress.errors import CheckpointError, TensorNetError

HASHES = "tensornet_compress.hashes"
"""Where a file that stands alone keeps its hashes in its header."""
_FEW_BYTES = 1 << 20
"""Hashing fewer takes less time than starting threads."""
_SEAL = re.compile(r'("checksum": ?)"([0-9a-f]*)"')
_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


def digest(tensor: Tensor) -> str:
    """XXH3-128 over a line with dtype (as safetensors calls it) and sizes, and the bytes, of a tensor on the processor."""
    kind = _NAMES.get(tensor.dtype, str(tensor.dtype))
    found = xxh3_128(f"{' '.join([kind, *map(str, tensor.shape)])}\n".encode())
    flat = tensor.detach().contiguous().reshape(-1)
    found.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
    return found.hexdigest()


def digests(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """``digest`` of every tensor, on several threads where that pays."""
    if sum(tensor.nbytes for tensor in tensors.values()) < _FEW_BYTES:
        return {name: digest(tensor) for name, tensor in tensors.items()}
    threads = min(4, os.cpu_count() or 1)
    by_size = sorted(tensors, key=lambda name: -tensors[name].nbytes)
    with ThreadPoolExecutor(threads) as pool:
        # A share for each: handing out tensors one by one takes as long as hashing them.
        shares = pool.map(
            lambda names: [(name, digest(tensors[name])) for name in names], [by_size[i::threads] for i in range(threads)]
        )
        found = dict(pair for share in shares for pair in share)
    return {name: found[name] for name in tensors}


def header_digest(texts: Mapping[str, str]) -> str:
    """XXH3-128 over the texts of a header: names in ascending order, each with a line feed and its text."""
    lines = "".join(f"{name}\n{text}" for name, text in sorted(texts.items()) if name != HASHES)
    return _text_digest(lines)


def file_digest(path: Path) -> str:
    """XXH3-128 over the bytes of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, xxh3_128).hexdigest()


def sealed(text: str) -> str:
    """JSON text whose first ``checksum`` is empty, with the XXH3-128 over the text there."""
    return _SEAL.sub(rf'\g<1>"{_text_digest(text)}"', text, count=1)


def check_seal(text: str, where: str) -> None:
    """Raises CheckpointError unless JSON text is as ``sealed`` gave it."""
    found = _SEAL.search(text)
    if found is None or found[2] != _text_digest(_SEAL.sub(r'\g<1>""', text, count=1)):
        raise CheckpointError(f"{where} is damaged: it is not what was written; get a whole copy of it")


def _text_digest(text: str) -> str:
    return xxh3_128(text.encode()).hexdigest()


def check_digests(tensors: Mapping[str, Tensor], hashes: Mapping[str, str], where: str) -> None:
    """Raises CheckpointError unless the tensors are those that were hashed, and no others."""
    if missing := sorted(hashes.keys() ^ tensors.keys()):
        raise CheckpointError(f"{where} does not hold the tensors that its hashes name: {missing[:4]}; get a whole copy of it")
    found = digests(tensors)
    if wrong := [name for name in tensors if found[name] != hashes[name]]:
        raise CheckpointError(
            f"{where} is damaged: the bytes of {wrong[0]!r}"
            + (f" and {len(wrong) - 1} more tensors" if len(wrong) > 1 else "")
            + " are not those that were written; get a whole copy of it"
        )


def refuse_nan(name: str, tensor: Tensor) -> None:
    """Raises TensorNetError for a tensor that holds NaN."""
    if tensor.is_floating_point() and tensor.numel():
        # The extremes are NaN when any number is, and take one pass without a copy.
        low = tensor.detach().aminmax().min if tensor.itemsize > 1 else tensor.detach().float().min()
        if bool(low.isnan()):
            raise TensorNetError(f"tensor {name!r} holds NaN; what made or keeps it is broken")

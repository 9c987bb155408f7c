"""The tensors of a saved folder: in one file, or in several that an index names, as Hugging Face folders have them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from tensornet_compress.errors import CheckpointError
from tensornet_compress.files.index import INDEX, weight_files
from tensornet_compress.files.manifest import TENSORS
from tensornet_compress.files.reading import open_tensors
from tensornet_compress.files.whole import write_tensors

LARGEST = 5 * 10**9
"""Bytes of tensors in one file, unless one tensor alone has more."""


class StoredTensors:
    """Tensors of one or several files by name, read when asked for."""

    def __init__(self, files: Mapping[str, Any]):
        self._files = files

    def keys(self) -> list[str]:
        """Names of all tensors."""
        return list(self._files)

    def get_tensor(self, name: str) -> Tensor:
        """One tensor.

        Raises:
            CheckpointError: there is none of that name.
        """
        tensor: Tensor = self._of(name).get_tensor(name)
        return tensor

    def get_slice(self, name: str) -> Any:
        """One tensor's shape and dtype, and parts of it."""
        return self._of(name).get_slice(name)

    def _of(self, name: str) -> Any:
        if name not in self._files:
            raise CheckpointError(f"there is no tensor {name!r} in the file")
        return self._files[name]


@contextmanager
def open_folder(folder: Path) -> Iterator[StoredTensors]:
    """The tensors of a folder, inside a block.

    Raises:
        CheckpointError: a file is missing or damaged, or the index does not fit.
    """
    places = weight_files(folder) if (folder / INDEX).exists() else {}
    with ExitStack() as stack:
        if not places or (folder / TENSORS).exists():
            file = stack.enter_context(open_tensors(folder / TENSORS))
            yield StoredTensors(dict.fromkeys(file.keys(), file))
            return
        opened = {path: stack.enter_context(open_tensors(path)) for path in sorted(set(places.values()))}
        yield StoredTensors({name: opened[path] for name, path in places.items()})


def tensor_files(folder: Path) -> list[Path]:
    """The files that the tensors of a folder lie in."""
    return [folder / TENSORS] if (folder / TENSORS).exists() else sorted(set(weight_files(folder).values()))


def written_before(folder: Path) -> set[str]:
    """Names of files of tensors, and of their index, that an earlier save may have left in a folder."""
    return {TENSORS, INDEX, *(path.name for path in folder.glob("model-?????-of-?????.safetensors"))}


def write_shards(folder: Path, tensors: Mapping[str, Tensor], largest: int = LARGEST) -> None:
    """Write tensors in their order to files of at most ``largest`` bytes each; to one file where that suffices."""
    parts: list[dict[str, Tensor]] = [{}]
    held = 0
    for name, tensor in tensors.items():
        if parts[-1] and held + tensor.nbytes > largest:
            parts.append({})
            held = 0
        parts[-1][name] = tensor
        held += tensor.nbytes
    if len(parts) == 1:
        write_tensors(folder / TENSORS, tensors, {"format": "pt"}, hashed=False)
        return
    names = [f"model-{number:05d}-of-{len(parts):05d}.safetensors" for number in range(1, len(parts) + 1)]
    for name, part in zip(names, parts):
        write_tensors(folder / name, part, {"format": "pt"}, hashed=False)
    places = {tensor: name for name, part in zip(names, parts) for tensor in part}
    total = sum(tensor.nbytes for tensor in tensors.values())
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}, indent=2)
    (folder / INDEX).write_text(text + "\n", encoding="utf-8")

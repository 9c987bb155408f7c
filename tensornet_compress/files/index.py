"""Which files a model's tensors lie in: those that its own index names, and no others that happen to lie beside them."""

from __future__ import annotations

from pathlib import Path

from tensornet_compress.errors import CheckpointError
from tensornet_compress.files.reading import open_tensors, read_json

_SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_OLD, _OLD_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"


def weight_files(folder: str | Path) -> dict[str, Path]:
    """Tensor name -> safetensors file, of the files that transformers loads the model in ``folder`` from; empty where it would
    load no safetensors.

    Raises:
        CheckpointError: the index is damaged, names a file outside the folder, or a tensor that its file does not hold.
    """
    folder = Path(folder)
    if (folder / _SINGLE).exists():
        return dict.fromkeys(_names(folder / _SINGLE), folder / _SINGLE)
    if not (folder / INDEX).exists():
        if (folder / _OLD_INDEX).exists() and not (folder / _OLD).exists():
            _shards(folder / _OLD_INDEX, ".bin")
        return {}
    where, shards = repr(str(folder / INDEX)), _shards(folder / INDEX, ".safetensors")
    held = {name: _names(folder / name) for name in set(shards.values())}
    for tensor, name in shards.items():
        if tensor not in held[name]:
            raise CheckpointError(f"{where} says that {tensor!r} lies in {name!r}, which does not hold it; get a whole copy")
    return {tensor: folder / name for tensor, name in shards.items()}


def files_state(folder: Path) -> dict[str, list[int]]:
    """Size and time of every file that a model's folder holds: any of them may be weights, or say how they are read."""
    weight_files(folder)
    files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    return {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in files}


def _shards(index: Path, ending: str) -> dict[str, str]:
    """Tensor name -> name of its file in the index's own folder."""
    where, data = repr(str(index)), read_json(index)
    shards = data.get("weight_map") if isinstance(data, dict) else None
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise CheckpointError(f"{where} has no weight_map of tensor names and file names; the file is damaged")
    for name in set(shards.values()):
        if Path(name).name != name or not name.endswith(ending):
            raise CheckpointError(f"{where} names {name!r}, which is no {ending} file of the folder itself")
    return shards


def _names(path: Path) -> set[str]:
    with open_tensors(path) as file:
        return set(file.keys())

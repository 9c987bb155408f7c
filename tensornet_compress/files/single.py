"""One network in one file: safetensors with the spec in its header; fibre orders are packed, as their bytes are counted."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from tensornet_compress.errors import CheckpointError, TensorNetError
from tensornet_compress.files.limits import check_size
from tensornet_compress.files.manifest import spec_with_permutations, spec_without_permutations
from tensornet_compress.files.reading import read_tensors
from tensornet_compress.files.whole import write_tensors
from tensornet_compress.tensor import NetworkSpec, TensorArray, TensorNetwork, expected_tensors

_KEY = "tensornet_compress.network"
_NAME = "network."


def save_network(network: TensorNetwork, path: str | Path) -> int:
    """Write a network to one file, whole or not at all; returns the bytes of the file (``network.nbytes`` and its header).

    >>> import torch, tensornet_compress as tnc
    >>> network = tnc.to_network(torch.randn(16, 16), max_error=0.1)
    >>> tnc.save_network(network, "network.safetensors") > network.nbytes
    True
    """
    tensors = {_NAME + name: part for name, part in network.stored_tensors().items()}
    return write_tensors(path, tensors, {_KEY: spec_without_permutations(network.spec).to_json()})


def load_network(path: str | Path, verify: bool = True) -> TensorNetwork:
    """Read a network written by ``save_network``; ``verify``: check the hashes in its header (older files have none).

    >>> import torch, tensornet_compress as tnc
    >>> network = tnc.to_network(torch.randn(16, 16), max_error=0.1)
    >>> size = tnc.save_network(network, "network.safetensors")
    >>> torch.equal(tnc.load_network("network.safetensors").to_dense(), network.to_dense())
    True

    Raises:
        CheckpointError: the file is missing, damaged, or holds something else.
    """
    stored, header = read_tensors(path, verify)
    tensors = {name.removeprefix(_NAME): part for name, part in stored.items()}
    if _KEY not in header:
        raise CheckpointError(f"{str(path)!r} holds no network; load reads folders, kv.load_cache caches")

    def read(name: str) -> Tensor:
        if name not in tensors:
            raise CheckpointError(f"the packed order {name!r} is missing")
        return tensors[name]

    try:
        described = NetworkSpec.from_json(header[_KEY])
        check_size(described, repr(str(path)))
        spec = spec_with_permutations(described, read)
        expected = expected_tensors(spec)
        for name, (_, dtype) in expected.items():
            if name in tensors and tensors[name].dtype != dtype:
                raise CheckpointError(f"part {name!r} is stored as {tensors[name].dtype}, expected {dtype}")
        orders = {name for name in expected if "order" in name}
        return TensorNetwork(spec, {name: part for name, part in tensors.items() if name not in orders})
    except TensorNetError as error:
        raise CheckpointError(f"{str(path)!r} does not hold a whole network: {error}") from error


def open_tensor(path: str | Path) -> TensorArray:
    """A network in a file as an array: ``x[10:20, :, 3]``, ``x.mean(axis=0)``, ``np.asarray(x)``; see ``TensorArray``.

    >>> import torch, tensornet_compress as tnc
    >>> size = tnc.save_network(tnc.to_network(torch.eye(16), max_error=0.1), "field.tnz")
    >>> tnc.open_tensor("field.tnz")[3, 2:5]
    array([0., 1., 0.], dtype=float32)

    Raises:
        CheckpointError: as ``load_network``.
    """
    return TensorArray(load_network(path))

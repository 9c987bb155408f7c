"""When entropy-coded parts of modules are decoded, and whether whole cores stay so."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import nn

from tensornet_compress.errors import CheckpointError, TensorNetError
from tensornet_compress.nn.module import DECODES, NetworkModule


def decode_all(modules: Mapping[str, NetworkModule]) -> None:
    """Decode the entropy-coded parts of modules that were made ``undecoded``, as many at a time as PyTorch has threads.

    Raises:
        CheckpointError: stored parts are damaged; the first such module is named.
    """

    def decode(name: str) -> None:
        try:
            modules[name]._make_resident()
        except (TensorNetError, RuntimeError, ValueError) as error:
            raise CheckpointError(f"the tensors of {name!r} are damaged: {error}") from error

    if DECODES.get():
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            list(pool.map(decode, modules))


@contextmanager
def undecoded() -> Iterator[None]:
    """Entropy-coded parts of modules made inside are decoded when they are first used: for models that are only saved."""
    before = DECODES.set(False)
    try:
        yield
    finally:
        DECODES.reset(before)


@contextmanager
def decoded(model: nn.Module) -> Iterator[None]:
    """Keep decoded cores of every network module in memory: faster decoding of many short steps, no longer small.

    Inside the context the cores do not follow changes of the parameters.

    >>> import torch, tensornet_compress as tnc
    >>> model = torch.nn.Sequential(torch.nn.Linear(32, 32))
    >>> report = tnc.compress(model, tnc.Budget(bits_per_weight=8.5), allocator="energy")
    >>> with tnc.decoded(model):
    ...     answers = [model(torch.randn(1, 32)) for _ in range(10)]
    """
    modules = [module for module in model.modules() if isinstance(module, NetworkModule)]
    for module in modules:
        module._held = {}
    try:
        yield
    finally:
        for module in modules:
            module._held = None

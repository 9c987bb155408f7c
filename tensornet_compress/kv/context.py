"""``with compressed(model, bits=2.0): model.generate(...)``."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

from torch import nn

from tensornet_compress.errors import TensorNetError
from tensornet_compress.kv.cache import CompressedCache
from tensornet_compress.kv.storage.cache import StorageCache


@contextmanager
def compressed(
    model: nn.Module, bits: float = 2.0, *, mode: Literal["live", "storage"] = "live", **options: Any
) -> Iterator[list[CompressedCache]]:
    """Inside, every ``model.generate(...)`` that brings no cache gets a fresh ``CompressedCache``.

    On leaving, the model is as it was and storage caches are frozen. Yields the list of the caches made, latest last.

    Args:
        bits, mode, options: as for ``CompressedCache``.

    Raises:
        TensorNetError: the model has no ``generate``.
    """
    if not callable(getattr(model, "generate", None)):
        raise TensorNetError(f"{type(model).__name__} has no generate(); pass a CompressedCache to its forward instead")
    made: list[CompressedCache] = []
    own = model.__dict__.get("generate")
    plain: Any = model.generate

    @functools.wraps(plain)
    def generate(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("past_key_values") is None:
            kwargs["past_key_values"] = CompressedCache(model, bits=bits, mode=mode, **options)
            made.append(kwargs["past_key_values"])
        return plain(*args, **kwargs)

    object.__setattr__(model, "generate", generate)
    try:
        yield made
    finally:
        if own is None:
            object.__delattr__(model, "generate")
        else:
            object.__setattr__(model, "generate", own)
        for cache in made:
            if isinstance(cache, StorageCache):
                cache.freeze()

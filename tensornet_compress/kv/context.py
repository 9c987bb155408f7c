"""``with compressed(model, bits=2.0): model.generate(...)``."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

from torch import nn
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from tensornet_compress.errors import TensorNetError
from tensornet_compress.kv.cache import CompressedCache
from tensornet_compress.kv.rope import text_config
from tensornet_compress.kv.storage.cache import StorageCache

_LATE = 16
"""Tokens that a cache may lack at the end of a generation: the last one, and drafts."""


class _Pair(EncoderDecoderCache):
    """Also crops, repeats and picks rows, as assisted decoding asks; the stock class does so for its own caches only."""

    def check_dynamic_cache(self, method: str) -> None:
        """Nothing is refused."""


@contextmanager
def compressed(
    model: nn.Module, bits: float = 2.0, *, mode: Literal["live", "storage"] = "live", **options: Any
) -> Iterator[list[CompressedCache]]:
    """Inside, every ``model.generate(...)`` that uses a cache and brings none gets a fresh ``CompressedCache``.

    On leaving, the model is as it was and storage caches are frozen. Yields the list of the caches made, latest last. Of an
    encoder-decoder model, what the decoder caches of itself is compressed, what it caches of the encoder stays exact.

    Args:
        bits, mode, options: as for ``CompressedCache``.

    Raises:
        TensorNetError: the model has no ``generate``.

    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = dict(vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4)
    >>> model = LlamaForCausalLM(LlamaConfig(**sizes, eos_token_id=None))
    >>> with compressed(model, bits=3.0) as caches:
    ...     ids = model.generate(torch.ones(1, 200, dtype=torch.int64), max_new_tokens=4, do_sample=False)
    >>> caches[-1].report().sealed_tokens
    128
    """
    if not callable(getattr(model, "generate", None)):
        raise TensorNetError(f"{type(model).__name__} has no generate(); pass a CompressedCache to its forward instead")
    made: list[CompressedCache] = []
    own = model.__dict__.get("generate")
    plain: Any = model.generate

    @functools.wraps(plain)
    def generate(*args: Any, **kwargs: Any) -> Any:
        cache: CompressedCache | None = None
        if kwargs.get("past_key_values") is None and _uses_cache(model, args, kwargs):
            if kwargs.get("cache_implementation") is not None:
                raise TensorNetError(
                    f"generate(cache_implementation={kwargs['cache_implementation']!r}) asks for a cache of another kind; "
                    "leave that out inside kv.compressed"
                )
            cache = CompressedCache(model, bits=bits, mode=mode, **options)
            if "past_key_values" not in inspect.signature(model.forward).parameters:
                raise TensorNetError(f"{type(model).__name__} takes no past_key_values, so it keeps no cache to compress")
            made.append(cache)
            kwargs["past_key_values"] = cache
            if cache.paired:
                kwargs["past_key_values"] = _Pair(cache, DynamicCache(config=text_config(model)))
        found = plain(*args, **kwargs)
        length = getattr(found, "sequences", found).shape[-1]
        if cache is not None and not cache.paired and cache.get_seq_length() + _LATE < length:
            warnings.warn(
                f"{type(model).__name__} left the cache that it was given at {cache.get_seq_length()} of {length} tokens and "
                "went on with one of its own, which is not compressed",
                stacklevel=2,
            )
        return found

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


def _uses_cache(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call of ``generate(inputs, generation_config, ...)`` keeps a cache: what the call says, its configuration, then
    that of the model; the first that says anything counts."""
    given = kwargs.get("generation_config", args[1] if len(args) > 1 else None)
    said = [kwargs.get("use_cache"), *(getattr(config, "use_cache", None) for config in (given, model.generation_config))]
    return next((bool(use) for use in said if use is not None), True)

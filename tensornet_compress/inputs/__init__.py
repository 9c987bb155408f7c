"""Real models and texts that need no network: the inputs of the demo, the tests and the benchmarks."""

from tensornet_compress.inputs.models import (
    EMBEDDED_MODELS,
    load_causal_lm,
    load_encoder,
    load_tokenizer,
    resolve_model,
)
from tensornet_compress.inputs.texts import calibration_windows, heldout_windows, token_windows, wikipedia_articles

__all__ = [
    "EMBEDDED_MODELS",
    "calibration_windows",
    "heldout_windows",
    "load_causal_lm",
    "load_encoder",
    "load_tokenizer",
    "resolve_model",
    "token_windows",
    "wikipedia_articles",
]

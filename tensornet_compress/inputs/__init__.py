"""Real models and texts that need no network: the inputs of the demo, the tests and the benchmarks."""

from tensornet_compress.inputs.models import (
    EMBEDDED_MODELS,
    Kind,
    hub_source,
    kind_of,
    load_causal_lm,
    load_encoder,
    load_model,
    load_tokenizer,
    model_kind,
    require_text,
    resolve_model,
    vocabulary_size,
)
from tensornet_compress.inputs.probes import agreement_pairs, last_words, rare_words, zero_shot_sets
from tensornet_compress.inputs.texts import (
    calibration_windows,
    domain_windows,
    heldout_articles,
    heldout_windows,
    token_windows,
    wikipedia_articles,
)

__all__ = [
    "EMBEDDED_MODELS",
    "Kind",
    "agreement_pairs",
    "calibration_windows",
    "domain_windows",
    "heldout_articles",
    "heldout_windows",
    "hub_source",
    "kind_of",
    "last_words",
    "load_causal_lm",
    "load_encoder",
    "load_model",
    "load_tokenizer",
    "model_kind",
    "rare_words",
    "require_text",
    "resolve_model",
    "token_windows",
    "vocabulary_size",
    "wikipedia_articles",
    "zero_shot_sets",
]

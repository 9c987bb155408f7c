"""Quality and bytes of models, measured."""

from tensornet_compress.evaluate.quality import (
    LanguageQuality,
    Reference,
    SentenceQuality,
    compare_embeddings,
    evaluate_cache,
    evaluate_language,
    sentence_embeddings,
)

__all__ = [
    "LanguageQuality",
    "Reference",
    "SentenceQuality",
    "compare_embeddings",
    "evaluate_cache",
    "evaluate_language",
    "sentence_embeddings",
]

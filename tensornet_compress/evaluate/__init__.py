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
from tensornet_compress.evaluate.suite import Scored, Suite, score_texts

__all__ = [
    "LanguageQuality",
    "Reference",
    "Scored",
    "SentenceQuality",
    "Suite",
    "compare_embeddings",
    "evaluate_cache",
    "evaluate_language",
    "score_texts",
    "sentence_embeddings",
]

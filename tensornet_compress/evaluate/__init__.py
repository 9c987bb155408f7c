"""Quality of models, measured."""

from tensornet_compress.evaluate.language import LanguageQuality, Reference, evaluate_language
from tensornet_compress.evaluate.sentences import SentenceQuality, compare_embeddings, sentence_embeddings

__all__ = ["LanguageQuality", "Reference", "SentenceQuality", "compare_embeddings", "evaluate_language", "sentence_embeddings"]

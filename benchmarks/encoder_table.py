"""all-MiniLM-L6-v2 (true fp32 weights): cosine of sentence embeddings to the original's, at equal bytes.

    python benchmarks/encoder_table.py

Round to nearest gets the smallest of its formats at or above each budget, so it is given more bytes than the other rows.
"""

from __future__ import annotations

from typing import Any

from common import Lines, original_layers, write_result

import tensornet_compress as tnc
from tensornet_compress.compressing import survey_model
from tensornet_compress.evaluate import compare_embeddings, sentence_embeddings
from tensornet_compress.inputs import load_encoder, load_tokenizer, wikipedia_articles

MODEL = "all-minilm-l6-v2"
METHODS = ("dense", "svd", "tt", "ttm", "tree", "auto")
ROUND_TO_NEAREST = {8.0: "int8g64", 4.0: "int4g64", 3.0: "int3g64"}
SENTENCES = 256


def main() -> None:
    tokenizer, model = load_tokenizer(MODEL), load_encoder(MODEL)
    articles = wikipedia_articles()
    split = int(0.6 * len(articles))
    calibration = [_encode(tokenizer, _sentences(articles[:split], 256)[i : i + 16]) for i in range(0, 256, 16)]
    heldout = _sentences(articles[split:], SENTENCES)
    original = sentence_embeddings(model, tokenizer, heldout)
    rows: list[dict[str, Any]] = []

    def record(label: str, bits: float, budget: float, **options: Any) -> None:
        with original_layers(model):
            report = tnc.compress(model, tnc.Budget(bits_per_weight=budget), progress=Lines(), **options)
            quality = compare_embeddings(original, sentence_embeddings(model, tokenizer, heldout))
        row = {"method": label, "budget_bits_per_weight": bits, "notes": list(report.notes)}
        rows.append(row | report.summary() | quality.model_dump())
        print(f"{label:6} {report.bits_per_weight:.3f} bits: cosine {quality.mean_cosine:.5f}", flush=True)

    for bits, name in ROUND_TO_NEAREST.items():
        record("rtn", bits, bits + 0.5, method="dense", formats=[name], allocator="uniform")
    survey = survey_model(model, calibration, method="auto", progress=Lines())
    for method in METHODS:
        for bits in ROUND_TO_NEAREST:
            record(method, bits, bits, method=method, survey=survey)
    settings = {"sentences": SENTENCES, "calibration_sentences": 256, "round_to_nearest": ROUND_TO_NEAREST}
    write_result("encoder_table", {"model": MODEL, "settings": settings, "rows": rows})


def _sentences(articles: tuple[str, ...], count: int) -> list[str]:
    """The first long paragraphs' openings, one article after the other."""
    lines = [line[:400] for article in articles for line in article.split("\n") if len(line) > 100]
    return lines[:: max(1, len(lines) // count)][:count]


def _encode(tokenizer: Any, sentences: list[str]) -> dict[str, Any]:
    encoded = tokenizer(sentences, padding=True, truncation=True, max_length=128, return_tensors="pt")
    return {name: encoded[name] for name in ("input_ids", "attention_mask")}


if __name__ == "__main__":
    main()

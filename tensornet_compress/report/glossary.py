"""The words of the page, each explained once; only those are listed that this page uses."""

from __future__ import annotations

from tensornet_compress.report.numbers import plain
from tensornet_compress.report.schema import Result

_ALWAYS = {
    "Ours and peers": "“Ours” is what this package chose by its own search and allocation of bytes. Peers are other "
    "people's methods, "
    "or plain ones that anyone would try first, run on the same input.",
    "Equal bytes": "Everything that has to be stored is counted: numbers, scales, zero points, orders, tables. Methods "
    "are compared "
    "under the same limit on that sum.",
}
_TASK_TERMS = {
    "weights": {
        "Bits per weight": "8 × the stored bytes of the compressed layers / the number of their weights. The usual "
        "original has 16 or 32.",
        "KL divergence": "How far the model's predictions moved, in nats per token, on text it was not fitted to. 0 means "
        "the same "
        "predictions; below 0.1 the answers hardly differ; above 1 the model is a different one.",
        "Perplexity": "Among how many next words the model hesitates, on average. The compressed model should come close "
        "to the "
        "original's value.",
        "Number format": "int4g64 means whole numbers of 4 bits in groups of 64 that share a scale; a letter z or o adds "
        "a zero point "
        "or an offset for each group. bf16, fp16 and fp32 are floating-point numbers of 16 and 32 bits.",
    },
    "kv": {
        "KV cache": "While a model generates, it keeps keys and values of every earlier token. For long texts this memory "
        "outgrows the "
        "model, so it is worth compressing.",
        "Bits per element": "Stored bits for each number of the cache. Uncompressed caches take 16 or 32.",
        "Profile": "What calibration learned about a model's cache: stored once, shared by all its caches, and counted "
        "beside them.",
        "Live and storage": "A live cache is read in its compressed form at every step. A storage cache is smaller and is "
        "decoded "
        "once before it is used.",
    },
    "search": {
        "Ordering": "The order in which the entries of a tensor are laid out before it is cut into cores. A good one "
        "makes singular "
        "values fall sooner; its own price in bytes is counted.",
        "Null control": "The same search on the same entries shuffled. A gain that appears there too is luck, and is not "
        "accepted.",
        "Relative error": "Size of the difference over the size of the original: 0.1 keeps the tensor within 10 %.",
    },
    "speed": {"Ratio of speeds": "Above 1 is faster than what it is compared with, below 1 slower."},
}
_STRUCTURE = {
    "Tensor network, core, bond, rank": "A large tensor written as small ones (cores) that are multiplied along shared "
    "indices (bonds). "
    "A bond's rank is the size of that index: the smaller, the fewer numbers. One core alone is the plain, dense tensor.",
    "Open leg": "An index of a core that belongs to the original tensor.",
}
_SPECTRUM = {
    "Spectrum": "The singular values of a tensor cut in two, from the largest down. What is dropped at the end of the "
    "list is the error."
}


def glossary(result: Result) -> tuple[tuple[str, str], ...]:
    """Words in the order of their use, then what each measure means."""
    rows = result.rows
    terms = dict(_ALWAYS)
    for task, more in _TASK_TERMS.items():
        if any(row.task == task for row in rows):
            terms |= more
    if any(row.layers or row.drawings for row in rows) or any(row.task == "search" for row in rows):
        terms |= _STRUCTURE
    if any(row.spectra for row in rows):
        terms |= _SPECTRUM
    used = {name for row in rows for name in row.values}
    for name, measure in result.measures.items():
        if name in used and measure.explanation:
            unit = f" ({plain(measure.unit)})" if measure.unit else ""
            terms[plain(measure.title) + unit] = plain(measure.explanation)
    return tuple(terms.items())

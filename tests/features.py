"""What of the package is tried on every family of ``tests.architectures``.

``python -m tests.features`` runs all features on all families and writes the table of docs/architectures.md; the suite runs
every other of these cells and compares it with the page.
"""

from __future__ import annotations

import copy
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Collection
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

import tensornet_compress as tnc
import tensornet_compress.kv as kv
from tensornet_compress.calibrate.batches import kept_output, model_inputs
from tensornet_compress.compressing import model_nbytes
from tensornet_compress.errors import TensorNetError
from tests.architectures import FAMILIES, ids, inputs, sharp

PAGE = Path(__file__).parents[1] / "docs" / "architectures.md"
_NOT_ASKED = "–"
_CPU = torch.device("cpu")


class WrongError(AssertionError):
    """A cell in which the package gives something else than it should, and does not say so."""


class NotAskedError(Exception):
    """A cell of a feature that transformers does not have for this family."""


def _require(true: bool, what: str) -> None:
    if not true:
        raise WrongError(what)


def _close(found: Tensor, wanted: Tensor, share: float, what: str) -> None:
    """Within a share of the spread of what is wanted."""
    _require(found.shape == wanted.shape, f"{what}: shape {tuple(found.shape)} for {tuple(wanted.shape)}")
    with torch.autocast("cpu", enabled=False):
        found, wanted = found.double(), wanted.double()
        gap, spread = float((found - wanted).norm()), float((wanted - wanted.mean()).norm())
    _require(gap <= share * spread, f"{what}: off by {gap / max(spread, 1e-30):.3g} of the spread")


@torch.no_grad()
def _answer(model: Any, name: str) -> Tensor:
    return kept_output(model, model_inputs(inputs(name), _CPU))[0]


@lru_cache(maxsize=2)
def _compressed(name: str, **options: Any) -> tuple[Any, Any]:
    model = copy.deepcopy(sharp(name))
    return model, tnc.compress(model, tnc.Budget(bits_per_weight=9), [inputs(name)], workers=1, **options)


def _weights(name: str, **options: Any) -> None:
    """Compressed, the model gives what its dense twin gives, near what it gave; copied, saved and loaded it gives the very
    same; and it holds the bytes that were reported."""
    original, (model, report) = sharp(name), _compressed(name, **options)
    found = _answer(model, name)
    _close(found, _answer(original, name), 0.2, "compressed")
    # The sums of a product depend on where in memory its numbers lie.
    _close(_answer(copy.deepcopy(model), name), found, 1e-5, "a copy")
    _require(report.nbytes == model_nbytes(model), f"reported {report.nbytes} bytes, held {model_nbytes(model)}")
    with tempfile.TemporaryDirectory() as folder:
        loaded = tnc.load(tnc.save(model, Path(folder) / "saved"))
        _close(_answer(loaded, name), found, 1e-5, "loaded")
        model.save_pretrained(Path(folder) / "plain")
        again = type(original).from_pretrained(Path(folder) / "plain").eval()
        _close(_answer(again, name), found, 1e-5, "saved by itself")
    named = {layer.name for layer in report.layers} | {skip["name"] for skip in report.skipped}
    tied = {other for layer in model.tensornet_plan.layers.values() for other in layer.tied}
    for key, parameter in original.named_parameters():
        owner = key.partition(".parametrizations.")[0] if ".parametrizations." in key else key.rpartition(".")[0]
        seen = any(one == owner or one.startswith(f"{owner}.") for one in named | tied)
        _require(parameter.ndim < 2 or seen, f"{key} is in no list")
    _close(_answer(tnc.materialize(copy.deepcopy(model)), name), found, 0.01, "made dense")


def _streamed(name: str) -> None:
    """From a folder into a folder, by blocks where the model lets them run by themselves, the bytes are those of the model that
    was compressed in memory."""
    model, report = _compressed(name, method="coded")
    with tempfile.TemporaryDirectory() as folder:
        source, target, twin = (Path(folder) / part for part in ("source", "target", "twin"))
        sharp(name).save_pretrained(source)
        tnc.compress_folder(source, target, tnc.Budget(bits_per_weight=9), [inputs(name)], workers=1, method="coded")
        tnc.save(model, twin, report=report)
        both = [(place / "model.safetensors").read_bytes() for place in (target, twin)]
        if both[0] != both[1]:
            # A sum over numbers that lie elsewhere in memory may differ in its last bit, and a code with it.
            _close(_answer(tnc.load(target), name), _answer(model, name), 1e-3, "streamed")


def _compiled(name: str) -> None:
    """Traced by torch.compile, a compressed model gives what it gives without."""
    model, _ = _compressed(name, method="coded")
    torch.compiler.reset()
    # The default backend compiles for minutes what this one traces in seconds; tests/kernels tries that on one model.
    _close(_answer(torch.compile(model, backend="eager"), name), _answer(model, name), 1e-4, "compiled")
    torch.compiler.reset()


def _offloaded(name: str) -> None:
    """With its weights offloaded by accelerate, a compressed model gives what it gives without."""
    from accelerate import cpu_offload

    try:
        _answer(cpu_offload(copy.deepcopy(sharp(name)), execution_device=_CPU), name)
    except Exception as error:
        raise NotAskedError from error
    model, _ = _compressed(name, method="coded")
    moved = cpu_offload(copy.deepcopy(model), execution_device=_CPU)
    _require(any(part.is_meta for part in moved.parameters()), "nothing was offloaded")
    _close(_answer(moved, name), _answer(model, name), 1e-5, "offloaded")


def _decoder(name: str) -> Any:
    """The model of a family if it keeps a cache of tokens."""
    model = sharp(name)
    if model.can_generate() and FAMILIES[name].reads in ("text", "both", "mel", "image in text"):
        return model
    return None


def _is_pair(model: Any) -> bool:
    return bool(model.config.is_encoder_decoder)


@torch.no_grad()
def _scores(model: Any, past: Any, length: int = 200) -> Tensor:
    """Logits of single tokens, then of a chunk of several, read after a prompt."""
    text = ids(1, length + 7)
    model(text[:, :length], past_key_values=past)
    parts = [*text[:, length : length + 3].split(1, 1), text[:, length + 3 :]]
    return torch.cat([model(part, past_key_values=past).logits for part in parts], 1)


def _cache(name: str, mode: Any) -> None:
    """Read by hand, token by token and in chunks, scores are those of an exact cache; a copied cache reads the same."""
    model = sharp(name)
    if _is_pair(model):
        return _generation(name, mode, length=200)
    exact = _scores(model, DynamicCache(config=model.config))
    cache = kv.CompressedCache(model, bits=8.0, mode=mode)
    _close(_scores(model, cache), exact, 0.05, "scores")
    _require(cache.report().sealed_tokens >= 64, "nothing was coded")
    again, text = copy.deepcopy(cache), ids(1, 4, 5)
    with torch.no_grad():
        both = [model(text, past_key_values=one).logits for one in (cache, again)]
    return _require(torch.equal(*both), "a copied cache reads something else")


def _asked(name: str, rows: int = 1, length: int = 20) -> dict[str, Tensor]:
    """What a generation starts from."""
    reads = FAMILIES[name].reads
    if reads == "mel":
        return {"input_features": inputs(name)["input_features"][:rows], "decoder_input_ids": ids(rows, length)}
    if reads == "both":
        return {"input_ids": ids(rows, 20), "decoder_input_ids": ids(rows, length)}
    if reads == "image in text":
        given = {key: value[:rows] for key, value in inputs(name).items()}
        return given | {"input_ids": torch.cat([given["input_ids"], ids(rows, length)], 1)}
    return {"input_ids": ids(rows, length)}


def _generate(model: Any, asked: dict[str, Tensor], **options: Any) -> Any:
    options = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_logits": True} | options
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model.generate(**asked, **options)


def _generation(
    name: str, mode: Any, length: int, rows: int = 1, pad: int = 0, share: float = 0.05, profile: Any = None, **options: Any
) -> None:
    """Inside ``kv.compressed``, logits are those outside."""
    model, asked = sharp(name), _asked(name, rows, length)
    if pad and "input_ids" in asked:
        mask = torch.ones_like(asked["input_ids"])
        mask[0, :pad] = 0
        asked["attention_mask"] = mask
    exact = _generate(model, asked, **options)
    with kv.compressed(model, bits=8.0, mode=mode, profile=profile) as caches:
        found = _generate(model, asked, **options)
    cached = options.get("use_cache", True)
    _require(len(caches) == cached, f"{len(caches)} caches were made")
    _require(not cached or length < 100 or caches[0].report().sealed_tokens >= 64, "nothing was coded")
    wanted = torch.stack(exact.logits)
    if share == 0:
        _require(torch.equal(torch.stack(found.logits), wanted), "logits differ")
    else:
        _close(found.logits[0], wanted[0], share, "logits")
        _close(found.logits[1], wanted[1], share, "logits after a step")


def _queries(name: str) -> None:
    """A profile from second moments of queries, and a cache with it."""
    model, texts = sharp(name), [ids(1, 160, seed) for seed in range(5)]
    if _is_pair(model):
        batches = [inputs(name) | {"decoder_input_ids": text.expand(2, -1)} for text in texts]
        profile = kv.calibrate(model, batches, metric="queries", group_size=2)
        return _generation(name, "live", 200, profile=profile)
    profile = kv.calibrate(model, texts, metric="queries", group_size=2)
    exact = _scores(model, DynamicCache(config=model.config))
    return _close(_scores(model, kv.CompressedCache(model, bits=8.0, profile=profile)), exact, 0.05, "scores")


def _autocast(name: str) -> None:
    """Under autocast, a live cache gives the scores that an exact one gives there."""
    model = sharp(name)
    with torch.autocast("cpu", torch.bfloat16):
        if _is_pair(model):
            return _generation(name, "live", 200, share=0.15)
        exact = _scores(model, DynamicCache(config=model.config)).float()
        found = _scores(model, kv.CompressedCache(model, bits=8.0)).float()
    return _close(found, exact, 0.1, "scores")


def _assisted(name: str) -> None:
    """Drafts are looked up in the prompt, and what is rejected is cropped from a live cache."""
    options = {"prompt_lookup_num_tokens": 3}
    try:
        _generate(sharp(name), _asked(name, 1, 200), **options)
    except Exception as error:
        raise NotAskedError from error
    _generation(name, "live", 200, **options)


def _for_decoders(check: Callable[[str], None]) -> Callable[[str], None]:
    check.__dict__["decoders"] = True
    return check


FEATURES: dict[str, Callable[[str], None]] = {
    "dense": lambda name: _weights(name, method="dense", allocator="energy"),
    "coded": lambda name: _weights(name, method="coded"),
    "streamed": _streamed,
    "compiled": _compiled,
    "offloaded": _offloaded,
    "live": _for_decoders(lambda name: _cache(name, "live")),
    "storage": _for_decoders(lambda name: _cache(name, "storage")),
    "short prompt": _for_decoders(lambda name: _generation(name, "live", 20, share=0)),
    "left padding": _for_decoders(lambda name: _generation(name, "live", 200, rows=2, pad=9)),
    "beams": _for_decoders(lambda name: _generation(name, "storage", 200, num_beams=2)),
    "assisted": _for_decoders(_assisted),
    "no cache": _for_decoders(lambda name: _generation(name, "live", 200, share=0, use_cache=False)),
    "autocast": _for_decoders(_autocast),
    "queries": _for_decoders(_queries),
}


def cell(name: str, feature: str) -> str:
    """``equal``, a reason that the package gives in one line, or a dash where the feature does not apply; ``WRONG`` and what
    is, for all else."""
    check = FEATURES[feature]
    if getattr(check, "decoders", False) and _decoder(name) is None:
        return _NOT_ASKED
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        try:
            check(name)
        except NotAskedError:
            return _NOT_ASKED
        except TensorNetError as error:
            return " ".join(str(error).split())
        except WrongError as error:
            return f"WRONG: {error}"
        except Exception as error:
            return f"WRONG: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return "equal"


SLOW = ("streamed", "compiled")


def row(name: str, without: Collection[str] = ()) -> dict[str, str]:
    """The cells of a family."""
    return {feature: cell(name, feature) for feature in FEATURES if feature not in without}


_KEYS = (
    "`equal`: what it should be (the same numbers, or within the rounding of 8-bit codes); letters: the package refuses, with "
    "the reason below; –: the feature does not apply."
)


def page(rows: dict[str, dict[str, str]]) -> str:
    """The table of all cells, and the reasons by letter, as Markdown."""
    known = ("equal", _NOT_ASKED)
    reasons = list(dict.fromkeys(_reason(cell) for cells in rows.values() for cell in cells.values() if cell not in known))
    letters = {reason: chr(ord("a") + number) for number, reason in enumerate(reasons)}
    told = [cell for cells in rows.values() for cell in cells.values() if cell != _NOT_ASKED]
    refused = sum(cell != "equal" for cell in told)
    lines = [
        "# Architectures",
        "",
        f"Every feature on tiny random models of {len(rows)} families of transformers, with weights of attention so large that",
        f"errors show. {len(told) - refused} of {len(told)} cells are equal, in {refused} the package says why not. Written by",
        "`python -m tests.features`; the suite runs every other cell, streaming and compiling on every eleventh family.",
        "",
        _KEYS,
        "",
        "| group | family | " + " | ".join(FEATURES) + " |",
        "|---|---|" + "---|" * len(FEATURES),
    ]
    lines += [line_of(name, cells, letters) for name, cells in rows.items()]
    lines += ["", *(f"* **{letter}**: {reason}" for reason, letter in letters.items()), ""]
    lines += ["What the features are:", "", *(f"* **{name}**: {what}" for name, what in _MEANING.items()), ""]
    return "\n".join(lines)


def line_of(name: str, cells: dict[str, str], letters: dict[str, str]) -> str:
    """A family's line of the table."""
    return f"| {FAMILIES[name].group} | {name} | " + " | ".join(shown(cells, letters).values()) + " |"


def shown(cells: dict[str, str], letters: dict[str, str]) -> dict[str, str]:
    """Cells as the page has them."""
    known = ("equal", _NOT_ASKED)
    return {feature: cell if cell in known else letters.get(_reason(cell), cell) for feature, cell in cells.items()}


def cells_of(text: str, name: str) -> dict[str, str]:
    """A family's cells of a page."""
    line = next(line for line in text.splitlines() if line.startswith(f"| {FAMILIES[name].group} | {name} | "))
    return dict(zip(FEATURES, line.strip("| ").split(" | ")[2:]))


def _reason(cell: str) -> str:
    """A reason without the class that it is told of."""
    return re.sub(r"\b[A-Z]\w+(ForCausalLM|LMHeadModel|ForConditionalGeneration|MTModel)\b", "model", cell)


def letters_of(text: str) -> dict[str, str]:
    """Reasons and their letters, as a page has them."""
    return {reason: letter for letter, reason in re.findall(r"^\* \*\*([a-z])\*\*: (.*)$", text, re.MULTILINE)}


_MEANING = {
    "dense": "`compress` to 9 bits per weight of packed integers; copied, saved, loaded by us and by transformers, made dense",
    "coded": 'the same with `method="coded"`, all tables included',
    "streamed": "`compress_folder` with the settings of *coded*: what the model compressed in memory gives",
    "compiled": "the *coded* model under `torch.compile` (tracing; not the default backend, which takes minutes)",
    "offloaded": "the *coded* model under `accelerate.cpu_offload`",
    "live": "a live cache of 8 bits passed by hand: a prompt of 200 tokens, single steps, a chunk, a copy",
    "storage": "the same with a storage cache",
    "short prompt": "`generate` inside `kv.compressed` before anything is coded",
    "left padding": "`generate` of two rows, one of them padded, inside `kv.compressed`",
    "beams": "two beams on a storage cache inside `kv.compressed`",
    "assisted": "`generate` with drafts looked up in the prompt, inside `kv.compressed`",
    "no cache": "`use_cache=False` inside `kv.compressed`",
    "autocast": "a live cache under `torch.autocast` to bfloat16",
    "queries": 'a profile by `kv.calibrate(metric="queries")`, and a live cache with it',
}


if __name__ == "__main__":
    chosen = sys.argv[1:] or list(FAMILIES)
    found = {name: row(name) for name in chosen}
    if wrong := {name: cells for name, cells in found.items() if any(cell.startswith("WRONG") for cell in cells.values())}:
        sys.exit(f"not written: {wrong}")
    if chosen == list(FAMILIES):
        PAGE.write_text(page(found), encoding="utf-8")

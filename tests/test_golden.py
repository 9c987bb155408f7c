"""What the package writes and finds stays equal to the byte: hashes of artefacts made from tiny models and fixed seeds.

Every artefact has parts (a file, a tensor, a spec), and every part two hashes. That of its *structure* (names, dtypes, shapes,
specs, JSON without its floating-point numbers) must hold on any machine. That of its *exact* bytes holds where LAPACK, BLAS
and vector instructions are the same, so it is kept by machine; on an unknown machine only structures are compared.

    python -m tests.test_golden --write

adds the hashes of this machine. It changes no hash that is already there, and names those that differ, unless ``--force`` is
given.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from threadpoolctl import threadpool_limits
from torch import Tensor, nn

import tensornet_compress as tnc
import tensornet_compress.kv as kv
import tensornet_compress.train as train

# What has no public name lives in modules that may move; this is the only place to follow them.
from tensornet_compress.coding import SortedFormat, rans
from tensornet_compress.coding.bits import pack_bits
from tensornet_compress.coding.packed_integers import grouped_view
from tensornet_compress.coding.permutations import pack_permutation
from tensornet_compress.coding.tied_orders import encode_orders
from tensornet_compress.metric import KroneckerMetric
from tensornet_compress.report import Machine, Result, render, write_result
from tensornet_compress.report.from_kv import kv_result
from tensornet_compress.report.from_search import search_result
from tensornet_compress.report.from_weights import weights_result
from tests.kv.tiny_models import tiny, tiny_profile
from tests.models import batches, tiny_convnet, tiny_llama
from tests.report.synthetic import everything

GOLDEN = Path(__file__).with_name("golden.json")


@dataclass(frozen=True)
class Part:
    """``structure``: plain data that must be the same on any machine. ``exact``: bytes that must be the same on this one, none
    where the structure says all."""

    structure: Any
    exact: bytes = b""

    @classmethod
    def everywhere(cls, exact: bytes) -> Part:
        """Bytes that no machine may change."""
        return cls(hashlib.sha256(exact).hexdigest())


Parts = dict[str, Part]
ARTEFACTS: dict[str, Callable[[], Parts]] = {}


def artefact(make: Callable[[], Parts]) -> Callable[[], Parts]:
    """Register a function as the artefact of its name."""
    ARTEFACTS[make.__name__] = make
    return make


# ---------------------------------------------------------------------------------------------------------- parts of things

_VOLATILE = [
    (re.compile(r'("(?:seconds|[^"]*_seconds)": ?)-?[\d.][\d.e+-]*'), r"\g<1>0"),
    (re.compile(r'("(?:transformers_version|version|made)": ?)"[^"]*"'), r'\g<1>""'),
    (re.compile(r'("(?:tool|checksum|config.json|generation_config.json)": ?)"[^"]*"'), r'\g<1>""'),
]
_NUMBER = re.compile(r"-?\d+\.\d+(?:e[+-]?\d+)?|-?\d+e[+-]?\d+")
_DIGEST = re.compile(r"\b(?:[0-9a-f]{64}|[0-9a-f]{32})\b")


def scrubbed(text: str) -> str:
    """JSON text without what differs from run to run: versions, times."""
    for pattern, replacement in _VOLATILE:
        text = pattern.sub(replacement, text)
    return text


def skeleton(data: Any) -> Any:
    """JSON data without floating-point numbers, in strings neither, and without digests of them."""
    if isinstance(data, dict):
        return {name: skeleton(value) for name, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [skeleton(value) for value in data]
    if isinstance(data, str):
        return _NUMBER.sub("number", _DIGEST.sub("digest", data))
    return "number" if isinstance(data, float) else data


def json_part(text: str) -> Part:
    """Of JSON text."""
    text = scrubbed(text)
    return Part(skeleton(json.loads(text)), text.encode())


def tensor_bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def tensor_parts(tensors: Mapping[str, Tensor], prefix: str = "") -> Parts:
    """Of tensors by name: a part for all that have a name in common up to its last dot, as those of a layer have."""
    groups: dict[str, list[str]] = {}
    for name in tensors:
        groups.setdefault(name.rpartition(".")[0] or name, []).append(name)
    return {
        f"{prefix}{group}": Part(
            [[name, str(tensors[name].dtype), list(tensors[name].shape)] for name in names],
            b"".join(tensor_bytes(tensors[name]) for name in names),
        )
        for group, names in groups.items()
    }


def safetensors_parts(path: Path) -> Parts:
    """The whole file, whose structure is its metadata, and the tensors in it."""
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
        metadata = {key: _parsed(text) for key, text in sorted((file.metadata() or {}).items())}
    return {path.name: Part(skeleton(metadata), path.read_bytes())} | tensor_parts(tensors, f"{path.name}: ")


def _parsed(text: str) -> Any:
    return json.loads(text) if text.startswith("{") else text


def folder_parts(folder: Path) -> Parts:
    """All files of a folder."""
    parts: Parts = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix == ".safetensors":
            parts |= safetensors_parts(path)
        elif path.suffix == ".json":
            parts[path.name] = json_part(path.read_text(encoding="utf-8"))
        elif path.is_file():
            parts[path.name] = Part(path.name, path.read_bytes())
    return parts


def loosened(parts: Parts, names: Iterable[str]) -> Parts:
    """Parts of which those named have a structure that rounding decides, as it breaks ties between layouts of equal bytes: on
    other machines they must be there, no more."""
    return parts | {name: Part("any", parts[name].exact) for name in names}


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder for the time being."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


# ------------------------------------------------------------------------------------------------------------ saved folders


def planted_llama() -> Any:
    """A tiny decoder whose layers differ in kind: low rank, Kronecker product, permuted identity, smooth, and noise."""
    model = tiny_llama(tied=False)
    block = model.model.layers[0]
    x, y = torch.linspace(0, 1, 64)[:, None], torch.linspace(0, 1, 32)[None]
    with torch.no_grad():
        block.self_attn.q_proj.weight.copy_(torch.randn(32, 2) @ torch.randn(2, 32) * 0.1)
        block.self_attn.o_proj.weight.copy_(torch.eye(32).reshape(4, 8, 4, 8).permute(2, 1, 0, 3).reshape(32, 32))
        block.mlp.up_proj.weight.copy_(0.2 * torch.kron(torch.randn(8, 8), torch.randn(8, 4)))
        block.mlp.gate_proj.weight.copy_(0.2 * torch.sin(9 * x * y + 3 * y))
    return model


def saved(model: nn.Module, report: Any, again: nn.Module | None, calibration: Sequence[Tensor] | None) -> Parts:
    """The saved folder and its report; the plan in it must give the same bytes once more to ``again``."""
    with scratch() as folder:
        tnc.save(model, folder / "saved", report=report)
        parts = folder_parts(folder / "saved")
        if report is not None:
            parts["report"] = json_part(report.model_copy(update={"seconds": {}}).to_json())
            result = weights_result(report, tnc.load_plan(folder / "saved"), "tiny", "make")
            parts["result"] = result_part(result)
        if again is not None:
            plan = tnc.Plan.from_json(tnc.load_plan(folder / "saved").to_json())
            parts["plan"] = json_part(plan.to_json())
            tnc.save(tnc.apply_plan(again, plan, calibration, workers=1), folder / "again")
            repeated = (folder / "again" / "model.safetensors").read_bytes()
            assert repeated == parts["model.safetensors"].exact, "the plan does not give the same bytes again"
    return parts


def compressed(
    make: Callable[[], nn.Module], bits: float, calibration: Sequence[Tensor] | None, repeat: bool = True, **options: Any
) -> Parts:
    """The folder of a compressed model."""
    model = make()
    report = tnc.compress(model, tnc.Budget(bits_per_weight=bits), calibration, workers=1, **options)
    return saved(model, report, make() if repeat else None, calibration)


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make()


@artefact
def folder_of_several_families() -> Parts:
    """The default method in a gradient metric, beside a layout search."""
    return compressed(partial(seeded, planted_llama), 5.0, batches(3), metric="kronecker", search=60.0)


@artefact
def folder_of_tied_embeddings() -> Parts:
    """Embeddings with their head, statistics by block."""
    targets = ["*_proj", "embed_tokens", "lm_head"]
    return compressed(tiny_llama, 6.0, batches(2), targets=targets, metric="row-fisher", by_block=True, method="dense")


@artefact
def folder_of_pivots() -> Parts:
    """Two bf16 cores kept by pivots."""
    return compressed(tiny_llama, 12.0, batches(2), method="svd", formats=["bf16p", "bf16"])


@artefact
def folder_of_residuals() -> Parts:
    """Sums of networks."""
    return compressed(tiny_llama, 5.0, batches(2), method="residual")


@artefact
def folder_of_trains() -> Parts:
    """Trains after ALS sweeps, in a diagonal metric."""
    return compressed(tiny_llama, 10.0, batches(2), method="tt", metric="diagonal", sweeps=2, allocator="uniform")


@artefact
def folder_of_searched_layouts() -> Parts:
    """Layouts found by search, or floating point."""
    targets = ["layers.0.self_attn.*", "layers.0.mlp.*"]
    make = partial(seeded, planted_llama)
    parts = compressed(make, 12.0, batches(2), targets=targets, method="searched", search=60.0)
    return loosened(parts, parts)


@artefact
def folder_of_convolutions() -> Parts:
    """A plain module without calibration."""
    return compressed(tiny_convnet, 9.0, None, allocator="energy")


@artefact
def folder_of_pivoted_convolutions() -> Parts:
    """Convolutions as two cores kept by pivots."""
    return compressed(tiny_convnet, 14.0, None, method="svd", formats=["bf16p"], allocator="uniform")


def term(layout: tnc.Layout, topology: tnc.Topology, ranks: Sequence[int], *formats: str) -> dict[str, Any]:
    """A term of a spec as plain data; one format stands for all cores."""
    names = formats * (1 if len(formats) > 1 else len(topology.legs))
    parsed = [tnc.parse_format(name).model_dump() for name in names]
    return {"layout": layout.model_dump(), "topology": topology.model_dump(), "ranks": list(ranks), "formats": parsed}


def shuffled(axis: int, size: int) -> dict[str, Any]:
    """A fibre order as plain data."""
    generator = torch.Generator().manual_seed(size)
    return {"axis": axis, "permutation": torch.randperm(size, generator=generator).tolist()}


def specs_of_all_kinds() -> dict[str, dict[str, Any]]:
    """Specs of a (12, 20) weight that between them have all that a spec can have, as plain data."""
    native, digits = tnc.Layout.native((12, 20)), ((3, 4), (4, 5))
    ordered = tnc.Layout.model_validate(
        tnc.Layout.of(((12,), (20,))).model_dump() | {"fibre_orders": [shuffled(0, 12), shuffled(1, 20)]}
    )
    two, one = tnc.Topology.two_cores(2, (0,)), tnc.Topology.one_core(2)
    modes = tnc.Layout.of(digits, mode_order=(2, 0, 3, 1))
    terms = {
        "tree": [term(modes, tnc.Topology.balanced_tree(range(4)), (3, 2, 3, 3, 3), "fp32")],
        "padded": [term(tnc.Layout.of(((3, 5), (3, 7)), (12, 20)), tnc.Topology.train([(0, 2), (1, 3)]), (9,), "bf16", "fp16")],
        "ordered": [term(ordered, two, (8,), "int8g8z")],
        "pivots": [term(native, two, (7,), "bf16p", "bf16")],
        "offsets": [term(native, one, (), "int5g8o")],
        "rows": [term(native, one, (), "int6g0")],
        "sum": [term(native, one, (), "int3g64"), term(ordered, two, (3,), "int4g0")],
    }
    return {name: {"shape": [12, 20], "dtype": "float32", "terms": found} for name, found in terms.items()}


@artefact
def folder_of_all_specs() -> Parts:
    """Linear layers by ``apply_plan``, one of each kind of spec."""
    specs = specs_of_all_kinds()
    model = nn.ModuleDict({name: nn.Linear(20, 12) for name in specs})
    layers = {name: {"kind": "linear", "spec": spec, "bias": True} for name, spec in specs.items()}
    plan = tnc.Plan.model_validate({"layers": layers, "metric": "euclidean", "sweeps": 2})
    return saved(tnc.apply_plan(model, plan, workers=1), None, None, None) | {"plan": json_part(plan.to_json(indent=1))}


@artefact
def single_networks() -> Parts:
    """``save_network`` of one network of each kind."""
    parts: Parts = {}
    with scratch() as folder:
        for name, spec in specs_of_all_kinds().items():
            path = folder / f"{name}.safetensors"
            tnc.save_network(tnc.realise(torch.randn(12, 20), tnc.NetworkSpec.model_validate(spec)), path)
            parts |= safetensors_parts(path)
    return parts


# ----------------------------------------------------------------------------------------------------------------- searches


def kronecker(size: int = 32, terms: int = 1) -> Tensor:
    return sum(torch.kron(torch.randn(size // 4, size // 4), torch.randn(4, 4)) for _ in range(terms))  # type: ignore[return-value]


def smooth(rows: int = 40, columns: int = 32) -> Tensor:
    x, y = torch.linspace(0, 1, rows)[:, None], torch.linspace(0, 1, columns)[None]
    return torch.sin(9 * x * y + 2 * x) + torch.exp(-20 * ((x - 0.4) ** 2 + (y - 0.6) ** 2))


def wave(size: int = 8) -> Tensor:
    x = torch.linspace(0, 2, size)
    return torch.sin(x[:, None, None] + 2 * x[None, :, None] + 3 * x)


def with_orders(tensor: Tensor) -> Tensor:
    """Rows and columns shuffled."""
    return tensor[torch.randperm(tensor.shape[0])][:, torch.randperm(tensor.shape[1])]


def hidden_pairs() -> Tensor:
    pairs = torch.einsum("ab,cd,ef->abcdef", *(torch.randn(3, 3) for _ in range(3)))
    return pairs.permute(3, 0, 5, 1, 4, 2).contiguous()


def low_rank(noise: float = 0.0) -> Tensor:
    return torch.randn(24, 3) @ torch.randn(3, 20) + noise * torch.randn(24, 20)


def sorted_noise() -> Tensor:
    """Smooth values whose entries lie anywhere."""
    return torch.linspace(0, 1, 256)[torch.randperm(256)].reshape(16, 16)


ENTRIES = {"orderings": ("mode", "fibre", "entry")}
SEARCHES: dict[str, tuple[Callable[[], Tensor], dict[str, Any]]] = {
    "kronecker": (kronecker, {"max_error": 1e-5}),
    "kronecker_rows": (lambda: kronecker()[torch.randperm(32)], {"max_error": 1e-5, "formats": ("fp32",)}),
    "kronecker_sum": (lambda: kronecker(terms=2), {"max_error": 1e-5}),
    "identity": (lambda: torch.eye(64), {"max_error": 1e-6}),
    "identity_modes": (lambda: torch.eye(16).reshape(4, 4, 4, 4).permute(3, 0, 1, 2).contiguous(), {"max_error": 1e-6}),
    "hidden_pairs": (hidden_pairs, {"max_error": 1e-5, "formats": ("fp32",)}),
    "wave": (wave, {"max_error": 1e-3}),
    "wave_bytes": (wave, {"max_bytes": 200}),
    "smooth": (smooth, {"max_error": 0.02}),
    "smooth_shuffled": (lambda: with_orders(smooth()), {"max_error": 0.02}),
    "smooth_bytes": (lambda: with_orders(smooth()), {"max_bytes": 400}),
    "low_rank": (low_rank, {"max_error": 1e-3}),
    "low_rank_bytes": (lambda: low_rank(0.1), {"max_bytes": 300}),
    "noise": (lambda: torch.randn(24, 20), {"max_error": 0.1}),
    "noise_metric": (
        lambda: torch.randn(16, 24),
        {"max_bytes": 250, "metric": KroneckerMetric(columns=torch.linspace(0.01, 1.0, 24).double())},
    ),
    "zeros": (lambda: torch.zeros(12, 10), {"max_error": 0.1}),
    "entries": (sorted_noise, {"max_error": 0.05} | ENTRIES),
    "entries_bytes": (sorted_noise, {"max_bytes": 300} | ENTRIES),
    "walk_trains": (lambda: torch.randn(24, 30).cumsum(0).cumsum(1), {"max_error": 0.02, "topologies": ("tt", "tree")}),
    "half_precision": (lambda: smooth(13, 7).bfloat16(), {"max_error": 0.05, "orderings": ("mode",), "null": False}),
}

TIED = ("identity_modes", "hidden_pairs")
"""Searches in which layouts of equal bytes are told apart by rounding alone."""


def searched(name: str) -> Parts:
    """What ``search`` chooses, and all that it measured."""
    make, options = SEARCHES[name]
    tensor = make()
    found = tnc.search(tensor, time_budget=600.0, **options)
    assert found.finished, "the search must not depend on the speed of the machine"
    measured = [item.describe() for item in found.found]
    null = None if found.null is None else [found.null.nbytes, found.null.family, found.null.gain, found.null.error]
    said = [found.error, found.gain, null, found.reason, str(found.entry_sort), found.unordered.describe()]
    limits = {limit: options[limit] for limit in ("max_error", "max_bytes") if limit in options}
    parts = tensor_parts(found.best.stored_tensors()) | {
        "spec": json_part(found.best.spec.to_json()),
        "nbytes": Part(found.best.nbytes),
        "choice": Part([found.choice.family, found.choice.ordered], repr(said).encode()),
        "measured": Part("any", "\n".join(measured).encode()),
        "result": result_part(search_result(found, name, tensor.shape, "make", **limits)),
    }
    return loosened(parts, set(parts) - {"nbytes", "choice"} if name in TIED else {"result"})


ARTEFACTS |= {f"search_{name}": partial(searched, name) for name in SEARCHES}


# ------------------------------------------------------------------------------------------------------------------- caches

CACHED = "llama-gqa"


def saved_cache(mode: str, calibrated: bool) -> Parts:
    """The file of a filled cache of two rows, the first one padded."""
    model = tiny(CACHED)
    ids = torch.randint(1, 90, (2, 180), generator=torch.Generator().manual_seed(2))
    mask = torch.ones(2, 180, dtype=torch.int64)
    mask[0, :5] = 0
    profile = tiny_profile(CACHED) if calibrated else None
    cache = kv.CompressedCache(model, bits=3.0, profile=profile, mode=mode, block=64)  # type: ignore[arg-type]
    with torch.no_grad():
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        logits = model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache).logits
    with scratch() as folder:
        cache.save(folder / "cache.safetensors")
        parts = safetensors_parts(folder / "cache.safetensors")
    # How many bytes entropy coding takes depends on every number.
    parts = loosened(parts, [name for name in parts if "payload" in name])
    return parts | tensor_parts({"logits": logits}) | {"report": Part("any", str(cache.report()).encode())}


for _mode in ("storage", "live"):
    for _calibrated in (True, False):
        _name = f"cache_{_mode}" + ("" if _calibrated else "_without_profile")
        ARTEFACTS[_name] = partial(saved_cache, _mode, _calibrated)


@artefact
def cache_profile() -> Parts:
    """The files of a profile, what it predicts, and the result made from these."""
    profile = tiny_profile(CACHED)
    front = kv.front(kv.costs(tiny(CACHED), profile, tokens=1000))
    row = {"mode": "live", "bits": 3.0, "nbytes": 100.0, "exact_nbytes": 400.0, "bits_per_element": 3.5, "kl": 0.01}
    with scratch() as folder:
        profile.save(folder / "profile")
        parts = folder_parts(folder / "profile")
    parts["front"] = Part("any", "\n".join(map(repr, front)).encode())
    parts["result"] = result_part(kv_result("tiny", [row], profile, front, "make"))
    # Which units share a basis is decided by the mutual information of random states, that is by little.
    return loosened(parts, ["profile.json", "result"])


# ------------------------------------------------------------------------------------------------------------------ reports


def result_part(result: Result) -> Part:
    """The file that a result is written to, as made by some machine."""
    machine = Machine(processor="any", cores=1, threads=1, python="3")
    with scratch() as folder:
        path = write_result(result.model_copy(update={"machine": machine}), folder / "result.json")
        return json_part(path.read_text(encoding="utf-8"))


@artefact
def page() -> Parts:
    """A result that has everything, and its page without the pictures, whose coordinates differ from machine to machine."""
    result = everything()
    words = re.sub(r"<svg.*?</svg>", "", render(result), flags=re.DOTALL)
    return {"result": Part.everywhere(result.to_json(indent=1).encode()), "page": Part.everywhere(words.encode())}


# ----------------------------------------------------------------------------------------------------------------- training


def trained(model: nn.Module, *reports: Any) -> Parts:
    """All numbers of a model, and reports (plain data) on how they came about."""
    texts = [scrubbed(report.to_json()) if hasattr(report, "to_json") else repr(report) for report in reports]
    parts = tensor_parts(model.state_dict())
    return parts | {f"report {place}": Part("any", text.encode()) for place, text in enumerate(texts)}


@artefact
def train_isvt() -> Parts:
    model = tiny_llama()
    schedule = train.Schedule(steps=4)
    report = train.isvt(model, batches(2), tnc.Budget(bits_per_weight=9.0), metric="kronecker", schedule=schedule)
    return trained(model, report)


@artefact
def train_isvt_soft() -> Parts:
    model = tiny_llama(layers=1)
    schedule = train.Schedule(kind="multiplier", steps=4, corrections=1)
    budget = tnc.Budget(bits_per_weight=8.0)
    report = train.isvt(model, batches(2), budget, metric="input", schedule=schedule, threshold="soft", fmt="fp32")
    return trained(model, report)


@artefact
def train_propagate() -> Parts:
    other, model = tiny_llama(), tiny_llama()
    options: dict[str, Any] = {"method": "dense", "formats": ["int3g16o"], "workers": 1, "refine": 0}
    tnc.compress(other, tnc.Budget(bits_per_weight=5.0), batches(2), **options)
    with scratch() as folder:
        plan = tnc.load_plan(tnc.save(other, folder / "saved"))
    settings = train.Propagation(correction=1.0, refinement=train.BlockRefinement(epochs=2))
    return trained(model, *train.propagate(model, plan, batches(2), settings))


@artefact
def train_gradual() -> Parts:
    model = tiny_llama(layers=1)
    options: dict[str, Any] = {"loss": train.next_token_loss, "schedule": train.Schedule(kind="cubic", steps=3), "steps": 6}
    return trained(model, train.reduce_gradually(model, batches(3), tnc.Budget(bits_per_weight=9.0), **options))


@artefact
def train_heal() -> Parts:
    teacher, model = tiny_llama(layers=1), tiny_llama(layers=1)
    options: dict[str, Any] = {"method": "dense", "formats": ["int3g16o"], "workers": 1, "refine": 0}
    tnc.compress(model, tnc.Budget(bits_per_weight=5.0), batches(2), **options)
    return trained(model, train.heal(model, batches(6), teacher=teacher, steps=12, every=4))


@artefact
def train_stages() -> Parts:
    """Metrics tried in turn, refinement, and healing, in one call."""
    model = tiny_llama(layers=1)
    options: dict[str, Any] = {"metric": "auto", "refine": True, "heal_steps": 4, "method": "dense", "workers": 1}
    report = train.compress_in_stages(model, tnc.Budget(bits_per_weight=5.0), batches(8), **options)
    return trained(model, report.model_copy(update={"seconds": {}}))


@artefact
def train_shrunken_bonds() -> Parts:
    networks = [tnc.to_network(smooth(16, 16) + 0.01 * torch.randn(16, 16), tnc.Topology.train(2), ranks=12) for _ in range(2)]
    shrunken = train.shrink_bonds(networks, 800, weights=[1.0, 3.0])
    parts: Parts = {}
    for place, network in enumerate(shrunken):
        parts[f"spec {place}"] = json_part(network.spec.to_json())
        parts |= tensor_parts(network.stored_tensors(), f"{place}: ")
    return parts


# ------------------------------------------------------------------------------------------------------------------- coders


@artefact
def coder_rans() -> Parts:
    """Bytes of fixed symbols under fixed tables, on one lane and on several."""
    numbers = np.arange(9000)
    weights = (np.arange(1, 49).reshape(3, 16) * 7919 % 101 + 1).astype(np.float64)
    tables = rans.Tables.from_frequencies(rans.normalise(weights))
    which, symbols = numbers * 31 % 3, (numbers * 7 % 16).astype(np.uint8)
    parts = {"tables": Part.everywhere(tables.frequency.tobytes())}
    for count in (1, 500, 9000):
        coded = rans.encode(symbols[None, :count], np.zeros(1, np.int64), which[:count], tables)
        parts[f"{count} symbols"] = Part.everywhere(coded.tobytes())
    return parts


@artefact
def coder_bits() -> Parts:
    """Packed integers of each width."""
    values = torch.arange(1001) * 37
    return {f"{bits} bits": Part.everywhere(tensor_bytes(pack_bits(values % (1 << bits), bits))) for bits in range(1, 9)}


@artefact
def coder_permutations() -> Parts:
    """Packed permutations."""
    sizes = {1: 1, 2: 1, 7: 3, 24: 5, 257: 100, 1000: 7}
    orders = {size: [(place * step + 1) % size for place in range(size)] for size, step in sizes.items()}
    return {f"{size} items": Part.everywhere(tensor_bytes(pack_permutation(order))) for size, order in orders.items()}


@artefact
def coder_tied_orders() -> Parts:
    """Entropy-coded orders with ties, and what decodes of sorted entries."""
    groups = np.stack([np.repeat(np.arange(3), [5, 30, 6])[np.arange(41) * step % 41] for step in range(1, 20)]).astype(
        np.uint8
    )
    weights = ((torch.arange(6 * 40) * 7919 % 2003 - 900).float() / 512).reshape(6, 40)
    decoded = SortedFormat(run=40, rank=2, step=0.4)
    stored = decoded.encode(weights)
    parts = tensor_parts(stored | {"decoded": decoded.of(stored).decode(stored, (6, 40), torch.float32)})
    return parts | {"19 runs": Part.everywhere(encode_orders(groups, [5, 30, 6]).tobytes())}


FORMATS = ["fp32", "bf16", "fp16"] + [f"int{bits}g{group}{zero}" for bits in range(2, 9) for group in (0, 16) for zero in "_zo"]


@artefact
def coder_formats() -> Parts:
    """Stored parts and decoded numbers of fixed weights, in every format."""
    weights = ((torch.arange(6 * 40) * 7919 % 2003 - 900).float() / 512).reshape(6, 40)
    importance = (torch.arange(40) * 31 % 17 + 1).float()
    parts: Parts = {}
    for name in (name.replace("_", "") for name in FORMATS):
        fmt = tnc.parse_format(name)
        stored = fmt.encode(weights)
        stored_bytes = {f"{name}{part}": tensor_bytes(tensor) for part, tensor in stored.items()}
        stored_bytes[f"{name} decoded"] = tensor_bytes(fmt.decode(stored, (6, 40), torch.float32))
        parts |= {part: Part.everywhere(content) for part, content in stored_bytes.items()}
        if name.startswith("int"):
            # Grids fitted to an importance compare sums, which are rounded differently from machine to machine.
            matrix = weights.reshape(grouped_view((6, 40), fmt.group))
            scale, zero = fmt.fit_grid(matrix, importance)
            weighted = fmt.assemble(fmt.quantise(matrix, scale, zero), scale, zero)
            parts |= tensor_parts({f"{name}{part} weighted": tensor for part, tensor in weighted.items()})
    identity = torch.eye(5)
    core = torch.cat([weights[:3, :5], identity[:2], weights[3:, :5], identity[2:]])
    stored = tnc.parse_format("bf16p").encode(core)
    return parts | {f"bf16p{part}": Part.everywhere(tensor_bytes(tensor)) for part, tensor in stored.items()}


# ------------------------------------------------------------------------------------------------------------------- hashes

Hashes = dict[str, dict[str, str]]


def machine() -> str:
    """What exact bytes depend on besides the package: versions, the build of torch, and the processor."""
    packages = " ".join(f"{name} {version(name)}" for name in ("torch", "numpy", "scipy", "safetensors", "transformers"))
    build = digest(torch.__config__.show().encode())
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = ("vendor_id", "cpu family", "model", "model name")
    processor = dict(line.replace("\t", "").split(": ", 1) for line in reversed(lines) if ": " in line)
    described = " ".join(processor.get(name, "?") for name in names)
    return f"{described}, {torch.backends.cpu.get_cpu_capability()}; {packages}; build {build}"


def digest(content: bytes) -> str:
    """Enough of a SHA-256 to tell contents apart."""
    return hashlib.sha256(content).hexdigest()[:12]


@cache
def made(name: str) -> Parts:
    """The parts of an artefact, made on one thread and from one seed, whatever ran before."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]), threadpool_limits(1):
            torch.manual_seed(0)
            return ARTEFACTS[name]()
    finally:
        torch.set_num_threads(threads)


def structures(name: str) -> dict[str, str]:
    return {part: digest(json.dumps(found.structure).encode()) for part, found in made(name).items()}


def exacts(name: str) -> dict[str, str]:
    return {part: digest(found.exact) for part, found in made(name).items() if found.exact}


def read_golden() -> dict[str, Any]:
    """The recorded hashes: ``structure`` by artefact and part, ``exact`` by machine, artefact and part."""
    return json.loads(GOLDEN.read_text(encoding="utf-8")) if GOLDEN.exists() else {"structure": {}, "exact": {}}


def differences(recorded: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """What became of the parts that are not as recorded."""
    found = [f"{part} is gone" for part in recorded if part not in now]
    found += [f"{part} is new" for part in now if part not in recorded]
    return found + [f"{part} changed" for part in now if part in recorded and recorded[part] != now[part]]


# -------------------------------------------------------------------------------------------------------------------- tests


def test_every_artefact_is_recorded() -> None:
    assert set(read_golden()["structure"]) == set(ARTEFACTS)


@pytest.mark.parametrize("name", ARTEFACTS)
def test_structure(name: str) -> None:
    assert differences(read_golden()["structure"][name], structures(name)) == []


@pytest.mark.parametrize("name", ARTEFACTS)
def test_exact_bytes(name: str) -> None:
    recorded = read_golden()["exact"].get(machine(), {})
    if name not in recorded:
        pytest.skip(f"no exact hashes of this machine: {machine()}")
    assert differences(recorded[name], exacts(name)) == []


def write(force: bool) -> int:
    """Record what is missing, with ``force`` what differs too; the number of artefacts that differ and were left alone."""
    golden = read_golden()
    mine = golden["exact"].setdefault(machine(), {})
    refused = 0
    for name in ARTEFACTS:
        kinds = [("structure", golden["structure"], structures(name)), ("exact", mine, exacts(name))]
        changes = [f"{name}, {kind}: {text}" for kind, old, now in kinds if name in old for text in differences(old[name], now)]
        print(*changes, sep="\n", end="\n" if changes else "")
        if changes and not force:
            refused += 1
            continue
        if changes:
            # What other machines recorded is of the artefact as it was.
            for others in golden["exact"].values():
                others.pop(name, None)
        for _, old, now in kinds:
            old[name] = now
    for recorded in (golden["structure"], *golden["exact"].values()):
        for name in set(recorded) - set(ARTEFACTS) if force else ():
            del recorded[name]
    GOLDEN.write_text(json.dumps(golden, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return refused


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", required=True, help="record the hashes of this machine")
    parser.add_argument("--force", action="store_true", help="also change hashes that are already recorded")
    refused = write(parser.parse_args(arguments).force)
    if refused:
        print(f"{refused} artefacts differ from {GOLDEN.name} and were left as recorded; --force changes them")
    return 1 if refused else 0


if __name__ == "__main__":
    sys.exit(main())

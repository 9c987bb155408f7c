"""docs/file-format.md is enough to write a reader: one written from it reads what the package wrote."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import tensornet_compress as tnc
import tensornet_compress.kv as kv
from tensornet_compress.coding import SortedFormat
from tensornet_compress.files import Manifest
from tensornet_compress.kv.files import BlockRecord, CacheRecord
from tensornet_compress.kv.profile.profile import ProfileSpec, SideSpec
from tensornet_compress.nn import NetworkModule
from tensornet_compress.nn.plan import LayerPlan, Plan
from tensornet_compress.tensor import FibreOrder, TermSpec
from tests.cache_reader import Cache, Profile
from tests.documents import ROOT, blocks
from tests.file_reader import check_alone, check_seal, hash_of, read_model, read_safetensors, term_dense
from tests.kv.tiny_models import tiny, tiny_profile
from tests.models import batches, tiny_llama

PAGE = ROOT / "docs" / "file-format.md"


def term(layout: tnc.Layout, topology: tnc.Topology, ranks: tuple[int, ...], *formats: str) -> TermSpec:
    parsed = tuple(map(tnc.parse_format, formats * (1 if len(formats) > 1 else len(topology.legs))))
    return TermSpec(layout=layout, topology=topology, ranks=ranks, formats=parsed)


def several_networks() -> dict[str, tnc.NetworkSpec]:
    """Specs of a (12, 20) weight that between them have all that a spec can have."""
    orders = tuple(FibreOrder(axis=a, permutation=tuple(torch.randperm(n).tolist())) for a, n in ((0, 12), (1, 20)))
    digits = ((3, 4), (4, 5))
    terms = {
        "tree": [
            term(tnc.Layout.of(digits, mode_order=(2, 0, 3, 1)), tnc.Topology.balanced_tree(range(4)), (3, 2, 3, 3, 3), "fp32")
        ],
        "padded": [term(tnc.Layout.of(((3, 5), (3, 7)), (12, 20)), tnc.Topology.train([(0, 2), (1, 3)]), (9,), "bf16", "fp16")],
        "ordered": [term(tnc.Layout.of(((12,), (20,)), fibre_orders=orders), tnc.Topology.two_cores(2, (0,)), (8,), "int8g8z")],
        "pivots": [term(tnc.Layout.native((12, 20)), tnc.Topology.two_cores(2, (0,)), (7,), "bf16p", "bf16")],
        "offsets": [term(tnc.Layout.native((12, 20)), tnc.Topology.one_core(2), (), "int5g8o")],
        "sorted": [
            TermSpec(
                layout=tnc.Layout.native((12, 20)),
                topology=tnc.Topology.one_core(2),
                ranks=(),
                formats=(SortedFormat(run=20, rank=2, step=0.4),),
            )
        ],
        "sum": [
            term(tnc.Layout.native((12, 20)), tnc.Topology.one_core(2), (), "int3g64"),
            term(tnc.Layout.of(digits, fibre_orders=orders), tnc.Topology.train(4), (3, 6, 4), "int6g0"),
        ],
    }
    return {name: tnc.NetworkSpec(shape=(12, 20), terms=tuple(found)) for name, found in terms.items()}


def test_any_network_is_read_from_the_folder(tmp_path: Path) -> None:
    specs = several_networks()
    model = nn.ModuleDict({name: nn.Linear(20, 12) for name in specs})
    layers = {name: LayerPlan(kind="linear", spec=spec, bias=True) for name, spec in specs.items()}
    tnc.apply_plan(model, Plan(layers=layers, metric="euclidean"), workers=1)
    tnc.save(model, tmp_path / "saved")
    manifest, tensors, weights = read_model(tmp_path / "saved")
    assert manifest["nbytes"] == sum(tensor.nbytes for tensor in load_file(tmp_path / "saved" / "model.safetensors").values())
    for name in specs:
        module = model.get_submodule(name)
        assert isinstance(module, NetworkModule)
        np.testing.assert_allclose(weights[name], module.dense_weight(torch.float32).detach().numpy(), atol=2e-6)
        np.testing.assert_array_equal(tensors[f"{name}.bias"], module.bias.detach().numpy())


@pytest.mark.parametrize("bits", [4.0, 12.0])
def test_a_coded_model_is_read(bits: float, tmp_path: Path) -> None:
    model = tiny_llama()
    tnc.compress(model, tnc.Budget(bits_per_weight=bits), batches(), method="coded", workers=1)
    tnc.save(model, tmp_path / "saved")
    _, _, weights = read_model(tmp_path / "saved")
    assert len(weights) > 10
    for name, weight in weights.items():
        dense = model.get_submodule(name).dense_weight(torch.float32).numpy()
        np.testing.assert_allclose(weight, dense, rtol=1e-5, atol=1e-8)


def test_a_single_network_is_read_from_its_file(tmp_path: Path) -> None:
    for name, spec in several_networks().items():
        network = tnc.realise(torch.randn(12, 20), spec)
        nbytes = tnc.save_network(network, tmp_path / name)
        check_alone(tmp_path / name)
        metadata, tensors = read_safetensors(tmp_path / name)
        raw = load_file(tmp_path / name)
        assert sum(tensor.nbytes for tensor in raw.values()) == network.nbytes < nbytes
        stated = json.loads(metadata["tensornet_compress.network"])
        decoded = sum(term_dense(tensors, "network", t, term) for t, term in enumerate(stated["terms"]))
        np.testing.assert_allclose(decoded, network.to_dense().numpy(), atol=2e-6)


def test_a_compressed_model_is_read_from_the_folder(tmp_path: Path) -> None:
    model = tiny_llama(tied=True)
    report = tnc.compress(
        model,
        tnc.Budget(bits_per_weight=6.0),
        batches(2),
        targets=["*_proj", "embed_tokens", "lm_head"],
        method="dense",
        workers=1,
    )
    tnc.save(model, tmp_path / "saved", report=report)
    manifest, tensors, weights = read_model(tmp_path / "saved")
    found = dict(model.named_modules(remove_duplicate=False))
    for name, layer in manifest["plan"]["layers"].items():
        for module in (found[name], *(found[other] for other in layer["tied"])):
            np.testing.assert_allclose(weights[name], module.dense_weight(torch.float32).detach().numpy(), atol=2e-6)
    others = {name: value for name, value in model.state_dict().items() if name not in manifest["shared"]}
    for name, value in others.items():
        np.testing.assert_array_equal(tensors[name], value.float().numpy() if value.is_floating_point() else value.numpy())
    assert set(tensors) - set(others) <= {f"{name}.order{axis}" for name in weights for axis in (0, 1)}
    assert set(manifest["layers"]) == set(weights)


def table_fields(text: str, heading: str) -> set[str]:
    """What stands in backquotes in the first column of the first table below a heading."""
    table = text.split(heading, 1)[1].split("\n|", 1)[1].split("\n\n", 1)[0]
    return {
        name for row in table.splitlines() for name in re.findall(r"`([\w.*]+)`", row.split("|")[0 if row[0] != "|" else 1])
    }


def test_the_page_names_every_field() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert set(Manifest.model_fields) == table_fields(text, "### The manifest")
    assert set(ProfileSpec.model_fields) == table_fields(text, "## A KV profile")
    assert set(CacheRecord.model_fields) == table_fields(text, "## A saved cache")
    for kind in (LayerPlan, Plan, SideSpec, BlockRecord):
        assert all(f"`{name}`" in text for name in kind.model_fields), kind


def test_the_example_spec_is_one() -> None:
    (example,) = (block for block in blocks(PAGE) if block.language == "json")
    spec = tnc.NetworkSpec.from_json(example.text)
    assert spec.describe() == "4|6 r=2 bf16"


def coded_cache(mode: str, ids: Tensor) -> tuple[Any, kv.Profile]:
    """A filled cache of two rows, the first one padded."""
    model, profile = tiny("llama-gqa"), tiny_profile("llama-gqa")
    mask = torch.ones(2, 180, dtype=torch.int64)
    mask[0, :5] = 0
    cache = kv.CompressedCache(model, bits=3.0, profile=profile, mode=mode, block=64)  # type: ignore[arg-type]
    with torch.no_grad():
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        model(torch.cat([ids, ids], 1), attention_mask=mask, position_ids=positions, past_key_values=cache)
    return cache, profile


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(1, 90, (2, 90), generator=torch.Generator().manual_seed(2))


def test_a_live_cache_is_read_from_its_file(ids: Tensor, tmp_path: Path) -> None:
    cache, profile = coded_cache("live", ids)
    profile.save(tmp_path / "profile")
    cache.save(tmp_path / "cache.safetensors")
    read = Cache(tmp_path / "cache.safetensors", Profile(tmp_path / "profile"))
    for place, layer in enumerate(cache.compressed_layers):
        for name, side in zip(("key", "value"), layer.sides):
            wanted = side.code.decode(side.planes.whole()).transpose(1, 2).flatten(2)
            np.testing.assert_allclose(read.live(place, name), wanted.numpy(), atol=1e-4)


def test_a_storage_cache_is_read_from_its_file(ids: Tensor, tmp_path: Path) -> None:
    cache, profile = coded_cache("storage", ids)
    profile.save(tmp_path / "profile")
    cache.save(tmp_path / "cache.safetensors")
    read = Cache(tmp_path / "cache.safetensors", Profile(tmp_path / "profile"))
    assert len(read.record["blocks"]) == 2
    for sequence, records in zip(cache.sequences, read.record["blocks"]):
        for block, record in zip(sequence.blocks, records):
            assert (record["start"], record["length"], record["skipped"]) == (block.start, block.length, block.skipped)
            got = read.payload(record["payload"], record["tokens"])
            for side, wanted in zip(("key", "value"), cache.codec.decode(block.payload)):
                rows = torch.cat([layer.transpose(0, 1).flatten(1) for layer in wanted], 1)
                np.testing.assert_allclose(got[side], rows.numpy(), atol=1e-4)


def test_a_profile_is_read_from_its_folder(tmp_path: Path) -> None:
    profile = tiny_profile("llama-gqa")
    profile.save(tmp_path / "profile")
    text, raw = ((tmp_path / "profile" / f"profile.{end}").read_bytes() for end in ("json", "safetensors"))
    check_seal(text.decode())
    assert json.loads(text)["hashes"] == {name: hash_of(name, raw) for name in profile.tensors()}
    read = Profile(tmp_path / "profile")
    assert set(read.tensors) == set(read_safetensors(tmp_path / "profile" / "profile.safetensors")[1])
    for side, tree in profile.trees.items():
        coefficients = torch.randn(3, tree.components)
        np.testing.assert_allclose(read.states(side, coefficients.numpy()), tree.synthesise(coefficients).numpy(), atol=1e-3)

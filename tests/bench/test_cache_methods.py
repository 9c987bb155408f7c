"""Every cache method on a tiny model: bits against a count by hand, states that come back, bits by layer."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tensornet_compress.bench import methods  # noqa: F401
from tensornet_compress.bench.cache_case import CACHE_METHODS, STEP, CacheCase, CacheCoder, nominal
from tensornet_compress.bench.cache_documents import Reading, documents, read_on
from tensornet_compress.bench.peer_packages import Unavailable
from tensornet_compress.bench.peers.stock_caches import STALE_SECONDS, drop_stale_lock
from tensornet_compress.bench.registry import Method
from tests.kv.tiny_models import VOCABULARY, _llama

READING = Reading(context=160, ahead=24)


@pytest.fixture(scope="module")
def case() -> CacheCase:
    torch.manual_seed(0)
    model = _llama(2).eval()
    windows = torch.randint(1, VOCABULARY, (5, 192), generator=torch.Generator().manual_seed(1))
    return CacheCase(model, windows, sensitivity_windows=1, draws=1)


@pytest.fixture(scope="module")
def document(case: CacheCase):
    ids = torch.randint(1, VOCABULARY, (1, READING.context + READING.ahead), generator=torch.Generator().manual_seed(2))
    return documents(case.model, ids, READING)[0]


@pytest.mark.parametrize("method", list(CACHE_METHODS), ids=lambda method: method.name)
@pytest.mark.parametrize("bits", [4.0, 1.0])
def test_a_method_decodes_within_its_rate(
    method: Method[CacheCase, CacheCoder], bits: float, case: CacheCase, document
) -> None:
    body = [[x[:, READING.body] for x in states] for states in (document.keys, document.values)]
    positions = torch.arange(READING.context)[READING.body]
    try:
        coder = method.run(case, bits)
        keys, values, spent = coder.recode(*body, positions)
    except Unavailable as reason:
        pytest.skip(str(reason))
    assert [k.shape for k in keys] == [k.shape for k in body[0]]
    assert spent <= bits + (1e-9 if method.ours else STEP)
    lost = sum(float((a - b).square().sum()) for pair in zip((keys, values), body) for a, b in zip(*pair))
    norm = sum(float(x.square().sum()) for states in body for x in states)
    assert lost < norm * (0.2 if bits == 4.0 and not method.name.startswith("sequence") else 4.0)
    if coder.layer_bits:
        assert sum(map(sum, coder.layer_bits)) / (2 * len(coder.layer_bits)) == pytest.approx(spent, abs=1e-6)


@pytest.mark.parametrize(
    ("name", "bits", "counted"),
    [
        ("kivi", 3.0, lambda width: 3 + 32 / 64),  # 16 bits of scale and of zero point for groups of 64
        ("kivi", 2.5, lambda width: 2 + 32 / 32),
        ("per-token", 4.0, lambda width: 2 + 32 / width),  # heads of 16: two more bits
        ("turboquant", 4.0, lambda width: 3 + 16 / width),  # one norm
        ("quantized-hqq", 4.0, lambda width: 4 + 32 / 64),
        ("quantized-quanto", 2.0, lambda width: 2 + 32 / 64),
    ],
)
def test_bits_are_codes_and_everything_beside_them(
    name: str, bits: float, counted: Callable[[int], float], case: CacheCase, document
) -> None:
    try:
        coder = CACHE_METHODS[name].run(case, bits)
    except Unavailable as reason:
        pytest.skip(str(reason))
    body = [[x[:, READING.body] for x in states] for states in (document.keys, document.values)]
    assert coder.recode(*body, torch.arange(READING.context)[READING.body])[2] == counted(case.width)


def test_uncoded_states_give_the_exact_answers(case: CacheCase, document) -> None:
    for name, (got, _) in read_on(case.model, document.keys, document.values, document.continuations).items():
        assert torch.allclose(got, document.exact[name], atol=1e-4)


def test_a_copied_span_lies_inside_the_context() -> None:
    assert Reading().copied_span(0) == slice(Reading().copied_span(0).start, Reading().copied_span(0).start + 128)
    for context in (128, 160, 448, 1024):
        reading = Reading(context=context, ahead=24)
        for index in range(5):
            span = reading.copied_span(index)
            assert span.start > 0
            assert span.stop <= context


def test_a_rate_below_every_grid_is_unavailable() -> None:
    assert nominal(2.0, [(4, 64), (2, 64)], lambda code, group: code + 32 / group) == (2, 64)
    with pytest.raises(Unavailable, match=r"takes 2\.5 bits per element, asked for 1"):
        nominal(1.0, [(4, 64), (2, 64)], lambda code, group: code + 32 / group)


def test_only_an_old_lock_of_a_build_is_dropped(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    lock.touch()
    drop_stale_lock(lock)
    assert lock.exists()
    long_ago = lock.stat().st_mtime - STALE_SECONDS - 1
    os.utime(lock, (long_ago, long_ago))
    drop_stale_lock(lock)
    assert not lock.exists()
    drop_stale_lock(lock)


@pytest.mark.parametrize("name", ["sequence-svd", "sequence-tucker"])
def test_a_rank_that_takes_too_much_is_not_taken(name: str) -> None:
    states = [torch.randn(2, 3, 16)]
    with pytest.raises(Unavailable, match=r"takes [\d.]+ bits per element, asked for 0\.1"):
        CACHE_METHODS[name].run(None, 0.1).recode(states, states, torch.arange(3))  # type: ignore[arg-type]

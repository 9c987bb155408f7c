"""Every search method on a small tensor: it keeps the error, and counts its bytes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from tensornet_compress.bench import methods  # noqa: F401
from tensornet_compress.bench.fields import burgers, elevation, heat_field, spots, turbulence, vortices, wave_field
from tensornet_compress.bench.peer_packages import Unavailable
from tensornet_compress.bench.peers.error_bounded import bounded
from tensornet_compress.bench.registry import Method
from tensornet_compress.bench.search import SearchBench, SearchSettings
from tensornet_compress.bench.search_case import SEARCH_METHODS, SearchCase, Stored
from tensornet_compress.errors import TensorNetError


@pytest.fixture(scope="module")
def field() -> torch.Tensor:
    return wave_field(8, steps=8)


@pytest.mark.parametrize("method", list(SEARCH_METHODS), ids=lambda method: method.name)
def test_a_method_keeps_the_error(method: Method[SearchCase, Stored], field: torch.Tensor) -> None:
    try:
        found = method.run(SearchCase(field, 5.0), 0.05)
    except Unavailable as reason:
        pytest.skip(str(reason))
    assert found.nbytes > 0
    assert found.error is None or found.error <= 0.05
    assert found.error is not None or "predicted" in found.note


def test_a_bounded_peer_gets_its_best_bound_though_errors_do_not_grow_evenly() -> None:
    """A coder that rounds to multiples of the bound, but at some narrow bounds is exact, and at some wide ones takes less."""
    field = torch.randn(500, generator=torch.Generator().manual_seed(0))
    norm, tried = float(field.norm()), []

    def coder(array: np.ndarray, bound: float) -> tuple[int, np.ndarray]:
        decoded = np.round(array / bound) * bound if int(8 * np.log2(bound)) % 3 else array + bound
        nbytes = int(1000 - 50 * np.log2(bound) + 100 * (int(40 * np.log2(bound)) % 2))
        tried.append((nbytes, float(np.linalg.norm(decoded - array)) / norm))
        return nbytes, decoded

    found = bounded({"jagged": coder}, SearchCase(field, 1.0), 0.02)
    assert found.nbytes == min(nbytes for nbytes, error in tried if error <= 0.02)
    assert found.error is not None
    assert 0.01 < found.error <= 0.02
    with pytest.raises(Unavailable, match="no bound"):
        bounded({"useless": lambda array, bound: (1, array + norm)}, SearchCase(field, 1.0), 0.02)


@pytest.mark.parametrize(
    "make", [partial(vortices, 16, 3), partial(turbulence, 8), partial(burgers, 6, 32), partial(spots, 16, 2), elevation]
)
def test_fields_are_finite_and_not_constant(make: Callable[[], torch.Tensor]) -> None:
    made = make()
    assert made.dtype == torch.float32
    assert bool(made.isfinite().all())
    assert float(made.std()) > 1e-4 * float(made.abs().max())


def test_bytes_of_the_train_are_those_of_its_cores(field: torch.Tensor) -> None:
    found = SEARCH_METHODS["teneva"].run(SearchCase(field, 5.0), 1e-2)
    modes, ranks = found.settings["modes"], [1, *found.settings["ranks"], 1]
    assert found.settings["format"] in ("bf16", "fp16")
    assert found.nbytes == 2 * sum(ranks[i] * modes[i] * ranks[i + 1] for i in range(len(modes)))


def test_ours_is_never_larger_than_its_rivals_in_native_order(field: torch.Tensor) -> None:
    case = SearchCase(field, 10.0)
    found = {name: SEARCH_METHODS[name].run(case, 0.05).nbytes for name in ("ours", "svd", "tt-native", "ht-balanced", "dense")}
    assert found["ours"] == min(found.values())


def test_rows_hold_the_drawn_network_and_settings(tmp_path: Path) -> None:
    file = tmp_path / "mine.npy"
    np.save(file, heat_field(8, steps=8).numpy())
    bench = SearchBench(SearchSettings(tensors=(str(file),), methods=("ours",), budget=5.0))
    (job,) = bench.jobs()
    row = job.work()
    assert row["values"]["ratio"] == row["values"]["nbytes"] / (4 * 8**3)
    assert row["drawings"]
    assert row["settings"]["shape"] == [8, 8, 8]


def test_impossible_inputs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TensorNetError, match="no file at"):
        SearchBench(SearchSettings(tensors=(str(tmp_path / "missing.npy"),)))
    with pytest.raises(TensorNetError, match="errors must lie between 0 and 1"):
        SearchBench(SearchSettings(errors=(2.0,)))

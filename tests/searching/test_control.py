"""What a search may claim: interrupted, without control, out of range, and with nothing in native order that fits."""

from __future__ import annotations

import pytest
import torch

import tensornet_compress as tnc
from tensornet_compress.errors import TensorNetError
from tensornet_compress.searching import Null, engine
from tensornet_compress.searching.control import SHUFFLES, controlled, joined, needed, shuffles
from tensornet_compress.searching.limits import NEVER


def hidden_product(seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(8, 8, generator=generator) for _ in range(2))
    return torch.einsum("ad,bc->abcd", a, b).reshape(64, 64)


def test_an_interrupt_returns_the_best_so_far(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(engine.Search, "_search_modes", interrupt)
    result = tnc.search(hidden_product(), max_error=0.05)
    assert not result.finished
    assert result.null is None
    assert result.error <= 0.05
    assert "not everything was tried" in result.reason or "before its control" in result.reason


def test_an_interrupt_before_anything_is_found_stays_an_interrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(engine.Search, "_dense", interrupt)
    with pytest.raises(KeyboardInterrupt):
        tnc.search(torch.randn(8, 8), max_error=0.05)


def test_no_ordering_counts_without_its_control() -> None:
    tensor = hidden_product()
    result = tnc.search(tensor, max_error=1e-3, time_budget=1e-6)
    assert result.null is None
    assert not result.choice.ordered
    whole = tnc.search(tensor, max_error=1e-3, orderings=("mode",))
    assert whole.null is not None
    assert whole.null.finished
    assert whole.null.measured > 0
    assert whole.choice.ordered
    assert whole.best.nbytes < result.best.nbytes


def test_an_order_that_alone_fits_is_returned() -> None:
    torch.manual_seed(0)
    product = torch.kron(torch.randn(8, 8), torch.randn(8, 8))
    result = tnc.search(product, max_bytes=600, topologies=("cut",), null=False)
    assert result.best.nbytes <= 600
    assert result.error < 1e-5
    assert "native order" in result.reason


def test_a_control_that_keeps_nothing_does_not_end_the_search() -> None:
    torch.manual_seed(3)
    tensor = torch.randn(64, 64) * torch.logspace(0, 3, 64)[:, None]
    result = tnc.search(tensor, max_error=0.006, formats=("int8g64",), topologies=("svd",))
    assert result.error <= 0.006
    assert result.null is not None
    assert result.null.gain == 1.0


def test_a_cut_in_native_order_is_no_ordering() -> None:
    result = tnc.search(torch.sin(torch.linspace(0, 9, 997)), max_error=0.01, topologies=("cut",))
    assert result.choice.family == "cut"
    assert not result.choice.ordered


def test_errors_of_rounding_do_not_make_an_ordering() -> None:
    tensor = torch.outer(torch.linspace(1, 2, 32), torch.linspace(1, 3, 32))
    result = tnc.search(tensor, max_bytes=300, orderings=("mode",))
    assert not result.choice.ordered


@pytest.mark.parametrize("size", [1e10, 1e-10])
def test_formats_out_of_reach_are_left_out_aloud(size: float) -> None:
    torch.manual_seed(0)
    result = tnc.search(torch.randn(24, 32) * size, max_error=0.05, null=False)
    assert "left out" in result.reason
    assert result.error <= 0.05
    with pytest.raises(TensorNetError, match="out of reach of int4g64z"):
        tnc.search(torch.randn(24, 32) * size, max_error=0.05, formats=("int4g64z",))


def test_entries_beyond_single_precision_are_refused() -> None:
    with pytest.raises(TensorNetError, match="rescale"):
        tnc.search(torch.randn(8, 8, dtype=torch.float64) * 1e300, max_error=0.05)


def test_a_string_is_not_a_list_of_names() -> None:
    with pytest.raises(TensorNetError, match="string 'mode'"):
        tnc.search(torch.randn(4, 4), max_error=0.1, orderings="mode")  # type: ignore[arg-type]


def lucky(gain: float, finished: bool = True) -> Null:
    return Null(100, 0.1, gain, "cut", measured=3, finished=finished)


def test_an_interrupt_of_the_control_keeps_what_was_found(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, runs = engine.Search.run, []

    def interrupt(run: engine.Search) -> None:
        runs.append(run)
        if len(runs) > 1:
            raise KeyboardInterrupt
        whole(run)

    monkeypatch.setattr(engine.Search, "run", interrupt)
    result = tnc.search(hidden_product(), max_error=0.05)
    assert len(runs) == 2
    assert result.null is None
    assert result.error <= 0.05
    assert not result.choice.ordered


def test_gains_near_those_of_a_shuffle_take_more_shuffles() -> None:
    def shuffled(gain: float, luck: list[float]) -> Null:
        left = iter(luck)
        found = controlled(shuffles(torch.eye(4), 0), lambda _: lucky(next(left)), gain, NEVER)
        assert found is not None
        return found

    assert shuffled(1.2, [1.05, 1.0, 1.1, 1.02, 1.0]).gains == (1.05, 1.0, 1.1, 1.02, 1.0)
    assert shuffled(1.2, [1.05, 1.19, 1.0]).gains == (1.05, 1.19)
    assert shuffled(1.2, [1.3]).gain == 1.3
    assert shuffled(2.5, [1.1]).gains == (1.1,)
    assert shuffled(float("inf"), [1.1]).gains == (1.1,)


def test_few_and_unfinished_shuffles_need_larger_gains() -> None:
    assert needed(None) == pytest.approx(1.01)
    one, cut_short, same = joined([lucky(1.1)]), joined([lucky(1.1, finished=False)]), joined([lucky(1.1)] * SHUFFLES)
    assert needed(same) == pytest.approx(1.01 * 1.1)
    assert needed(one) == pytest.approx(1.25 * 1.1)
    assert needed(cut_short) == pytest.approx(2 * 1.1)
    spread = joined([lucky(gain) for gain in (1.0, 1.05, 1.1, 1.15, 1.2)])
    assert needed(spread) > 1.3
    assert joined([]) is None


def test_shuffles_differ_and_are_those_of_their_seed() -> None:
    tensor = torch.arange(24.0).reshape(4, 6)
    (first, second), (again, _) = ([shuffled for shuffled, _ in zip(shuffles(tensor, seed), range(2))] for seed in (3, 3))
    assert not torch.equal(first, second)
    assert torch.equal(first, again)
    assert torch.equal(second.flatten().sort().values, tensor.flatten())


@pytest.mark.parametrize("seed", [3, 4])
def test_noise_under_a_tight_limit_is_not_put_in_order(seed: int) -> None:
    noise = torch.randn(48, 40, generator=torch.Generator().manual_seed(seed))
    result = tnc.search(noise, max_bytes=300, time_budget=600)
    assert not result.choice.ordered
    assert result.null is not None
    assert len(result.null.gains) > 1


def test_entropy_coded_cores_have_time_left_when_the_rest_took_all_of_its_own(monkeypatch):
    """They come last: without time of their own a search that was cut short lost to one dense core."""
    tensor = torch.randn(96, 96, generator=torch.Generator().manual_seed(0))
    alone = tnc.search(tensor, max_error=0.1, topologies=("dense",), orderings=(), null=False, time_budget=600)
    assert alone.best.spec.terms[0].formats[0].name == "ec"

    def slow(search, *_):
        search.deadline.stopped = True

    monkeypatch.setattr(engine.Search, "_try_native", slow)
    monkeypatch.setattr(engine.Search, "_search_modes", slow)
    found = tnc.search(tensor, max_error=0.1, null=False, time_budget=600)
    assert not found.finished
    assert found.best.nbytes <= alone.best.nbytes

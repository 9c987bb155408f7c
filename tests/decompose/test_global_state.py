"""The user's process is left as found: tensorly's backend, torch's generator, thread counts."""

import threading

import pytest
import torch

import tensornet_compress as tnc
from tensornet_compress.compressing.workers import run_jobs
from tensornet_compress.decompose import svd
from tensornet_compress.decompose.tensorly_adapter import tensorly_left_alone
from tensornet_compress.threads import limited_threads
from tests.generators import decaying_tensor


def train():
    return tnc.to_network(decaying_tensor((4, 5, 6)), max_error=0.1)


def in_a_thread(work):
    results = []
    thread = threading.Thread(target=lambda: results.append(work()))
    thread.start()
    thread.join()
    assert results, "the thread failed"
    return results[0]


@pytest.fixture
def tensorly():
    module = pytest.importorskip("tensorly")
    before = module.get_backend()
    yield module
    module.set_backend(before)


@pytest.mark.parametrize("backend", ["numpy", "pytorch"])
def test_the_backend_of_tensorly_is_left_as_chosen(tensorly, backend):
    tensorly.set_backend(backend)
    train()
    assert tensorly.get_backend() == backend
    assert in_a_thread(tensorly.get_backend) == backend
    in_a_thread(train)
    assert tensorly.get_backend() == backend
    assert in_a_thread(lambda: (train(), tensorly.get_backend())[1]) == backend


def test_the_backend_is_put_back_after_an_error(tensorly, monkeypatch):
    def refuse(*_args, **_kwargs):
        raise RuntimeError("stop")

    monkeypatch.setattr("tensornet_compress.decompose.tensorly_adapter.truncated", refuse)
    with pytest.raises(RuntimeError, match="stop"):
        train()
    assert tensorly.get_backend() == "numpy"
    assert in_a_thread(tensorly.get_backend) == "numpy"


@pytest.mark.parametrize("backend", ["numpy", "pytorch"])
def test_a_package_that_chooses_a_backend_when_imported_does_not_choose_ours(tensorly, backend):
    tensorly.set_backend(backend)
    other = {"numpy": "pytorch", "pytorch": "numpy"}[backend]
    with tensorly_left_alone():
        tensorly.set_backend(other)
    assert tensorly.get_backend() == backend
    assert in_a_thread(tensorly.get_backend) == backend


def test_threads_working_at_once_do_not_disturb_each_other(tensorly):
    wanted = train().to_dense()
    results = []

    def work():
        for _ in range(5):
            results.append(train().to_dense())

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 15
    assert all(torch.equal(result, wanted) for result in results)
    assert tensorly.get_backend() == "numpy"


def test_random_numbers_are_not_drawn():
    before = torch.get_rng_state()
    train()
    run_jobs(svd, [torch.eye(3)] * 2, workers=1)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_thread_counts_are_put_back():
    run_jobs(svd, [torch.eye(3)] * 2, workers=1)
    assert torch.get_num_threads() == 2
    with limited_threads():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2
    with pytest.raises(RuntimeError, match="stop"), limited_threads():
        raise RuntimeError("stop")
    assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("two_threads")
def test_thread_counts_are_put_back_from_another_thread():
    in_a_thread(lambda: run_jobs(svd, [torch.eye(3)] * 2, workers=1))
    assert torch.get_num_threads() == 2
    assert in_a_thread(torch.get_num_threads) == 2

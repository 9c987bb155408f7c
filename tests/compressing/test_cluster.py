import os
import signal
import sys
import threading
import time

import pytest
import torch
from joblib import parallel_config

import tensornet_compress as tnc
from tensornet_compress.calibrate.fisher_metrics import GROUP
from tensornet_compress.compressing.cluster import cluster
from tensornet_compress.compressing.workers import JobRoom, limited_room, run_jobs
from tensornet_compress.errors import TensorNetError
from tensornet_compress.threads import Stopped, leave_if_stopped
from tests.models import batches, tiny_llama

BUDGET = tnc.Budget(bits_per_weight=5.0)


def square(number):
    return number * number, os.getpid()


def dies_once(task):
    mark, number = task
    if number == 2 and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return number * number


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """The bytes of a compression by this process alone."""
    place = tmp_path_factory.mktemp("cluster")
    tiny_llama(layers=2).save_pretrained(place / "large")
    return place, small(place, "alone", None)


def small(place, name, where):
    target = place / name
    tnc.compress_folder(
        place / "large", target, BUDGET, [batches(1)[0][:1]], workers=1 if where is None else None, cluster=where
    )
    return {path.name: path.read_bytes() for path in target.iterdir()}


@pytest.fixture
def scheduler():
    """A Dask cluster of two workers, each a process of its own."""
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, dashboard_address=None, processes=True, silence_logs=50
    ) as found:
        yield found.scheduler_address.removeprefix("tcp://")


def test_dask_makes_the_same_bytes_and_outlives_a_worker(local, scheduler, tmp_path):
    place, alone = local
    assert small(place, "dask", f"dask://{scheduler}") == alone
    with cluster(f"dask://{scheduler}"):
        results = run_jobs(square, range(8))
        assert [result for result, _ in results] == [n * n for n in range(8)]
        assert os.getpid() not in {process for _, process in results}
        assert run_jobs(dies_once, [(tmp_path / "mark", n) for n in range(6)]) == [n * n for n in range(6)]
    assert (tmp_path / "mark").exists()


def test_dask_shares_the_sweeps_over_many_windows(local, scheduler):
    place, _ = local
    windows = batches(GROUP + 4, 1)
    made = {}
    for name, where in (("many-alone", None), ("many-dask", f"dask://{scheduler}")):
        tnc.compress_folder(place / "large", place / name, BUDGET, windows, cluster=where)
        made[name] = {path.name: path.read_bytes() for path in (place / name).iterdir()}
    assert made["many-alone"] == made["many-dask"]
    model = tiny_llama(layers=2)
    tnc.compress(model, BUDGET, windows)
    loaded = tnc.load(place / "many-dask")
    assert torch.equal(loaded(windows[0]).logits, model(windows[0]).logits)


def test_ray_makes_the_same_bytes_on_two_nodes_and_outlives_a_worker(local, tmp_path):
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    place, alone = local
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        nodes.add_node(num_cpus=1)
        ray.init(address=nodes.address, log_to_driver=False)
        assert len(ray.nodes()) == 2
        assert small(place, "ray", "ray") == alone
        with cluster("ray"):
            received = []
            results = run_jobs(square, range(100), receive=lambda number, _: received.append(number))
            assert [result for result, _ in results] == [n * n for n in range(100)]
            assert received == list(range(100))
            assert os.getpid() not in {process for _, process in results}
            assert run_jobs(dies_once, [(tmp_path / "mark", n) for n in range(6)]) == [n * n for n in range(6)]
        assert ray.is_initialized()
    finally:
        ray.shutdown()
        nodes.shutdown()


def test_threads_give_results_in_order_and_pass_errors_on():
    threads, received = torch.get_num_threads(), []

    def work(number):
        if number == 12:
            raise ValueError("twelve")
        assert torch.get_num_threads() == 1
        return number * number

    assert run_jobs(work, range(9), 3, receive=lambda number, result: received.append((number, result))) == squares_below(9)
    assert received == list(enumerate(squares_below(9)))
    with pytest.raises(ValueError, match="twelve"):
        run_jobs(work, range(40), 3)
    assert torch.get_num_threads() == threads


def test_a_job_that_fails_ends_the_run_at_once():
    begun = []

    def work(number):
        begun.append(number)
        if number == 1:
            raise ValueError("one")
        time.sleep(3 if number == 0 else 0.01)

    with pytest.raises(ValueError, match="one"):
        run_jobs(work, range(500), 2)
    assert len(begun) < 10


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_jobs_that_nobody_waits_for_stop_at_their_next_step(error):
    stopped = []

    def endless(_):
        try:
            while True:
                leave_if_stopped()
                time.sleep(0.01)
        except Stopped:
            stopped.append(True)
            raise

    def work(number):
        if number == 1 and error is ValueError:
            raise error
        # Jobs within jobs are told too.
        return None if number == 0 and error is not ValueError else run_jobs(endless, range(1), 1)

    def receive(*_):
        raise error

    with pytest.raises(error):
        run_jobs(work, range(3), 2, receive)
    assert stopped
    leave_if_stopped()


def test_joblibs_settings_are_followed():
    with parallel_config("loky", n_jobs=2):
        processes = {process for _, process in run_jobs(square, range(20))}
    assert 1 <= len(processes) <= 2
    assert os.getpid() not in processes
    for given in ({"backend": "threading"}, {"n_jobs": 2}):
        with parallel_config(**given):
            assert {process for _, process in run_jobs(square, range(20))} == {os.getpid()}


def squares_below(count):
    return [number * number for number in range(count)]


def test_threads_wait_for_room():
    lock, taken, most = threading.Lock(), [0], [0]

    def work(size):
        with lock:
            taken[0] += size
            most[0] = max(most[0], taken[0])
        time.sleep(0.002)
        with lock:
            taken[0] -= size

    sizes = [3, 4, 1, 5, 2, 9, 1, 1, 6, 4]
    run_jobs(work, sizes, 4)
    assert most[0] > 9
    most[0] = 0
    with limited_room(JobRoom(6, lambda size: size)):
        run_jobs(work, sizes, 4)
    # First come, first served: a large job is not kept waiting by small ones behind it.
    order = []
    with limited_room(JobRoom(4, lambda number: 4 if number == 1 else 1)):
        run_jobs(lambda number: (order.append(number), time.sleep(0.002)), range(12), 3)
    assert order.index(1) <= 3
    # The one of nine runs although there is no room for it, but alone.
    assert most[0] == 9


def test_clusters_that_are_none():
    for place in ("slurm", "processes://here", "Ray"):
        with pytest.raises(TensorNetError, match="unknown cluster"), cluster(place):
            pass
    with pytest.raises(TensorNetError, match="no Dask scheduler answers"), cluster("dask://127.0.0.1:1"):
        pass


def test_a_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(TensorNetError, match=r"pip install 'tensornet-compress\[ray\]'"), cluster("ray"):
        pass

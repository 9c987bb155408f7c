"""Compiled loops follow PyTorch's number of threads and leave it alone, from their first use in a process on."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import torch

from tensornet_compress.threads import limited_threads, worthwhile_threads

_FIRST_USE = """
import torch
from tensornet_compress.threads import compiled_threads, worthwhile_threads
torch.set_num_threads(3)
with compiled_threads(worthwhile_threads(100, 1)):
    pass
torch.set_num_threads(1)
assert worthwhile_threads(100, 1) == 1
print(torch.get_num_threads())
torch.set_num_threads(3)
worthwhile_threads(100, 1)
print(torch.get_num_threads())
"""


def test_little_work_stays_on_one_thread() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert [worthwhile_threads(work, 10) for work in (0, 5, 19)] == [1, 1, 1]
    finally:
        torch.set_num_threads(before)


def test_first_use_does_not_change_the_threads_of_pytorch() -> None:
    done = subprocess.run([sys.executable, "-c", _FIRST_USE], capture_output=True, text=True)
    assert done.stdout.split() == ["1", "3"], done.stderr


def test_a_limit_holds_in_threads_that_worked_on_several_before_and_leaves_them_as_they_were() -> None:
    before = torch.get_num_threads()
    inside = limited_threads()

    def second() -> tuple[int, int]:
        torch.ones(64, 64) @ torch.ones(64, 64)
        with inside:
            within = torch.get_num_threads()
        return within, torch.get_num_threads()

    try:
        torch.set_num_threads(3)
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(torch.get_num_threads).result() == 3
            with limited_threads():
                assert pool.submit(second).result() == (1, 3)
                assert torch.get_num_threads() == 1
            assert pool.submit(torch.get_num_threads).result() == 3
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)

"""Kernels on several threads: every task is done once, by whoever is free."""

from __future__ import annotations

import ctypes
import time
from typing import Any

import numpy as np
import pytest

pytest.importorskip("numba")

from heddle_kernels.cpu_kernels.bits import compiled
from heddle_kernels.cpu_kernels.team import Tasks, _alone, in_parallel, new_tasks, next_member, next_task

NUM_TASKS = 10_000


@compiled
def count_tasks(tasks: Tasks, done: Any, members: Any) -> None:
    member = next_member(tasks)
    while True:
        task = next_task(tasks)
        if task >= done.shape[0]:
            return
        done[task] += 1
        members[member] += 1


@compiled
def count_together(num_threads: int, tasks: Tasks, done: Any, members: Any) -> None:
    in_parallel(num_threads, count_tasks, (tasks, done, members))


@pytest.mark.parametrize("num_threads", [1, 2, 3, 8])
def test_every_task_is_done_once(num_threads: int) -> None:
    for _ in range(20):
        done, members = np.zeros(NUM_TASKS, np.int64), np.zeros(num_threads, np.int64)
        count_together(num_threads, new_tasks(), done, members)
        assert (done == 1).all()
        assert members.sum() == NUM_TASKS


def test_several_threads_take_part() -> None:
    """Not in every round, if the machine is busy, but soon."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        done, members = np.zeros(NUM_TASKS * 10, np.int64), np.zeros(2, np.int64)
        count_together(2, new_tasks(), done, members)
        if (members > 0).all():
            return
    pytest.fail("one thread did all tasks of every round")


def test_a_torch_without_openmp_runs_one_member() -> None:
    ran = list[int]()
    member = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(ran.append)
    _alone(ctypes.cast(member, ctypes.c_void_p), 7, 4, 0)
    assert ran == [7]

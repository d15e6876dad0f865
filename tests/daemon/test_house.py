# SPDX-License-Identifier: GPL-2.0-or-later
"""The daemon's own threads: on housekeeping pCPUs, set only when they are not, and said where that cannot be."""

import os
import subprocess

import pytest

from rtpind.core.audit import Kind, Level
from rtpind.core.cpuset import CpuSet
from rtpind.daemon.house import Housekeeper


class Threads:
    """Threads that a cpuset may keep from where they should be."""

    def __init__(self, places):
        self.places = {tid: CpuSet.parse(text) for tid, text in places.items()}
        self.fence = CpuSet.parse("0-7")
        self.calls = []
        self.records = []
        self.house = Housekeeper(
            lambda: list(self.places), self.records.append, affinity=self.affinity, set_affinity=self.set_affinity
        )

    def affinity(self, tid):
        if tid not in self.places:
            raise ProcessLookupError(tid)
        return self.places[tid]

    def set_affinity(self, tid, cpus):
        self.calls.append((tid, str(cpus)))
        if cpus & self.fence:
            self.places[tid] = cpus & self.fence
        return 0

    def keep(self, text):
        self.house.keep(CpuSet.parse(text))


def test_every_thread_is_put_there_and_a_right_one_is_left():
    """One call for each that is elsewhere; at the next look none."""
    threads = Threads({1: "0-7", 2: "0-1", 3: "5"})
    threads.keep("0-1")
    threads.keep("0-1")

    assert threads.calls == [(1, "0-1"), (3, "0-1")]
    assert threads.records == []


def test_new_threads_and_a_changed_pool_are_followed():
    """What began since the last look, and all of them when other pCPUs keep house."""
    threads = Threads({1: "0"})
    threads.keep("0")
    threads.places[2] = CpuSet.parse("0-7")
    threads.keep("0")
    threads.keep("0-1")

    assert threads.calls == [(2, "0"), (1, "0-1"), (2, "0-1")]


def test_without_housekeeping_pcpus_nothing_is_set():
    """An empty pool is no place."""
    threads = Threads({1: "0-7"})
    threads.keep("")

    assert (threads.calls, threads.records) == ([], [])


def test_what_a_cpuset_forbids_is_said_once_and_tried_again_when_it_changes():
    """Not at each look; a thread that was moved since, or another pool, is something new."""
    threads = Threads({1: "4-7", 2: "4-7"})
    threads.fence = CpuSet.parse("1,4-7")
    for _ in range(3):
        threads.keep("0-1")

    assert threads.calls == [(1, "0-1"), (2, "0-1")]
    (record,) = threads.records
    assert (record.kind, record.level) == (Kind.DAEMON, Level.WARNING)
    assert "runs on pCPU 1 and not on housekeeping pCPU 0-1" in record.message

    threads.fence = CpuSet.parse("0-7")
    threads.places[2] = CpuSet.parse("6")
    threads.keep("0-1")
    assert threads.calls[2:] == [(2, "0-1")]
    assert len(threads.records) == 1


def test_a_thread_that_ends_meanwhile_is_no_trouble():
    """The list is older than the look."""
    threads = Threads({1: "0-7"})
    threads.house = Housekeeper(lambda: [9, 1], threads.records.append, affinity=threads.affinity,
                                set_affinity=threads.set_affinity)  # fmt: skip
    threads.keep("0")

    assert threads.calls == [(1, "0")]


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two pCPUs")
def test_the_kernel_does_it():
    """On the real one."""
    first = min(os.sched_getaffinity(0))
    child = subprocess.Popen(["sleep", "60"])
    try:
        Housekeeper(lambda: [child.pid], lambda _: None).keep(CpuSet([first]))
        assert os.sched_getaffinity(child.pid) == {first}
    finally:
        child.kill()
        child.wait()

# SPDX-License-Identifier: GPL-2.0-or-later
"""Which pCPUs somebody else holds: what is a pin and what is a slice, and how often it is looked."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from factories import cpus, host
from trees import PF_KTHREAD, make_tree, process, stat_line, until

from rtpind.core.cpuset import CpuSet
from rtpind.host.foreign import Foreign
from rtpind.host.proc import TICKS, Proc

NOW_S = 1000.0
OLD = int((NOW_S - 100) * TICKS)
HOST = host(online="0-7", isolated="2-7")


class Seen:
    """A host with some processes; ``masks``: where each thread may run, everywhere when it is not there."""

    def __init__(self, root: Path, *processes: dict[int, bytes], **masks: str) -> None:
        files: dict[str, str | bytes] = {"proc/uptime": f"{NOW_S} 0.0\n"}
        for threads in processes:
            files |= process(min(threads), threads)
        self.masks = {int(tid[1:]): mask for tid, mask in masks.items()}
        self.time = 0.0
        self.reads = 0
        self.proc = Proc(make_tree(root, files), affinity=self.affinity)
        self.proc.kernel_threads.scan()
        self.foreign = Foreign(self.proc, clock=lambda: self.time)

    def affinity(self, tid: int) -> CpuSet:
        self.reads += 1
        self.time += 0.001
        if self.masks.get(tid) == "gone":
            raise ProcessLookupError
        return cpus(self.masks.get(tid, "0-7"))

    def busy(self, on: Any = HOST, ours: tuple[int, ...] = ()) -> dict[int, str]:
        return self.foreign.busy(on, set(ours))


def one(tid: int, comm: str = "x", **fields: Any) -> dict[int, bytes]:
    return {tid: stat_line(tid, comm, **({"start": OLD} | fields))}


@pytest.mark.parametrize(
    ("mask", "busy"),
    [
        ("3", "3"),
        ("2-3", "2-3"),
        ("2,4,6,7", "2,4,6-7"),
        ("2-6", ""),  # five: a slice
        ("0-7", ""),
        ("0-1", ""),  # all that is not isolated: what everybody has
        ("0-2", ""),
        ("0", "0"),
        ("1-2", "1-2"),
    ],
)
def test_a_narrow_mask_is_a_pin_and_a_wide_one_a_slice(tmp_path: Path, mask: str, busy: str) -> None:
    """At most four pCPUs, and not all that are not isolated."""
    found = Seen(tmp_path, one(20, "pmd-c03/id:8"), t20=mask).busy()

    assert found == dict.fromkeys(cpus(busy), "pmd-c03/id:8 (20)")


@pytest.mark.parametrize(
    ("online", "isolated", "mask", "busy"),
    [
        ("0-3", "", "0-1", "0-1"),
        ("0-3", "", "0-2", ""),  # more than half
        ("0-1", "", "1", "1"),
        ("0", "", "0", ""),
        ("0-1", "0-1", "0", "0"),  # everything is isolated
        ("0-7", "", "8-9", ""),  # none that is online
        ("0-7", "1-7", "0", ""),
        ("0-1023", "", "4-7", "4-7"),
        ("0-1023", "", "4-8", ""),
    ],
)
def test_what_is_narrow_depends_on_the_host(tmp_path: Path, online: str, isolated: str, mask: str, busy: str) -> None:
    """A small host has less to narrow to."""
    seen = Seen(tmp_path, one(20), t20=mask)

    assert seen.busy(host(online=online, isolated=isolated)) == dict.fromkeys(cpus(busy), "x (20)")


def test_any_thread_of_a_process_counts(tmp_path: Path) -> None:
    """The main thread of a poll-mode driver is not the one that is pinned; odd names are shown as they are."""
    threads = one(20, "ovs-vswitchd") | one(21, "pmd-c03") | one(22, ") (evil\n")
    seen = Seen(tmp_path, threads, t21="3", t22="4")

    assert seen.busy() == {3: "pmd-c03 (21)", 4: ") (evil\n (22)"}


@pytest.mark.parametrize(
    "fields", [{"flags": PF_KTHREAD}, {"start": int((NOW_S - 4) * TICKS)}], ids=["kernel thread", "just begun"]
)
def test_some_do_not_count(tmp_path: Path, fields: dict[str, int]) -> None:
    """The kernel's own threads are many and at home there; what has just begun may be gone, or be moved."""
    assert Seen(tmp_path, one(20, **fields), t20="3").busy() == {}


def test_a_kernel_thread_with_a_process_number_that_was_reused_does_not_count(tmp_path: Path) -> None:
    """What it is now decides."""
    seen = Seen(tmp_path, one(20), t20="3")
    make_tree(tmp_path, process(20, one(20, flags=PF_KTHREAD)))

    assert seen.busy() == {}


def test_guests_do_not_count_and_neither_does_rtpind(tmp_path: Path) -> None:
    """A guest's process as a whole, other threads of guests one by one; this process."""
    me = os.getpid()
    masks = {"t20": "3", "t21": "4", "t30": "5", "t31": "6", f"t{me}": "7"}
    seen = Seen(tmp_path, one(20) | one(21), one(30) | one(31), one(me), **masks)

    assert seen.busy(ours=(20, 31)) == {5: "x (30)"}
    assert seen.reads == 1


def test_the_narrowest_and_then_the_oldest_is_named(tmp_path: Path) -> None:
    """Of several on one pCPU."""
    processes = [one(20, "wide", start=OLD - 1), one(21, "young", start=OLD + 1), one(22, "old"), one(23, "higher")]
    seen = Seen(tmp_path, *processes, t20="3-4", t21="3", t22="3", t23="3")

    assert seen.busy() == {3: "old (22)", 4: "wide (20)"}


def test_who_ends_meanwhile_is_left_out(tmp_path: Path) -> None:
    """Before its affinity is read, after that, and as a whole process."""
    seen = Seen(tmp_path, one(20), one(21), one(22), one(23), t20="gone", t21="3", t22="4", t23="5")
    (tmp_path / "proc/21/task/21/stat").unlink()
    (tmp_path / "proc/22/task/22/stat").unlink()
    (tmp_path / "proc/22/task/22/cgroup").unlink()
    (tmp_path / "proc/22/task/22").rmdir()
    (tmp_path / "proc/22/task").rmdir()

    assert seen.busy() == {5: "x (23)"}


def test_a_scan_takes_one_hundredth_of_the_time(tmp_path: Path) -> None:
    """In between the last answer stands: here a scan takes 2 ms, so that there is none for 200."""
    seen = Seen(tmp_path, one(20), one(21), t20="3")
    before = seen.busy()
    seen.masks[21] = "4"
    seen.time += 0.199

    assert seen.busy() == before == {3: "x (20)"}
    assert seen.reads == 2

    seen.time += 0.002
    assert seen.busy() == {3: "x (20)", 4: "x (21)"}


def test_who_turns_out_to_be_a_guests_is_not_shown_any_more(tmp_path: Path) -> None:
    """Found while nobody knew of the guest (libvirt was away, say), and known before it is time to look again."""
    seen = Seen(tmp_path, one(20) | one(21), one(30), one(40), t21="3", t30="4", t40="5")

    assert seen.busy() == {3: "x (21)", 4: "x (30)", 5: "x (40)"}
    assert seen.foreign.busy(HOST, {20, 30}, anew=False) == {5: "x (40)"}
    assert seen.busy(ours=(21,)) == {4: "x (30)", 5: "x (40)"}
    assert seen.reads == 4


def test_a_real_pin_is_found() -> None:
    """On the real host: a program under taskset holds its pCPU, and one that is not pinned none."""
    proc = Proc()
    online = CpuSet(os.sched_getaffinity(0))
    if len(online) < 2:
        pytest.skip("needs two pCPUs")
    last = max(online)
    children = [subprocess.Popen(["taskset", "-c", str(last), "sleep", "60"]), subprocess.Popen(["sleep", "60"])]
    try:
        until(lambda: os.sched_getaffinity(children[0].pid) == {last}, "it is pinned")
        until(lambda: proc.stat(children[0].pid).comm == "sleep", "it is the program")
        proc.kernel_threads.scan()
        seen = host(online=str(online), isolated="")
        # Whoever else is pinned there is as narrow and older, and then named: all others are taken for a guest's.
        ours = set(proc.pids()) - {child.pid for child in children}

        assert Foreign(proc, old_s=0).busy(seen, ours) == {last: f"sleep ({children[0].pid})"}
        assert Foreign(proc).busy(seen, ours) == {}
    finally:
        for child in children:
            child.kill()
            child.wait()

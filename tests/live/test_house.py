# SPDX-License-Identifier: GPL-2.0-or-later
"""The daemon itself: all its threads run on housekeeping pCPUs, its loop at FIFO while it enforces."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable

from harness import Daemon, policy

from demo.guests import wait_for


def test_every_thread_of_the_daemon_keeps_house(daemon: Callable[..., Daemon]) -> None:
    """From the first look on, after somebody moved them, and when the pool becomes another one."""
    made = daemon(policy(period="100ms", housekeeping="0", realtime="1"))
    made.start()
    pid = made.tid()

    def all_on(cpus: set[int]) -> bool:
        tids = [int(tid) for tid in os.listdir(f"/proc/{pid}/task")]
        return len(tids) >= 4 and all(os.sched_getaffinity(tid) == cpus for tid in tids)

    wait_for(lambda: all_on({0}), "every thread is on pCPU 0")
    subprocess.run(["taskset", "-a", "-p", "-c", "0-1", str(pid)], check=True, capture_output=True)
    wait_for(lambda: all_on({0}), "every thread is back on pCPU 0")

    made.write(policy(period="100ms", housekeeping="1", realtime="0"))
    made.reload()
    wait_for(lambda: all_on({1}), "every thread is on pCPU 1")


def test_its_loop_is_realtime_while_it_enforces(daemon: Callable[..., Daemon]) -> None:
    """One above what it gives to vCPUs, and who tells of starts with it; no thread that talks to libvirt or others."""
    text = policy(mode="observe", period="100ms", names=[("rtpind-no-such-guest", "realtime")])
    made = daemon(text)
    made.start()
    pid = made.tid()

    def are(*wanted: int) -> bool:
        """Whether the main thread, and so many of the others, are FIFO 2; all others not realtime."""
        tids = [int(tid) for tid in os.listdir(f"/proc/{pid}/task")]
        found = {tid: (os.sched_getscheduler(tid), os.sched_getparam(tid).sched_priority) for tid in tids}
        fifo = [tid for tid, place in found.items() if place == (os.SCHED_FIFO | os.SCHED_RESET_ON_FORK, 2)]
        calm = [tid for tid, place in found.items() if place == (os.SCHED_OTHER, 0)]
        return (
            len(calm) >= 4 and len(fifo) + len(calm) == len(tids) and len(fifo) in wanted and (not fifo or pid in fifo)
        )

    wait_for(lambda: are(0), "it is not realtime")
    made.write(text.replace("observe", "enforce"))
    made.reload()
    wait_for(lambda: are(2, 3), "the loop is FIFO 2, and who listens to the kernel")
    subprocess.run(["chrt", "-a", "-o", "-p", "0", str(pid)], check=True, capture_output=True)
    wait_for(lambda: are(2, 3), "they are again")
    subprocess.run(["chrt", "-a", "-f", "-p", "2", str(pid)], check=True, capture_output=True)
    wait_for(lambda: are(2, 3), "and the others are not")

    made.write(text.replace("daemon: {", "daemon: {priority: 0, ").replace("observe", "enforce"))
    made.reload()
    wait_for(lambda: are(0), "it is as it was started")

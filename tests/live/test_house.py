# SPDX-License-Identifier: GPL-2.0-or-later
"""The daemon itself: all its threads run on housekeeping pCPUs at FIFO while it enforces, and come back there."""

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


def test_it_is_realtime_while_it_enforces(daemon: Callable[..., Daemon]) -> None:
    """One above what it gives to vCPUs: all its threads, those that begin later too; not while it only observes."""
    text = policy(mode="observe", period="100ms", names=[("rtpind-no-such-guest", "realtime")])
    made = daemon(text)
    made.start()
    pid = made.tid()

    def all_are(scheduler: int, priority: int) -> bool:
        tids = [int(tid) for tid in os.listdir(f"/proc/{pid}/task")]
        found = {(os.sched_getscheduler(tid), os.sched_getparam(tid).sched_priority) for tid in tids}
        return len(tids) >= 4 and found == {(scheduler, priority)}

    wait_for(lambda: all_are(os.SCHED_OTHER, 0), "it is not realtime")
    made.write(text.replace("observe", "enforce"))
    made.reload()
    wait_for(lambda: all_are(os.SCHED_FIFO, 2), "every thread is FIFO 2")
    subprocess.run(["chrt", "-a", "-o", "-p", "0", str(pid)], check=True, capture_output=True)
    wait_for(lambda: all_are(os.SCHED_FIFO, 2), "every thread is FIFO 2 again")

    made.write(text.replace("daemon: {", "daemon: {priority: 0, ").replace("observe", "enforce"))
    made.reload()
    wait_for(lambda: all_are(os.SCHED_OTHER, 0), "it is as it was started")

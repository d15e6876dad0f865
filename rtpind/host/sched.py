# SPDX-License-Identifier: GPL-2.0-or-later
"""The only module that changes a thread: sched_setaffinity(2) and sched_setscheduler(2) (a test checks that)."""

from __future__ import annotations

import errno
import os

from rtpind.core.cpuset import CpuSet
from rtpind.core.model import Sched, Scheduling
from rtpind.host.proc import RESET_ON_FORK

_NUMBERS = {Sched.OTHER: 0, Sched.FIFO: 1, Sched.RR: 2, Sched.BATCH: 3, Sched.IDLE: 5, Sched.EXT: 7}


def set_affinity(tid: int, cpus: CpuSet) -> int:
    """Allow the thread ``tid`` to run on ``cpus`` only. Return 0 or the errno.

    ESRCH: it is gone. EPERM: no CAP_SYS_NICE over it. EINVAL: its cpuset has none of ``cpus``, or the kernel
    forbids it (PF_NO_SETAFFINITY). Success may still mean a narrower mask: the kernel silently intersects with
    the cpuset, so read it back.
    """
    try:
        os.sched_setaffinity(tid, cpus)
    except OSError as error:
        return error.errno or 0
    return 0


def set_scheduling(tid: int, scheduling: Scheduling) -> int:
    """Give the thread ``tid`` a policy and priority. Return 0 or the errno.

    EPERM: no CAP_SYS_NICE, an RT_GROUP_SCHED cgroup without budget, or a security module. EINVAL: DEADLINE, which
    this call cannot give.
    """
    if scheduling.sched not in _NUMBERS:
        return errno.EINVAL
    number = _NUMBERS[scheduling.sched] | (RESET_ON_FORK if scheduling.reset_on_fork else 0)
    try:
        os.sched_setscheduler(tid, number, os.sched_param(scheduling.priority))
    except OSError as error:
        return error.errno or 0
    return 0

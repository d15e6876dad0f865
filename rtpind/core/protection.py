# SPDX-License-Identifier: GPL-2.0-or-later
"""Where a FIFO vCPU that never sleeps could take the host with it (promise 7). Pure."""

from __future__ import annotations

from rtpind.core.cpuset import CpuSet
from rtpind.core.model import Host


def fifo_withheld(host: Host, cpus: CpuSet, priority: int, housekeeping: CpuSet, *, unsafe: bool) -> str:
    """Return why promise 7 withholds FIFO ``priority`` on ``cpus``; "" when it may be given."""
    if cpus & housekeeping:
        return f"pCPU {cpus & housekeeping} is housekeeping"
    if unsafe:
        return ""
    for cpu in cpus:
        lowest = None if host.guards is None else host.guards.get(cpu)
        if unprotected(host, cpu) and lowest is not None and lowest <= priority:
            return (
                f"nothing protects the host on pCPU {cpu}: RT throttling is off, there is no fair server, and its "
                f"ksoftirqd, ktimers or rcuc is at FIFO {lowest}, not above {priority} (raise them, or give back "
                "kernel.sched_rt_runtime_us, or say unsafe: true in the class)"
            )
    return ""


def unprotected(host: Host, cpu: int) -> bool:
    """Return whether neither RT throttling nor the fair server protects ``cpu``; what is unknown protects."""
    throttled = host.throttles is not False and host.rt_runtime_us != -1
    served = host.fair_server is None or cpu in host.fair_server
    return not throttled and not served

# SPDX-License-Identifier: GPL-2.0-or-later
"""What people write instead: ``python -m bench.rivals subscriber|poller PREFIX VCPUS HELPERS FIFO``.

Both pin every thread of the guests whose names begin with PREFIX: the subscriber once, when libvirt says STARTED; the
poller all of them once a second, whatever they have. VCPUS and HELPERS are lists of pCPUs (``1,2``), FIFO a priority.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from pathlib import Path

import libvirt

from bench.guests import Place
from demo.guests import RUN_DIR

#: The ``started`` hook as operators write it: a shell script with taskset and chrt. It does nothing for other guests
#: or when the run that installed it is gone.
HOOK = """\
#!/bin/sh
{mark} {harness}
kill -0 {harness} 2>/dev/null || exit 0
case $1 in {prefix}-*) ;; *) exit 0 ;; esac
: >{called}
[ "$2" = started ] || exit 0
pid=$(cat {run_dir}/"$1".pid)
for task in /proc/"$pid"/task/*; do
    tid=${{task##*/}}
    read -r comm <"$task/comm"
    case $comm in
    "CPU "*)
        taskset -pc {vcpus} "$tid"
        [ {fifo} = 0 ] || chrt -f -p {fifo} "$tid"
        ;;
    *) taskset -pc {helpers} "$tid" ;;
    esac
done >/dev/null 2>&1
exit 0
"""


def pin(name: str, place: Place) -> None:
    """Pin every thread that a guest has now."""
    with contextlib.suppress(OSError, ValueError):
        pid = int((RUN_DIR / f"{name}.pid").read_text())
        for tid in map(int, os.listdir(f"/proc/{pid}/task")):
            with contextlib.suppress(OSError):
                vcpu = Path(f"/proc/{tid}/comm").read_text().startswith("CPU ")
                os.sched_setaffinity(tid, place.vcpus if vcpu else place.helpers)
                if vcpu and place.fifo:
                    os.sched_setscheduler(tid, os.SCHED_FIFO, os.sched_param(place.fifo))


def subscribe(prefix: str, place: Place) -> None:
    """Pin a guest when libvirt says that it has started."""

    def happened(_conn: libvirt.virConnect, domain: libvirt.virDomain, event: int, _detail: int, _opaque: None) -> None:
        if event == libvirt.VIR_DOMAIN_EVENT_STARTED and domain.name().startswith(prefix + "-"):
            pin(domain.name(), place)

    libvirt.virEventRegisterDefaultImpl()
    conn = libvirt.openReadOnly("qemu:///system")
    conn.domainEventRegisterAny(None, libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE, happened, None)
    print("ready", file=sys.stderr, flush=True)
    while True:
        libvirt.virEventRunDefaultImpl()


def poll(prefix: str, place: Place) -> None:
    """Pin all guests once a second."""
    print("ready", file=sys.stderr, flush=True)
    while True:
        for file in RUN_DIR.glob(f"{prefix}-*.pid"):
            pin(file.stem, place)
        time.sleep(1)


def main() -> None:
    """Run one of them until it is ended."""
    kind, prefix, vcpus, helpers, fifo = sys.argv[1:]
    on, off = (frozenset(map(int, words.split(","))) for words in (vcpus, helpers))
    {"subscriber": subscribe, "poller": poll}[kind](prefix, Place(on, off, int(fifo)))


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: GPL-2.0-or-later
"""Functions that the agent calls on the lab host: guests, and their threads as the kernel shows them.

Nothing here uses rtpind's code. Everything goes in and out as JSON.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import socket
import threading
from pathlib import Path
from typing import Any

import libvirt

from demo.guests import Guest, Lab

_by_name: dict[str, Guest] = {}
_lock = threading.Lock()


@functools.cache
def _made() -> Lab:
    return Lab(prefix="rt")


def lab() -> Lab:
    """Return the lab of guests; a connection that was lost is made anew."""
    with _lock:
        made = _made()
        alive = False
        with contextlib.suppress(libvirt.libvirtError):
            alive = bool(made.conn.isAlive()) and made.conn.getLibVersion() > 0
        if not alive:
            made.reconnect()
    return made


def start(name: str, *, firmware: bool = False, **options: Any) -> dict[str, Any]:
    """Start a guest ``rt-NAME`` (see demo.guests.Lab.start). Firmware takes 20 s of a CPU under TCG in TCG."""
    guest = lab().start(name, firmware=firmware, few_questions=True, **options)
    _by_name[guest.name] = guest
    return {"name": guest.name, "uuid": guest.uuid, "pid": guest.pid}


def destroy(names: list[str]) -> None:
    """End guests; with no names all of this lab."""
    connected = lab()
    for name in names or list(_by_name):
        guest = _by_name.pop(name, None)
        if guest is not None:
            guest.destroy()
            connected.guests.pop(guest.uuid, None)


def clear() -> None:
    """End all guests, also those that scenarios defined or that came from elsewhere, and forget their definitions."""
    destroy([])
    everything = libvirt.VIR_DOMAIN_UNDEFINE_MANAGED_SAVE | libvirt.VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA
    for dom in lab().conn.listAllDomains():
        with contextlib.suppress(libvirt.libvirtError):
            dom.destroy()
        with contextlib.suppress(libvirt.libvirtError):
            dom.undefineFlags(everything)
    if left := [dom.name() for dom in lab().conn.listAllDomains()]:
        raise RuntimeError(f"still there: {', '.join(left)}")


def domain(name: str, method: str, arguments: list[Any]) -> Any:
    """Call a method of a guest's libvirt domain."""
    lab()
    return getattr(_by_name[name].dom, method)(*arguments)


def threads(pid: int) -> list[dict[str, Any]]:
    """Return the threads of a QEMU, its vhost and PIT workers."""
    tids = {int(tid) for tid in _list(f"/proc/{pid}/task")}
    # A worker that is a kernel thread began after its QEMU: no need to read the names of all the host's.
    later = (other for other in map(int, filter(str.isdigit, os.listdir("/proc"))) if other > pid)
    tids |= {other for other in later if _comm(other) in _workers(pid)}
    seen = (thread(tid) for tid in sorted(tids))
    return [found for found in seen if found is not None]


def _workers(pid: int) -> tuple[str, str]:
    return f"vhost-{pid}", f"kvm-pit/{pid}"


def _comm(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().rstrip("\n")
    except OSError:
        return ""


def thread(tid: int) -> dict[str, Any] | None:
    """Return a thread as the kernel shows it now; None when it is gone."""
    try:
        return {
            "tid": tid,
            "comm": _comm(tid),
            "cpus": sorted(os.sched_getaffinity(tid)),
            "policy": os.sched_getscheduler(tid),
            "priority": os.sched_getparam(tid).sched_priority,
            "start": int(Path(f"/proc/{tid}/stat").read_text().rpartition(")")[2].split()[19]),
            "cgroup": Path(f"/proc/{tid}/cgroup").read_text().strip().rpartition(":")[2],
        }
    except OSError:
        return None


def set_place(tid: int, cpus: list[int] | None = None, policy: int | None = None, priority: int = 0) -> None:
    """Move a thread as a stranger would."""
    if policy is not None:
        os.sched_setscheduler(tid, policy, os.sched_param(priority))
    if cpus is not None:
        os.sched_setaffinity(tid, cpus)


def status() -> dict[str, Any]:
    """Return the document of ``rtpinctl status``, without the seconds that a start of Python takes here."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.settimeout(30)
        client.connect("/run/rtpind/control")
        client.sendall(b'{"do": "status"}\n')
        with client.makefile("rb") as stream:
            answer = json.loads(stream.readline())
    if "ok" not in answer:
        raise RuntimeError(str(answer))
    return dict(answer["ok"])


def _list(path: str) -> list[str]:
    try:
        return os.listdir(path)
    except OSError:
        return []

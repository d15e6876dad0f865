# SPDX-License-Identifier: GPL-2.0-or-later
"""Throwaway guests: real QEMU processes under the real libvirt that boot 512 bytes from a floppy.

Each is named ``PREFIX-…`` and known by its UUID; :meth:`Lab.close` ends those that this lab started, and no other.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import shutil
import signal
import struct
import subprocess
import tempfile
import threading
import time
import uuid as uuids
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import libvirt

PREFIX = "rtpind-lab"
RUN_DIR = Path("/run/libvirt/qemu")

#: What a guest runs. ``idle``: halts. ``spin``: an endless loop. ``oslat``: loops on rdtsc and keeps a histogram of
#: gaps at 0x8000 of its memory (log2 of cycles), the largest at 0x8100, and its rounds at 0x8108. ``count``: counts its
#: rounds there and does nothing else.
BOOT = {
    "idle": bytes.fromhex("faf4ebfd"),
    "spin": bytes.fromhex("faebfe"),
    "count": bytes.fromhex("fa66ff060881ebf9"),
    "oslat": bytes.fromhex(
        "fa31c08ed88ec08ed0bc007cfcbf0080b90001f3abc706108150520f316689c30f316689c16629d96689c3660fbdf967"
        "66ff04bd00800000663b0e0081760566890e00816683060881016683160c8100ebce"
    ),
}

#: Has libvirt take QEMU for one that knows its CPU's features by words: it then asks for these, and not for each of
#: 400 features. That is most of a start where the host is emulated: QEMU reads its monitor byte by byte.
_FEW_QUESTIONS = """
  <qemu:capabilities xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
    <qemu:del capability='cpu-unavailable-features'/>
  </qemu:capabilities>
"""

_XML = """
<domain type='{kind}'>
  <name>{name}</name><uuid>{uuid}</uuid>
  <memory unit='MiB'>16</memory>{memory}
  <vcpu placement='static'{cpuset} current='{vcpus}'>{max_vcpus}</vcpu>
  <iothreads>{iothreads}</iothreads>{cputune}{numatune}
  <os><type arch='x86_64' machine='pc'>hvm</type>{loader}<boot dev='fd'/></os>
  <features><acpi/></features>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
    <disk type='file' device='floppy'>
      <driver name='qemu' type='raw'/><source file='{image}'/><target dev='fda'/><readonly/>
    </disk>
    <memballoon model='none'/>{devices}
  </devices>{more}
</domain>
"""


@dataclass(frozen=True, slots=True)
class Seen:
    """One thread as the kernel shows it, read without rtpind's code."""

    tid: int
    comm: str
    cpus: frozenset[int]
    policy: int  # SCHED_RESET_ON_FORK (0x40000000) is kept
    priority: int

    @property
    def fifo(self) -> bool:
        """Whether it is SCHED_FIFO."""
        return self.policy & 0xFF == os.SCHED_FIFO


class Guest:
    """One running guest of a lab."""

    def __init__(self, name: str, uuid: str, dom: libvirt.virDomain) -> None:
        self.name = name
        self.uuid = uuid
        self.dom = dom

    @property
    def pid(self) -> int:
        """The pid of its QEMU, from libvirt's pid file."""
        return int((RUN_DIR / f"{self.name}.pid").read_text())

    def running(self) -> bool:
        """Whether libvirt still has a pid file for it."""
        return (RUN_DIR / f"{self.name}.pid").exists()

    def threads(self) -> list[Seen]:
        """Return its QEMU's threads and the kernel's ``kvm-pit/PID``; those that end meanwhile are left out."""
        pid = self.pid
        found = [seen(int(tid)) for tid in os.listdir(f"/proc/{pid}/task")]
        pit = subprocess.run(["pgrep", "-x", f"kvm-pit/{pid}"], capture_output=True, text=True, check=False)
        found += [seen(int(tid)) for tid in pit.stdout.split()]
        return sorted((thread for thread in found if thread is not None), key=lambda thread: thread.tid)

    def vcpus(self) -> list[Seen]:
        """Return its vCPU threads in the order of their numbers."""
        found = [thread for thread in self.threads() if thread.comm.startswith("CPU ")]
        return sorted(found, key=lambda thread: int(thread.comm.split()[1].partition("/")[0]))

    def helpers(self) -> list[Seen]:
        """Return all its other threads."""
        return [thread for thread in self.threads() if not thread.comm.startswith("CPU ")]

    def iothreads(self) -> list[Seen]:
        """Return its iothreads."""
        return [thread for thread in self.threads() if thread.comm.startswith("IO iothread")]

    def destroy(self) -> None:
        """End it; no error when it is gone."""
        with contextlib.suppress(libvirt.libvirtError):
            self.dom.destroy()

    def memory(self) -> contextlib.AbstractContextManager[mmap.mmap]:
        """Map its memory (a guest started with ``shared=True``), to read what ``oslat`` wrote there."""
        return self.memory_of(self.name)

    @staticmethod
    @contextlib.contextmanager
    def memory_of(name: str) -> Iterator[mmap.mmap]:
        """Map the memory of a guest of that name, which may still be starting. Raises FileNotFoundError."""
        path = next(Path("/var/lib/libvirt/qemu/ram").glob(f"*-{name[:20]}*/pc.ram"), None)
        if path is None:
            raise FileNotFoundError(f"{name} has no memory to share")
        with open(path, "r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
            yield mapped


def seen(tid: int, comm: str = "") -> Seen | None:
    """Return a thread as the kernel shows it now; None when it is gone. ``comm``: its name, where that is known."""
    try:
        comm = comm or Path(f"/proc/{tid}/comm").read_text().rstrip("\n")
        return Seen(
            tid,
            comm,
            frozenset(os.sched_getaffinity(tid)),
            os.sched_getscheduler(tid),
            os.sched_getparam(tid).sched_priority,
        )
    except OSError:
        return None


def worst_gap(memory: mmap.mmap, *, reset: bool = False) -> int:
    """Return the largest gap in cycles that ``oslat`` saw; ``reset`` starts it anew."""
    (gap,) = struct.unpack_from("<I", memory, 0x8100)
    if reset:
        struct.pack_into("<I", memory, 0x8100, 0)
    return int(gap)


def rounds(memory: mmap.mmap) -> int:
    """Return the low 32 bits of what ``count`` or ``oslat`` counted; 0 before its first round."""
    (number,) = struct.unpack_from("<I", memory, 0x8108)
    return int(number)


def run_delay_ns(tid: int) -> int:
    """Return how long a thread was ready to run and did not (second field of schedstat)."""
    return int(Path(f"/proc/{tid}/schedstat").read_text().split()[1])


def wait_for(condition: Callable[[], object], what: str, timeout_s: float = 10.0) -> None:
    """Poll until ``condition`` is true; TimeoutError names ``what`` was waited for."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {timeout_s:g} s: {what}")
        time.sleep(0.005)


class Lab:
    """Starts guests, and ends those it started."""

    def __init__(self, prefix: str = PREFIX, uri: str = "qemu:///system") -> None:
        self.prefix = prefix
        self._uri = uri
        libvirt.registerErrorHandler(lambda *_: None, None)  # else it prints what is raised as well
        self.conn = libvirt.open(uri)
        self._dir = Path(tempfile.mkdtemp(prefix=f"{prefix}-", dir="/var/tmp"))
        self._dir.chmod(0o755)
        self.guests: dict[str, Guest] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def start(
        self,
        name: str,
        *,
        vcpus: int = 1,
        max_vcpus: int | None = None,
        iothreads: int = 0,
        kind: str = "qemu",
        boot: str = "idle",
        cputune: str = "",
        numatune: str = "",
        cpuset: str = "",
        devices: str = "",
        shared: bool = False,
        paused: bool = False,
        firmware: bool = True,
        few_questions: bool = False,
    ) -> Guest:
        """Start a guest ``PREFIX-name``. ``kind``: qemu (TCG) or kvm. Raises libvirt.libvirtError.

        Without ``firmware`` it runs ``idle``, ``spin`` or ``count`` from its first instruction on. With
        ``few_questions`` libvirt does not ask QEMU about each feature of the CPU, which takes long on a slow host.
        """
        image = self._file(f"{boot}.img", BOOT[boot].ljust(510, b"\0") + b"\x55\xaa")
        rom = self._file(f"{boot}.rom", BOOT[boot][:16].ljust(16, b"\0").rjust(0x10000, b"\0"))
        full, uuid = f"{self.prefix}-{name}", str(uuids.uuid4())
        source = "<memoryBacking><source type='file'/><access mode='shared'/></memoryBacking>" if shared else ""
        xml = _XML.format(
            kind=kind,
            name=full,
            uuid=uuid,
            memory=source,
            vcpus=vcpus,
            max_vcpus=max_vcpus or vcpus,
            iothreads=iothreads,
            cputune=f"<cputune>{cputune}</cputune>" if cputune else "",
            numatune=numatune,
            cpuset=f" cpuset='{cpuset}'" if cpuset else "",
            devices=devices,
            image=image,
            more=_FEW_QUESTIONS if few_questions else "",
            loader="" if firmware else f"<loader readonly='yes' type='rom'>{rom}</loader>",
        )
        dom = self.conn.createXML(xml, libvirt.VIR_DOMAIN_START_PAUSED if paused else 0)
        guest = Guest(full, uuid, dom)
        self.guests[uuid] = guest
        return guest

    def _file(self, name: str, data: bytes) -> Path:
        """Return a file that QEMU may read."""
        path = self._dir / name
        if not path.exists():
            fresh = path.with_suffix(f".{threading.get_ident()}")  # guests may be started by several threads
            fresh.write_bytes(data)
            fresh.chmod(0o644)
            fresh.rename(path)
        return path

    def reconnect(self) -> None:
        """Connect anew, after libvirtd was restarted."""
        with contextlib.suppress(libvirt.libvirtError):
            self.conn.close()
        self.conn = libvirt.open(self._uri)
        for guest in self.guests.values():
            with contextlib.suppress(libvirt.libvirtError):
                guest.dom = self.conn.lookupByUUIDString(guest.uuid)

    def kill(self) -> None:
        """End every QEMU of this lab at once; libvirt needs a second or two for each to notice: :meth:`close`."""
        for guest in self.guests.values():
            with contextlib.suppress(OSError, ValueError):
                os.kill(guest.pid, signal.SIGKILL)

    def close(self) -> None:
        """End every guest of this lab and remove its files."""
        with ThreadPoolExecutor(8) as pool:  # each takes libvirt more than a second
            list(pool.map(Guest.destroy, self.guests.values()))
        left = [guest for guest in self.guests.values() if guest.running()]
        for guest in left:  # libvirt was restarted meanwhile: ask it anew
            with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                subprocess.run(["virsh", "-q", "destroy", guest.uuid], capture_output=True, timeout=20, check=False)
        self.guests.clear()
        with contextlib.suppress(libvirt.libvirtError):
            self.conn.close()
        shutil.rmtree(self._dir, ignore_errors=True)


def kvm_works() -> bool:
    """Return whether libvirt can start KVM guests here."""
    try:
        conn = libvirt.openReadOnly("qemu:///system")
        capabilities = conn.getCapabilities()
        conn.close()
    except libvirt.libvirtError:
        return False
    return os.path.exists("/dev/kvm") and "<domain type='kvm'" in capabilities

# SPDX-License-Identifier: GPL-2.0-or-later
"""inotify(7) on what libvirt writes for its guests: their pid files and status, and the cgroups of their threads.

A pid file tells that a guest is being started long before libvirt does, which says nothing until the guest runs. The
directory ``vcpu0`` in its cgroup tells that libvirt is about to move that vCPU there, and a write into that directory's
``tasks`` or ``cgroup.threads`` that it has, and sets the affinity next: some 4 to 25 ms before the guest's first
instruction. Works without privileges and for both versions of cgroups.

Three calls by ctypes: the libraries for this that Debian 12 has (pyinotify, inotify, watchdog) are unmaintained, or
bring threads and queues of their own.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import struct
import threading
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from rtpind.host import pidfile
from rtpind.host.listener import Listener, Overran, Unheard
from rtpind.host.proc import Proc

# sys/inotify.h
_MODIFY, _MOVED_TO, _CREATE, _DELETE = 0x2, 0x80, 0x100, 0x200
_OVERFLOW, _IGNORED, _ONLYDIR = 0x4000, 0x8000, 0x01000000
#: By a write into one of these a thread is moved (cgroup v1, v2). The event comes when the write is over.
_MEMBERS = ("tasks", "cgroup.threads")
_EVENT = struct.Struct("iIII")
_ROOM = 64 * 1024

#: From libvirt's pid file to QEMU's execve(2) it takes some 50 ms; until then its arguments are not there to read.
_ARRIVAL_S, _PATIENCE_S = 0.02, 10.0
_ABSENT_S = 1.0


@dataclass(frozen=True, slots=True)
class Appeared:
    """The QEMU of a guest has been started: its threads begin now."""

    uuid: str
    name: str


@dataclass(frozen=True, slots=True)
class Saved:
    """libvirt has written a guest's status anew: it started, was pinned, or something was plugged in."""

    name: str


@dataclass(frozen=True, slots=True)
class Regrouped:
    """libvirt has made or removed a cgroup for a thread of a guest."""

    uuid: str


@dataclass(frozen=True, slots=True)
class Moved:
    """libvirt has moved a thread of a guest into its own cgroup; it sets its affinity next."""

    uuid: str


class Inotify(Listener):
    """Listens until it is stopped, below ``run_dir`` and where :meth:`watch` was last told."""

    name = "inotify"

    def __init__(
        self,
        post: Callable[[Appeared | Saved | Regrouped | Moved | Overran | Unheard], None],
        proc: Proc,
        run_dir: Path = pidfile.RUN_DIR,
    ) -> None:
        super().__init__(post)
        self._proc = proc
        self._run_dir = run_dir
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._fd = -1
        self._saved = -1  # the watch on run_dir
        # Watch → UUID, directory: of guests' cgroups, and of those of their threads. The lock: what happens in a
        # directory may be told before it is known here whose that is.
        self._guests: dict[int, tuple[str, str]] = {}
        self._threads: dict[int, tuple[str, str]] = {}
        self._lock = threading.Lock()
        self._arriving: dict[str, float] = {}  # name → until when its arguments are looked for
        self._full = False

    def open(self) -> int:
        """Open an inotify instance that watches run_dir."""
        fd = int(self._libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC))
        if fd < 0:
            raise self._error("fs.inotify.max_user_instances")
        self._fd = fd
        self._watch_run_dir()
        return fd

    def _watch_run_dir(self) -> None:
        """Watch run_dir; libvirt makes it when it first starts, which may be after us."""
        with contextlib.suppress(FileNotFoundError):
            self._saved = self._add(str(self._run_dir), _MODIFY | _MOVED_TO)

    def watch(self, uuid: str, directory: str) -> bool:
        """Watch a guest's cgroup, from any thread, instead of its last one; return whether it is watched from now on.

        What happened in it before is not told, nor what happens in cgroups that are in it by now: look at the guest.
        """
        with self._lock:
            self._drop(lambda other, where: other == uuid and where != directory)
            found = self._try(directory, _CREATE | _DELETE)
            if found >= 0:
                self._guests[found] = (uuid, directory)
        return found >= 0

    def keep(self, uuids: Collection[str]) -> None:
        """Watch the cgroups of no other guests, from any thread. A cgroup's watch outlives it, unlike a directory's."""
        with self._lock:
            self._drop(lambda uuid, _: uuid not in uuids)

    def _drop(self, which: Callable[[str, str], bool]) -> None:
        """Watch some cgroups no more, with those of the threads in them (UUID, directory)."""
        gone = {place for place in self._guests.values() if which(*place)}
        if not gone:
            return
        for watches in (self._guests, self._threads):
            for watch, (uuid, directory) in tuple(watches.items()):
                if (uuid, directory) in gone or (uuid, os.path.dirname(directory)) in gone:
                    self._unwatch(watches, watch)

    def _unwatch(self, watches: dict[int, tuple[str, str]], watch: int) -> None:
        del watches[watch]
        if self._fd >= 0:
            self._libc.inotify_rm_watch(self._fd, watch)  # EINVAL: the kernel was faster

    def _try(self, directory: str, mask: int) -> int:
        """Watch a cgroup that may have gone; return -1 when it is not watched. Says once that there is no room."""
        if self._fd < 0:
            return -1
        try:
            return self._add(directory, mask)
        except OSError as error:
            if error.errno == errno.ENOSPC and not self._full:
                self._full = True
                self.post(Unheard(self.name, str(error)))
            return -1

    def _add(self, directory: str, mask: int) -> int:
        found = int(self._libc.inotify_add_watch(self._fd, os.fsencode(directory), mask | _ONLYDIR))
        if found < 0:
            raise self._error("fs.inotify.max_user_watches" if ctypes.get_errno() == errno.ENOSPC else directory)
        return found

    @staticmethod
    def _error(what: str) -> OSError:
        number = ctypes.get_errno()
        return OSError(number, os.strerror(number), what)

    def hear(self) -> float | None:
        """Take all events that are there, and look whether those who are being started have arguments by now."""
        for event in self._events():
            with self._lock:
                self._take(*event)
        if self._saved < 0:
            self._watch_run_dir()
        for name, until in tuple(self._arriving.items()):
            pid = pidfile.pid_of(name, self._run_dir)
            uuid = "" if pid is None else self._proc.uuid(pid)
            if uuid:
                self.post(Appeared(uuid, name))
            elif pid is not None and time.monotonic() < until:
                continue
            del self._arriving[name]
        return _ARRIVAL_S if self._arriving else _ABSENT_S if self._saved < 0 else None

    def _wrote(self, name: str) -> None:
        """Take what libvirt has written into its run directory."""
        if name.endswith(".pid"):
            self._arriving[name.removesuffix(".pid")] = time.monotonic() + _PATIENCE_S
        elif name.endswith(".xml"):
            self.post(Saved(name.removesuffix(".xml")))

    def _take(self, watch: int, mask: int, name: str) -> None:
        if mask & _OVERFLOW:
            self.post(Overran())
        elif mask & _IGNORED:
            self._guests.pop(watch, None)
            self._threads.pop(watch, None)
            self._saved = -1 if watch == self._saved else self._saved
        elif watch in self._threads:
            if name in _MEMBERS:
                self.post(Moved(self._threads[watch][0]))
        elif watch in self._guests:
            uuid, directory = self._guests[watch]
            self._regrouped(uuid, f"{directory}/{name}", made=bool(mask & _CREATE))
        elif watch == self._saved:
            self._wrote(name)

    def _regrouped(self, uuid: str, directory: str, *, made: bool) -> None:
        """Tell of a cgroup that came or went. One that came is watched first: what is in it by then is for a look."""
        for watch, (_, where) in tuple(self._threads.items()):
            if where == directory:
                self._unwatch(self._threads, watch)
        watch = self._try(directory, _MODIFY) if made else -1
        if watch >= 0:
            self._threads[watch] = (uuid, directory)
        self.post(Regrouped(uuid))

    def _events(self) -> Iterator[tuple[int, int, str]]:
        """Yield (watch, mask, name) of all events that are there."""
        try:
            while data := os.read(self._fd, _ROOM):
                start = 0
                while start < len(data):
                    watch, mask, _, length = _EVENT.unpack_from(data, start)
                    start += _EVENT.size
                    yield watch, mask, os.fsdecode(data[start : start + length].rstrip(b"\0"))
                    start += length
        except BlockingIOError:
            return

    def close(self) -> None:
        """Close the instance, and with it all watches."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

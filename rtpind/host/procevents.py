# SPDX-License-Identifier: GPL-2.0-or-later
"""The kernel's proc connector: a word when a thread begins, or gets a name, in a guest's QEMU. One netlink socket.

It tells of threads that libvirt has no event for: vhost and io_uring workers, nx-recovery, workers of block jobs and
migrations, hot-plugged vCPUs and iothreads. A filter in the kernel (classic BPF on the socket) drops everything else,
so that other processes' forks cost the daemon nothing: not even a wake-up.

The kernel's side is drivers/connector/cn_proc.c. Before Linux 6.6 or so only CAP_NET_ADMIN may listen; nobody may in a
user, pid or network namespace of its own. A kernel thread's name raises no event, and before 6.4 it comes a moment
after the thread, so that its name is read here.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import socket
import struct
from collections.abc import Callable, Collection
from dataclasses import dataclass

from rtpind.host.listener import Listener, Overran, Unheard

_NETLINK_CONNECTOR = 11
_CN_IDX_PROC = _CN_VAL_PROC = 1
_LISTEN, _IGNORE = 1, 2
_NLMSG_DONE = 3
# enum proc_cn_event
_ACK, _FORK, _COMM = 0, 0x001, 0x200
#: struct nlmsghdr, struct cn_msg, and the operation.
_REQUEST = struct.Struct("=IHHII IIIIHH I")
#: Where in a message: cn_msg.ack, proc_event.what, and the first word of event_data.
_ACKED, _WHAT, _DATA = 28, 36, 52
#: event_data of a fork: parent_pid, parent_tgid, child_pid, child_tgid. Of comm: process_pid, process_tgid.
_PARENT_TGID, _CHILD_PID, _CHILD_TGID, _NAMED_TGID = _DATA + 4, _DATA + 8, _DATA + 12, _DATA + 4

# linux/filter.h, linux/bpf_common.h
_LD, _TAX, _JA, _JEQ, _JEQ_X, _RET = 0x20, 0x07, 0x05, 0x15, 0x1D, 0x06
_SO_ATTACH_FILTER = 26
_SO_RCVBUFFORCE = 33
_ALL = 0xFFFFFFFF
_BLOCK = 200  # a conditional jump reaches 255 instructions

#: Each event takes about 800 bytes of it: room for ten thousand.
_BUFFER_BYTES = 8 * 1024 * 1024
_ANSWER_S = 2.0
_KTHREADD = 2
_ROOM = 256  # for one event: it is 76 bytes
#: A kernel thread's name is looked for this often, this far apart.
_NAMINGS, _NAMING_S = 10, 0.005


@dataclass(frozen=True, slots=True)
class Stirred:
    """A thread began or was named in the guest whose QEMU is ``pid``; ``kernel``: a kernel thread with that number."""

    pid: int
    kernel: bool = False


def program(pids: Collection[int] | None) -> bytes:
    """Return the filter (an array of struct sock_filter) that lets pass what concerns the processes ``pids``.

    That is: new threads of theirs, new names of their threads, and new kernel threads (children of kthreadd). With
    None, every process's threads and names pass; new processes never do.
    """
    code = [
        _op(_LD, _WHAT),
        _op(_JEQ, _swapped(_ACK), 0, 1),
        _op(_RET, _ALL),
        _op(_JEQ, _swapped(_COMM), 11),
        _op(_JEQ, _swapped(_FORK), 1),
        _op(_RET, 0),
        _op(_LD, _PARENT_TGID),
        _op(_JEQ, _swapped(_KTHREADD), 0, 1),
        _op(_RET, _ALL),
        _op(_LD, _CHILD_PID),
        _op(_TAX, 0),
        _op(_LD, _CHILD_TGID),
        _op(_JEQ_X, 0, 0, 1),
        _op(_RET, 0),  # a new process
        _op(_JA, 1),
        _op(_LD, _NAMED_TGID),
    ]
    if pids is None:
        code.append(_op(_RET, _ALL))
    found = sorted(pids or ())
    for start in range(0, len(found), _BLOCK):
        block = found[start : start + _BLOCK]
        code += [_op(_JEQ, _swapped(pid), len(block) - place) for place, pid in enumerate(block)]
        code += [_op(_JA, 1), _op(_RET, _ALL)]
    code.append(_op(_RET, 0))
    return b"".join(code)


def _op(code: int, value: int, true: int = 0, false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, true, false, value)


def _swapped(value: int) -> int:
    """Return what a load gives for a word of the message: the filter takes them for network byte order."""
    (found,) = struct.unpack(">I", struct.pack("=I", value))
    return int(found)


def _request(operation: int, ack: int) -> bytes:
    header = (_REQUEST.size, _NLMSG_DONE, 0, 0, 0)
    return _REQUEST.pack(*header, _CN_IDX_PROC, _CN_VAL_PROC, 0, ack, 4, 0, operation)


def _word(message: bytes, offset: int) -> int:
    (found,) = struct.unpack_from("=I", message, offset)
    return int(found)


def _attach(opened: socket.socket, code: bytes) -> None:
    array = ctypes.create_string_buffer(code, len(code))
    opened.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("HP", len(code) // 8, ctypes.addressof(array)))


class ProcEvents(Listener):
    """Listens until it is stopped, for the processes that :meth:`watch` was last told."""

    name = "proc-events"

    def __init__(self, post: Callable[[Stirred | Overran | Unheard], None]) -> None:
        super().__init__(post)
        self._pids: frozenset[int] = frozenset()
        self._socket: socket.socket | None = None
        self._unnamed: dict[int, int] = {}  # kernel thread → how often its name is still looked for

    def watch(self, pids: Collection[int]) -> None:
        """Listen for these processes, from any thread: the kernel changes the filter at once."""
        if self._pids != (fresh := frozenset(pids)):
            self._pids = fresh
            with contextlib.suppress(OSError):  # it is being closed
                self._filter()

    def _filter(self) -> None:
        opened, pids = self._socket, self._pids
        if opened is not None:
            try:
                _attach(opened, program(pids))
            except OSError:  # too long for the memory that filters may take (net.core.optmem_max)
                _attach(opened, program(None))

    def open(self) -> int:
        """Open the socket, have the kernel begin, and wait for its word that it has."""
        opened = socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM, _NETLINK_CONNECTOR)
        self._socket = opened
        self._filter()
        try:
            opened.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _BUFFER_BYTES)
        except PermissionError:
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER_BYTES)  # as much as rmem_max allows
        try:
            opened.bind((0, _CN_IDX_PROC))
        except PermissionError:
            raise PermissionError("this kernel tells only whom CAP_NET_ADMIN vouches for") from None
        self._ask(opened)
        opened.setblocking(False)
        return opened.fileno()

    @staticmethod
    def _ask(opened: socket.socket) -> None:
        """Have the kernel begin, and wait for its word that it has. Raises OSError when it refuses."""
        opened.settimeout(_ANSWER_S)
        opened.send(_request(_LISTEN, os.getpid()))
        try:
            message = opened.recv(_ROOM)
            while _word(message, _WHAT) != _ACK or _word(message, _ACKED) != os.getpid() + 1:
                message = opened.recv(_ROOM)
        except TimeoutError:
            raise OSError("it tells only processes in the host's own user and pid namespace") from None
        if error := _word(message, _DATA):
            raise OSError(error, os.strerror(error))

    def hear(self) -> float | None:
        """Take all events that are there."""
        assert self._socket is not None
        found: set[int] = set()
        while True:
            try:
                message = self._socket.recv(_ROOM)
            except BlockingIOError:
                break
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                self.post(Overran())
                continue
            what = _word(message, _WHAT)
            if what == _COMM:
                found.add(_word(message, _NAMED_TGID))
            elif what == _FORK and _word(message, _PARENT_TGID) == _KTHREADD:
                self._unnamed[_word(message, _CHILD_PID)] = _NAMINGS
            elif what == _FORK:
                found.add(_word(message, _CHILD_TGID))
        for pid in sorted(self._pids & found):
            self.post(Stirred(pid))
        for pid in sorted(self._pids & self._named()):
            self.post(Stirred(pid, kernel=True))
        return _NAMING_S if self._unnamed else None

    def _named(self) -> set[int]:
        """Return what numbers the names of new kernel threads end with, such as ``vhost-4711`` and ``kvm-pit/4711``."""
        found: set[int] = set()
        for tid, left in tuple(self._unnamed.items()):
            try:
                with open(f"/proc/{tid}/comm", encoding="utf-8", errors="replace") as file:
                    name = file.read().strip()
            except OSError:
                name = ""
            if name == "kthreadd" and left:
                self._unnamed[tid] = left - 1
                continue
            del self._unnamed[tid]
            number = re.search(r"[-/](\d{1,9})$", name, re.ASCII)
            if number:
                found.add(int(number[1]))
        return found

    def close(self) -> None:
        """Have the kernel stop: an old one would go on making events when only the socket is closed."""
        opened, self._socket = self._socket, None
        if opened is not None:
            with contextlib.suppress(OSError):
                opened.send(_request(_IGNORE, 0))
            opened.close()

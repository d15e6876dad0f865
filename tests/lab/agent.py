# SPDX-License-Identifier: GPL-2.0-or-later
"""Runs on the lab host as root: does what comes through the virtio port, each request in a thread of its own.

A frame is one line of JSON and, as its ``size`` says, that many bytes. A request has an ``id`` and an ``op``; the
reply repeats the ``id``. ``call`` runs a function of :mod:`inside` in this process, so that a look costs no start of
Python.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
import traceback
from pathlib import Path
from typing import Any

PORT = "lab.agent"
SOURCE = "/opt/rtpind"
CGROUPS = Path("/sys/fs/cgroup")
#: Kernel threads that a host for realtime guests has above every FIFO vCPU, on every pCPU, as TuneD's
#: realtime-virtual-host does. By default ktimers/N is at FIFO 1: behind a vCPU that spins there it never runs, RT
#: throttling or not, and no timer of that pCPU expires. RCU's are raised on the kernel's command line.
RAISED = ("ktimers/", "ksoftirqd/")
RAISED_TO = 2

Frame = dict[str, Any]


def open_port() -> int:
    """Wait for the port and open it."""
    while True:
        for entry in Path("/sys/class/virtio-ports").glob("*/name"):
            if entry.read_text().strip() == PORT:
                with contextlib.suppress(OSError):
                    return os.open(f"/dev/{entry.parent.name}", os.O_RDWR)
        time.sleep(0.05)


def raise_kernel_threads() -> None:
    """Make a host for realtime guests of this one, before it has any."""
    for entry in Path("/proc").glob("[0-9]*/comm"):
        with contextlib.suppress(OSError):  # processes come and go
            if entry.read_text().startswith(RAISED):
                os.sched_setscheduler(int(entry.parent.name), os.SCHED_FIFO, os.sched_param(RAISED_TO))


def hold_cpuset() -> None:
    """Keep one cpuset for ever, in a cgroup of the lab's own.

    With its first and last cpuset Linux patches its own code: at a start or an end of a guest, where nobody else has
    one. Of two processors that QEMU emulates one may then still run into the breakpoint of a patch that is over (QEMU
    7.2; "Oops: int3" in get_page_from_freelist, twice in some 150 guests on Linux 6.12).
    """
    for group in (CGROUPS, CGROUPS / "lab"):  # systemd takes it from the root again, unless a child hands it on
        group.mkdir(exist_ok=True)
        (group / "cgroup.subtree_control").write_text("+cpuset")


class Agent:
    """One port, and the requests that came through it."""

    def __init__(self) -> None:
        self._fd = open_port()
        self._lock = threading.Lock()
        self._buffer = bytearray()

    def serve(self) -> None:
        """Read and answer requests for ever."""
        self._send({"id": 0, "op": "hello", "boot": Path("/proc/sys/kernel/random/boot_id").read_text().strip()})
        while True:
            line = self._line()
            request = json.loads(line)
            payload = self._exactly(int(request["size"]))
            threading.Thread(target=self._answer, args=(request, payload), daemon=True).start()

    def _line(self) -> bytes:
        while b"\n" not in self._buffer:
            self._read()
        return self._exactly(self._buffer.index(b"\n") + 1)

    def _exactly(self, size: int) -> bytes:
        while len(self._buffer) < size:
            self._read()
        found = bytes(self._buffer[:size])
        del self._buffer[:size]
        return found

    def _read(self) -> None:
        while not (part := os.read(self._fd, 65536)):  # nobody is at the other end
            time.sleep(0.1)
        self._buffer += part

    def _send(self, frame: Frame, payload: bytes = b"") -> None:
        data = json.dumps({**frame, "size": len(payload)}).encode() + b"\n" + payload
        with self._lock:
            while data:
                data = data[os.write(self._fd, data[:32768]) :]

    def _answer(self, request: Frame, payload: bytes) -> None:
        try:
            reply, output = getattr(self, f"do_{request['op']}")(request, payload)
        except Exception as error:
            reply, output = {"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}, b""
        self._send({"id": request["id"], **reply}, output)

    def do_hello(self, _request: Frame, _payload: bytes) -> tuple[Frame, bytes]:
        """Say which boot this is."""
        return {"boot": Path("/proc/sys/kernel/random/boot_id").read_text().strip()}, b""

    def do_run(self, request: Frame, payload: bytes) -> tuple[Frame, bytes]:
        """Run a command; one that takes too long is killed with its children."""
        process = subprocess.Popen(
            request["argv"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            cwd="/",
            env={**os.environ, **request.get("env", {})},
        )
        late = False
        try:
            out, err = process.communicate(payload, timeout=request["timeout"])
        except subprocess.TimeoutExpired:
            late = True
            with contextlib.suppress(OSError):
                os.killpg(process.pid, signal.SIGKILL)
            out, err = process.communicate()
        return {"code": process.returncode, "late": late, "out": len(out)}, out + err

    def do_push(self, request: Frame, payload: bytes) -> tuple[Frame, bytes]:
        """Unpack a tar archive."""
        with tarfile.open(fileobj=io.BytesIO(payload)) as archive:
            archive.extractall(request["directory"])
        return {}, b""

    def do_call(self, request: Frame, _payload: bytes) -> tuple[Frame, bytes]:
        """Call a function of :mod:`inside`."""
        function = getattr(importlib.import_module("inside"), request["function"])
        return {"result": function(**request["arguments"])}, b""


if __name__ == "__main__":
    sys.path.append(SOURCE)
    raise_kernel_threads()
    hold_cpuset()
    Agent().serve()

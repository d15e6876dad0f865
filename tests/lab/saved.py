# SPDX-License-Identifier: GPL-2.0-or-later
"""Keeps hosts that have booted: memory and disk of a shape, so that the next run continues where boot had ended.

A saved host is known by the hash of all that made it. RTPIND_LAB_BOOT=1 boots in any case.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from lab.image import cache

_MIGRATION_S = 300.0


@dataclass(frozen=True, slots=True)
class Saved:
    """Where a host is kept."""

    directory: Path

    @property
    def disk(self) -> Path:
        """What its disk has over the image."""
        return self.directory / "disk.qcow2"

    @property
    def memory(self) -> Path:
        """Its memory and devices."""
        return self.directory / "memory.zst"

    def exists(self) -> bool:
        """Whether it is there and wanted."""
        return os.environ.get("RTPIND_LAB_BOOT") != "1" and self.memory.exists()


def saved(name: str, command: Sequence[str], files: Sequence[Path]) -> Saved:
    """Return where the host of a shape is kept that QEMU ran with this command and that was given these files."""
    version = subprocess.run([command[0], "--version"], check=True, capture_output=True, text=True).stdout
    # TCG's TSC is the machine's own, and what Linux takes for its frequency is kept with the rest.
    model = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), "")
    parts = [version, model, *command, *(file.read_text() for file in files)]
    key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
    return Saved(cache() / f"saved-{name}-{key}")


def overlay(image: Path, path: Path) -> None:
    """Make a disk that takes what is written over an image."""
    command = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", str(image), str(path)]
    subprocess.run(command, check=True)


def save(to: Saved, name: str, monitor: Path, disk: Path) -> None:
    """Write a running host away, and let it run on. Older ones of its shape are removed."""
    work = Path(tempfile.mkdtemp(dir=cache(), prefix=f".saved-{name}-"))
    try:
        with Monitor(monitor) as qemu:
            qemu.do("migrate", uri=f"exec:zstd -q -1 -o {work}/memory.zst")
            deadline = time.monotonic() + _MIGRATION_S
            while (status := qemu.do("query-migrate").get("status")) != "completed":
                if status in ("failed", "cancelled") or time.monotonic() > deadline:
                    raise RuntimeError(f"the host could not be saved: {status}")
                time.sleep(0.2)
            shutil.copyfile(disk, work / "disk.qcow2")
            qemu.do("cont")
        for stale in cache().glob(f"saved-{name}-*"):
            shutil.rmtree(stale)
        work.rename(to.directory)
    finally:
        shutil.rmtree(work, ignore_errors=True)


class Monitor:
    """A connection to QEMU's monitor."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(60)
        self._socket.connect(str(path))
        self._stream = self._socket.makefile("rb")
        self._stream.readline()  # its greeting
        self.do("qmp_capabilities")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._stream.close()
            self._socket.close()

    def do(self, command: str, **arguments: Any) -> dict[str, Any]:
        """Execute a command. Raises RuntimeError with what QEMU says."""
        self._socket.sendall(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
        while line := self._stream.readline():
            answer = json.loads(line)
            if "error" in answer:
                raise RuntimeError(f"{command}: {answer['error']['desc']}")
            if "return" in answer:
                return dict(answer["return"] or {})
        raise RuntimeError(f"{command}: QEMU is gone")

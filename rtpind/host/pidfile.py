# SPDX-License-Identifier: GPL-2.0-or-later
"""Proves which process a guest's QEMU is: the holder of the lock on libvirt's pid file (promise 5).

libvirt leaves QEMU the open, locked file (vircommand.c, virPidFileAcquirePath), and the kernel says who holds a
lock, so that neither a stale file nor another process can stand in for it.
"""

from __future__ import annotations

import fcntl
import os
import struct
from pathlib import Path

_FLOCK = "hhqqi4x"  # struct flock on 64-bit Linux: l_type, l_whence, l_start, l_len, l_pid
RUN_DIR = Path("/run/libvirt/qemu")


def holder(path: Path | str) -> int | None:
    """Return the pid of the process that holds the lock on ``path``; None when nobody does or there is no file."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a FIFO must not hold us up
    except OSError:
        return None
    try:
        asked = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        kind, _, _, _, pid = struct.unpack(_FLOCK, fcntl.fcntl(fd, fcntl.F_GETLK, asked))
    except OSError:
        return None
    finally:
        os.close(fd)
    return pid if kind != fcntl.F_UNLCK and pid > 0 else None


def pid_of(name: str, run_dir: Path = RUN_DIR) -> int | None:
    """Return the pid of the guest ``name``; None when it does not run."""
    return holder(f"{run_dir}/{name}.pid") if "/" not in name else None


def running(run_dir: Path = RUN_DIR) -> dict[str, int]:
    """Return name → pid of every guest that runs, without asking libvirt."""
    try:
        names = sorted(path.stem for path in run_dir.glob("*.pid") if path.name != "driver.pid")
    except OSError:
        return {}
    return {name: pid for name in names if (pid := pid_of(name, run_dir)) is not None}

# SPDX-License-Identifier: GPL-2.0-or-later
"""Reads a file of /proc or of a cgroup with three system calls; open() takes seven, and a pass reads thousands."""

from __future__ import annotations

import os

_BYTES = 4096


def read(path: str) -> bytes:
    """Return what is in ``path``. Raises OSError.

    A short read is the end of a file that the kernel makes up at once, as all are that are shorter than a page.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        found = part = os.read(fd, _BYTES)
        while part and len(found) >= _BYTES // 2:
            part = os.read(fd, _BYTES)
            found += part
        return found
    finally:
        os.close(fd)

# SPDX-License-Identifier: GPL-2.0-or-later
"""Reads a policy file from disk: its text, and whether it may be trusted."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from rtpind.core.document import Problem
from rtpind.core.model import Host
from rtpind.core.policy import Policy
from rtpind.core.policyfile import load
from rtpind.core.yamlform import MAX_CHARS


def read(path: Path, host: Host, *, strict: bool = False) -> tuple[Policy | None, list[Problem]]:
    """Return the policy of a file, or None, and every problem. Never raises.

    A file that others may write is a problem: whoever can write it can give any guest FIFO on any pCPU. Root's is
    good for everybody; so is one's own, which gives away nothing that its owner could not do by himself.
    """
    try:
        with open(path, "rb", opener=_open) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                return None, [Problem(1, "", "not a file", "a directory, a pipe or a device holds no policy")]
            text = file.read(4 * MAX_CHARS).decode("utf-8")
    except UnicodeDecodeError as error:
        return None, [Problem(1, "", f"not UTF-8: {error.reason} at byte {error.start}")]
    except PermissionError as error:
        hint = f"uid {os.geteuid()} may not read it: chmod 0644, or chgrp to the daemon's group and chmod 0640"
        return None, [Problem(1, "", error.strerror or str(error), hint)]
    except OSError as error:
        return None, [Problem(1, "", error.strerror or str(error), "rtpind.yaml(5) shows what belongs there")]
    policy, problems = load(text, host, strict=strict)
    others = [*_untrusted(status)]
    return (None if others else policy), [*others, *problems]


def _open(path: str, flags: int) -> int:
    """Open for reading without waiting: a FIFO that nobody writes to must not hold up the daemon."""
    return os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY)


def _untrusted(status: os.stat_result) -> list[Problem]:
    found = []
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        mode = stat.S_IMODE(status.st_mode)
        found.append(Problem(1, "", f"others may write this file (mode {mode:04o})", "chmod go-w"))
    if status.st_uid not in (0, os.geteuid()):
        found.append(Problem(1, "", f"the file belongs to uid {status.st_uid}", "chown root"))
    return found

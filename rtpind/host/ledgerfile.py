# SPDX-License-Identifier: GPL-2.0-or-later
"""Keeps the ledger in the state directory: atomic replace, one writer at a time, a damaged file is set aside."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import stat
from pathlib import Path

from rtpind.core.ledger import Ledger, dump, load

STATE_DIR = Path("/run/rtpind")
_MAX_BYTES = 64 * 1024 * 1024
#: The directory is the daemon's user's: nothing in it may lead root elsewhere, nor hold it up.
_HERE = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


class BusyError(Exception):
    """Another enforcing daemon, or a command that puts guests back, holds the lock."""


class LedgerFile:
    """``ledger.json`` and ``lock`` in ``directory``, which is made when it is missing."""

    def __init__(self, directory: Path = STATE_DIR) -> None:
        self.directory = directory
        self.path = directory / "ledger.json"
        self._lock = -1

    def lock(self) -> None:
        """Become the one enforcing daemon of this host. Raises BusyError; the lock ends with the process."""
        self.directory.mkdir(mode=0o755, parents=True, exist_ok=True)
        # Nobody else may open it: a lock on a descriptor that only reads would keep the daemon out just as well.
        fd = os.open(self.directory / "lock", os.O_RDWR | os.O_CREAT | _HERE, 0o600)
        try:
            self._own(fd, 0o600)
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            raise BusyError(f"another rtpind runs on this host (it holds {self.directory / 'lock'})") from None
        except OSError:
            os.close(fd)
            raise
        self._lock = fd

    def _own(self, fd: int, mode: int) -> None:
        """Give a file its mode and, as root, the directory's owner: the daemon's user must not be locked out.

        Raises OSError for what is no file of this directory alone: a link would give away what it leads to.
        """
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
            raise PermissionError(errno.EPERM, "not a file of its own", str(self.directory))
        os.fchmod(fd, mode)
        if os.geteuid() == 0:
            owner = os.stat(self.directory)
            os.fchown(fd, owner.st_uid, owner.st_gid)

    def unlock(self) -> None:
        """Let go of the lock."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def read(self) -> tuple[Ledger, str]:
        """Return the ledger and, when the file was damaged, how. A file that is not there is an empty ledger.

        Raises OSError when it cannot be read at all: that says nothing against what is in it.
        """
        try:
            with open(self.path, "rb", opener=lambda path, flags: os.open(path, flags | _HERE)) as file:
                if os.fstat(file.fileno()).st_size > _MAX_BYTES:
                    raise ValueError("far too large")
                return load(json.loads(file.read())), ""
        except FileNotFoundError:
            return Ledger(), ""
        except (ValueError, RecursionError) as error:
            return Ledger(), f"{self.path}: {error}"

    def set_aside(self) -> Path | None:
        """Move a damaged file out of the way, for people to look at; None when even that fails."""
        aside = self.path.with_suffix(".damaged")
        try:
            os.replace(self.path, aside)
        except OSError:
            return None
        return aside

    def write(self, ledger: Ledger) -> None:
        """Replace the file. Raises OSError; the old file then still stands.

        No fsync: the directory is on tmpfs, and originals mean nothing after a reboot of the host.
        """
        fresh = self.path.with_suffix(".new")
        with contextlib.suppress(FileNotFoundError):
            fresh.unlink()  # of a daemon that was killed
        fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _HERE, 0o600)
        with open(fd, "w", encoding="utf-8") as file:
            self._own(fd, 0o644)  # rtpinctl status reads it as any user
            file.write(json.dumps(dump(ledger), separators=(",", ":")))  # dump() would not encode in C
        os.replace(fresh, self.path)

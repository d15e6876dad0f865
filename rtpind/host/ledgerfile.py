# SPDX-License-Identifier: GPL-2.0-or-later
"""Keeps the ledger in the state directory: atomic replace, one writer at a time, a damaged file is set aside."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path

from rtpind.core.ledger import Ledger, dump, load

STATE_DIR = Path("/run/rtpind")
_MAX_BYTES = 64 * 1024 * 1024


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
        fd = os.open(self.directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        os.fchmod(fd, 0o600)
        self._give_to_owner(fd)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            raise BusyError(f"another rtpind runs on this host (it holds {self.directory / 'lock'})") from None
        self._lock = fd

    def _give_to_owner(self, fd: int) -> None:
        """As root, give a file to the directory's owner: the daemon's user must not find itself locked out."""
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
            if self.path.stat().st_size > _MAX_BYTES:
                raise ValueError("far too large")
            return load(json.loads(self.path.read_bytes())), ""
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
        with open(fresh, "w", encoding="utf-8") as file:
            os.fchmod(file.fileno(), 0o644)  # rtpinctl status reads it as any user
            self._give_to_owner(file.fileno())
            json.dump(dump(ledger), file, separators=(",", ":"))
        os.replace(fresh, self.path)

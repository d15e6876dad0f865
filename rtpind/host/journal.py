# SPDX-License-Identifier: GPL-2.0-or-later
"""The journal and systemd's notify socket. Without a journal the same records go to stderr, readable."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import TextIO

from systemd import daemon, journal

from rtpind.core.audit import Record

_SOCKET = Path("/run/systemd/journal/socket")


class Journal:
    """Where records go. journald may come and go: each record takes what is there at the time."""

    def __init__(self, socket: Path = _SOCKET, stderr: TextIO | None = None) -> None:
        self._socket = socket
        self._stderr: TextIO | None = stderr if stderr is not None else sys.stderr

    def send(self, record: Record) -> None:
        """Write one record."""
        fields = {f"RTPIND_{name}": value for name, value in record.fields.items() if value}
        if self._socket.exists():
            lines = [
                f"MESSAGE={record.message}",
                f"MESSAGE_ID={record.kind.value}",
                f"PRIORITY={record.level.value}",
                "SYSLOG_IDENTIFIER=rtpind",
                *(f"{name}={value}" for name, value in fields.items()),
            ]
            try:
                journal.sendv(*lines)
            except (OSError, ValueError) as error:  # ValueError: a path that is not UTF-8
                self._print(record, fields, f"journal: {error}")
        else:
            self._print(record, fields)

    def _print(self, record: Record, fields: dict[str, str], note: str = "") -> None:
        extra = " ".join(f"{name}={value!r}" if " " in value else f"{name}={value}" for name, value in fields.items())
        text = " ".join(part for part in (record.level.name.lower() + ":", record.message, note) if part)
        line = f"rtpind: {text}" + (f" [{extra}]" if extra else "")
        if self._stderr is None:  # it was closed when Python started
            return
        try:
            self._stderr.write("".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in line))
            self._stderr.write("\n")
            self._stderr.flush()
        except (OSError, ValueError):
            pass  # nobody listens; the record has nowhere to go and must not stop the daemon


def notify(**values: str) -> None:
    """Tell systemd: ``notify(READY="1", STATUS="…")``; does nothing when systemd did not start this, or is deaf."""
    with contextlib.suppress(OSError):
        daemon.notify("\n".join(f"{name}={value}" for name, value in values.items()))


def watchdog_s() -> float | None:
    """Return the seconds within which systemd wants to hear WATCHDOG=1; None when it does not."""
    text, pid = os.environ.get("WATCHDOG_USEC", ""), os.environ.get("WATCHDOG_PID", "")
    if not text.isdigit() or int(text) == 0 or (pid and pid != str(os.getpid())):
        return None
    return int(text) / 1e6

# SPDX-License-Identifier: GPL-2.0-or-later
"""The daemon's control socket: one JSON object in a line each way. For rtpinctl on this host, nobody else.

Who may connect may ask what changes nothing; to change something is for root and the daemon's own user. The kernel
says who asks.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rtpind.host.ledgerfile import STATE_DIR

SOCKET = "control"
_MAX_REQUEST = 64 * 1024
_UCRED = "iII"  # struct ucred: pid, uid, gid

Answer = Mapping[str, Any]


class UnreachableError(Exception):
    """No daemon listens, or it does not let this user talk to it."""


class ControlServer:
    """Accepts requests in a thread of its own; ``answer`` is called there and may wait for the daemon's loop.

    It is told the request, and whether who asks may change something. One client after the other; each has
    ``patience_s`` to ask and as long to take the answer.
    """

    def __init__(
        self, answer: Callable[[Answer, bool], Answer], directory: Path = STATE_DIR, *, patience_s: float = 5.0
    ) -> None:
        self._answer = answer
        self._path = directory / SOCKET
        self._patience_s = patience_s
        self._socket: socket.socket | None = None

    def start(self) -> None:
        """Listen. Replaces the socket of a daemon that is gone; the caller holds the lock, so there is no other."""
        with contextlib.suppress(FileNotFoundError):
            self._path.unlink()
        server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        mask = os.umask(0o117)  # 0660: the daemon's own user and group, and root
        try:
            server.bind(str(self._path))
        finally:
            os.umask(mask)
        server.listen(64)  # a full queue turns a client away at once
        self._socket = server
        threading.Thread(target=self._serve, args=(server,), name="control", daemon=True).start()

    def stop(self) -> None:
        """Stop listening and remove the socket."""
        server, self._socket = self._socket, None
        if server is not None:
            with contextlib.suppress(OSError):
                server.shutdown(socket.SHUT_RDWR)  # closing alone does not wake accept()
            server.close()
            with contextlib.suppress(OSError):
                self._path.unlink()

    def _serve(self, server: socket.socket) -> None:
        while self._socket is server:
            try:
                client, _ = server.accept()
            except OSError:  # stopped, or out of file descriptors for a while
                time.sleep(0.1)
                continue
            # RecursionError: brackets without end.
            with client, contextlib.suppress(OSError, ValueError, RecursionError):
                request = json.loads(_line(client, _MAX_REQUEST, self._patience_s))
                trusted = _uid(client) in (0, os.geteuid())
                reply = self._answer(request, trusted) if isinstance(request, dict) else {"error": "not an object"}
                client.settimeout(self._patience_s)
                client.sendall(json.dumps(reply).encode() + b"\n")


def _uid(client: socket.socket) -> int:
    """Return the user that made the connection."""
    found = client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize(_UCRED))
    return int(struct.unpack(_UCRED, found)[1])


def ask(request: Answer, directory: Path = STATE_DIR, timeout_s: float = 10.0) -> dict[str, Any]:
    """Send one request to the daemon and return its answer. Raises UnreachableError."""
    client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    client.settimeout(timeout_s)
    try:
        with client:
            client.connect(str(directory / SOCKET))
            client.sendall(json.dumps(request).encode() + b"\n")
            answer = json.loads(_line(client, None, timeout_s))
    except (OSError, ValueError) as error:
        raise UnreachableError(str(error) or type(error).__name__) from error
    if not isinstance(answer, dict):
        raise UnreachableError("the daemon's answer makes no sense")
    return answer


def _line(client: socket.socket, limit: int | None, patience_s: float) -> bytes:
    """Return one line that arrives whole in that time. Raises ValueError or OSError."""
    found = bytearray()
    deadline = time.monotonic() + patience_s
    while not found.endswith(b"\n"):
        client.settimeout(max(deadline - time.monotonic(), 0.001))
        part = client.recv(65536)
        if not part or (limit is not None and len(found) > limit):
            raise ValueError("no complete line")
        found += part
    return bytes(found)

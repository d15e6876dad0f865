# SPDX-License-Identifier: GPL-2.0-or-later
"""The test's end of the virtio port: sends requests to :mod:`lab.agent` and hands replies to those who wait."""

from __future__ import annotations

import contextlib
import itertools
import json
import queue
import socket
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class ChannelError(Exception):
    """The lab host did not answer, or its agent could not do what it was asked."""


Reply = tuple[dict[str, Any], bytes]


class Channel:
    """A connection to the agent of one lab host; may be used from several threads."""

    def __init__(self, connected: socket.socket) -> None:
        self._socket = connected
        self._numbers = itertools.count(1)
        self._waiting: dict[int, queue.SimpleQueue[Reply | None]] = {}
        self._lock = threading.Lock()
        self._greeted = threading.Condition()
        self.boot = ""
        self._reader = threading.Thread(target=self._read, name="lab-channel", daemon=True)
        self._reader.start()

    def wait_for_boot(self, other_than: str, timeout_s: float) -> bool:
        """Wait until an agent of another boot says hello; False when none does in time."""
        with self._greeted:
            return self._greeted.wait_for(lambda: self.boot not in ("", other_than), timeout_s)

    def greet(self, timeout_s: float) -> None:
        """Ask an agent that said hello to somebody else which boot this is. Raises ChannelError."""
        self._hello(str(self.ask(timeout_s, op="hello")[0]["boot"]))

    def ask(self, timeout_s: float, payload: bytes = b"", **request: Any) -> Reply:
        """Send a request and wait for its reply. Raises ChannelError."""
        number = next(self._numbers)
        mailbox: queue.SimpleQueue[Reply | None] = queue.SimpleQueue()
        self._waiting[number] = mailbox
        header = json.dumps({**request, "id": number, "size": len(payload)}).encode() + b"\n"
        try:
            with self._lock:
                self._socket.sendall(header + payload)
            reply = mailbox.get(timeout=timeout_s)
        except queue.Empty:
            raise ChannelError(f"no answer within {timeout_s:g} s: {_short(request)}") from None
        except OSError as error:
            raise ChannelError(f"the lab host is gone ({error}): {_short(request)}") from error
        finally:
            self._waiting.pop(number, None)
        if reply is None:
            raise ChannelError(f"the lab host restarted or is gone: {_short(request)}")
        if "error" in reply[0]:
            raise ChannelError(f"{_short(request)}: {reply[0]['error']}\n{reply[0].get('trace', '')}")
        return reply

    def close(self) -> None:
        """Close the connection."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._reader.join(timeout=5)

    def _read(self) -> None:
        with contextlib.suppress(OSError, ValueError), self._socket.makefile("rb") as stream:
            while line := stream.readline():
                frame = json.loads(line[line.index(b"{") :])
                payload = stream.read(int(frame["size"])) if frame["size"] else b""
                if frame.get("op") == "hello":
                    self._hello(str(frame["boot"]))
                elif (mailbox := self._waiting.get(frame["id"])) is not None:
                    mailbox.put((frame, payload))
        self._give_up()

    def _hello(self, boot: str) -> None:
        self._give_up()  # whatever an earlier agent was asked, it will not answer
        with self._greeted:
            self.boot = boot
            self._greeted.notify_all()

    def _give_up(self) -> None:
        for mailbox in list(self._waiting.values()):
            mailbox.put(None)


def connect(path: Path, timeout_s: float = 10.0) -> Channel:
    """Connect as soon as QEMU listens. Raises ChannelError."""
    deadline = time.monotonic() + timeout_s
    while True:
        made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            made.connect(str(path))
            return Channel(made)
        except OSError as error:
            made.close()
            if time.monotonic() > deadline:
                raise ChannelError(f"QEMU does not listen on {path}: {error}") from error
            time.sleep(0.05)


def _short(request: Mapping[str, Any]) -> str:
    text = " ".join(str(request[key]) for key in ("op", "argv", "function", "arguments") if key in request)
    return text if len(text) < 300 else text[:300] + "…"

# SPDX-License-Identifier: GPL-2.0-or-later
"""The only module that imports pyudev: a word when a pCPU goes offline or comes online. Works without privileges.

It listens to the kernel itself, so that no udevd is needed, in a thread of its own that only posts. What is online is
read from /sys at each look; the event says no more than that it is time for one.
"""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyudev import Monitor

_ACTIONS = ("offline", "online")


@dataclass(frozen=True, slots=True)
class CpusChanged:
    """A pCPU went offline, or came online."""

    cpu: int
    online: bool


@dataclass(frozen=True, slots=True)
class Unheard:
    """The kernel's events are not heard, or no more."""

    why: str


Post = Callable[[CpusChanged | Unheard], None]


def listen() -> Monitor:
    """Return what the kernel's own events about pCPUs come from. Raises whatever keeps it from that."""
    from pyudev import Context, Monitor  # it loads libudev by ctypes, which the daemon can do without

    monitor = Monitor.from_netlink(Context(), source="kernel")
    monitor.filter_by("cpu")
    monitor.start()
    return monitor


class CpuEvents:
    """Listens until it is stopped."""

    def __init__(self, post: Post, listen: Callable[[], Monitor] = listen) -> None:
        self._post = post
        self._listen = listen
        self._end, self._ending = os.pipe()
        self._piping = threading.Lock()  # held to use or close the pipe: its numbers may soon be others'

    def start(self) -> None:
        """Start the thread; returns at once."""
        threading.Thread(target=self._run, name="udev", daemon=True).start()

    def stop(self) -> None:
        """Ask the thread to end, unless it has."""
        with self._piping:
            if self._ending >= 0:
                os.write(self._ending, b"x")

    def _run(self) -> None:
        try:
            monitor = self._listen()
            waiting = select.poll()
            waiting.register(monitor.fileno(), select.POLLIN)
            waiting.register(self._end, select.POLLIN)
            while self._end not in {fd for fd, _ in waiting.poll()}:
                device = monitor.poll(0)
                if device is not None and device.action in _ACTIONS and device.sys_number:
                    self._post(CpusChanged(int(device.sys_number), device.action == "online"))
        except Exception as error:  # a refused socket, no libudev, no memory for ctypes: rtpind goes on without
            self._post(Unheard(str(error) or type(error).__name__))
        finally:
            with self._piping:
                os.close(self._end)
                os.close(self._ending)
                self._ending = -1

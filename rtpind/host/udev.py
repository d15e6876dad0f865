# SPDX-License-Identifier: GPL-2.0-or-later
"""The only module that imports pyudev: a word when a pCPU goes offline or comes online. Works without privileges.

It listens to the kernel itself, so that no udevd is needed, in a thread of its own that only posts. What is online is
read from /sys at each look; the event says no more than that it is time for one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rtpind.host.listener import Listener, Unheard

if TYPE_CHECKING:
    from pyudev import Monitor

_ACTIONS = ("offline", "online")


@dataclass(frozen=True, slots=True)
class CpusChanged:
    """A pCPU went offline, or came online."""

    cpu: int
    online: bool


def listen() -> Monitor:
    """Return what the kernel's own events about pCPUs come from. Raises whatever keeps it from that."""
    from pyudev import Context, Monitor  # it loads libudev by ctypes, which the daemon can do without

    monitor = Monitor.from_netlink(Context(), source="kernel")
    monitor.filter_by("cpu")
    monitor.start()
    return monitor


class CpuEvents(Listener):
    """Listens until it is stopped."""

    name = "udev"

    def __init__(self, post: Callable[[CpusChanged | Unheard], None], listen: Callable[[], Monitor] = listen) -> None:
        super().__init__(post)
        self._listen = listen
        self._monitor: Monitor | None = None

    def open(self) -> int:
        """Open the monitor."""
        self._monitor = self._listen()
        return self._monitor.fileno()

    def hear(self) -> None:
        """Take one event."""
        assert self._monitor is not None
        device = self._monitor.poll(0)
        if device is not None and device.action in _ACTIONS and device.sys_number:
            self.post(CpusChanged(int(device.sys_number), device.action == "online"))

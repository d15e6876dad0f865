# SPDX-License-Identifier: GPL-2.0-or-later
"""A thread that waits for words from the kernel, which are all optional: where they are not heard, it says so once."""

from __future__ import annotations

import os
import select
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar


@dataclass(frozen=True, slots=True)
class Unheard:
    """The kernel's events are not heard, or no more; ``layer``: the listener's name."""

    layer: str
    why: str


@dataclass(frozen=True, slots=True)
class Overran:
    """Events came faster than they were read, and some are lost: only a look at everything makes up for that."""


class Listener(ABC):
    """Listens from :meth:`start` until :meth:`stop`. ``post`` is all that its thread does to others."""

    #: Of the thread, and of the layer in :class:`Unheard`.
    name: ClassVar[str]

    def __init__(self, post: Callable[[Any], None]) -> None:
        self.post = post
        self._end = os.eventfd(0, os.EFD_CLOEXEC)
        self._ending = threading.Lock()  # held to use or close it: its number may soon be another's

    @abstractmethod
    def open(self) -> int:
        """Begin to listen, and return the file descriptor to wait on. Raises whatever keeps it from that."""

    @abstractmethod
    def hear(self) -> float | None:
        """Take what is there, without waiting; return seconds after which to be called though nothing comes."""

    def close(self) -> None:  # noqa: B027 - not everybody has something to close
        """End listening, if it ever began."""

    def start(self) -> None:
        """Start the thread; returns at once."""
        threading.Thread(target=self._run, name=self.name, daemon=True).start()

    def stop(self) -> None:
        """Ask the thread to end, unless it has."""
        with self._ending:
            if self._end >= 0:
                os.eventfd_write(self._end, 1)

    def _run(self) -> None:
        try:
            waiting = select.poll()
            waiting.register(self._end, select.POLLIN)
            waiting.register(self.open(), select.POLLIN)
            again: float | None = 0.0
            while self._end not in {fd for fd, _ in waiting.poll(None if again is None else again * 1000)}:
                again = self.hear()
        except Exception as error:  # a refused socket, no memory for ctypes, a limit: rtpind goes on without
            self.post(Unheard(self.name, str(error) or type(error).__name__))
        finally:
            self.close()
            with self._ending:
                os.close(self._end)
                self._end = -1

# SPDX-License-Identifier: GPL-2.0-or-later
"""The inbox of the loop: what other threads and signals post, and which guests are due for another look.

Posting is safe from any thread, callback or signal handler, and is all that those may do.
"""

from __future__ import annotations

import heapq
import queue
import time
from collections.abc import Callable
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Inbox(Generic[Item]):
    """A queue of posted items, and a timetable of looks at guests (by UUID)."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._queue: queue.SimpleQueue[Item] = queue.SimpleQueue()
        self._due: list[tuple[float, str]] = []

    def post(self, item: Item) -> None:
        """Add an item; wakes :meth:`wait`."""
        self._queue.put(item)

    def look_in(self, seconds: float, guest: str) -> float:
        """Have ``guest`` looked at in that time, unless a look at it is due shortly before: in the last half of it.

        Return when it is looked at, on the clock.
        """
        when = self._clock() + seconds
        soon = when - seconds / 2 if seconds > 0 else float("-inf")
        for due, other in self._due:
            if other == guest and soon <= due <= when:
                return due
        heapq.heappush(self._due, (when, guest))
        return when

    def wait(self, at_most_s: float) -> list[Item]:
        """Wait until something is posted, a look is due, or the time is over; return what was posted."""
        if self._due:
            at_most_s = min(at_most_s, self._due[0][0] - self._clock())
        try:
            found = [self._queue.get(timeout=max(at_most_s, 0)) if at_most_s > 0 else self._queue.get_nowait()]
        except queue.Empty:
            return []
        while True:
            try:
                found.append(self._queue.get_nowait())
            except queue.Empty:
                return found

    def take_due(self) -> set[str]:
        """Return the guests that are due now, and take them off the timetable."""
        now, found = self._clock(), set()
        while self._due and self._due[0][0] <= now:
            found.add(heapq.heappop(self._due)[1])
        return found


class Backoff:
    """How long to wait before what failed is tried again: ever longer, and from the beginning after a calm."""

    FIRST_S, CALM_S = 1.0, 60.0

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._at, self._wait_s = float("-inf"), 0.0

    def next_s(self, most_s: float) -> float:
        """Take note of a failure; return the seconds to wait, at most ``most_s``."""
        now = self._clock()
        calm = now - self._at > self._wait_s + self.CALM_S
        self._at, self._wait_s = now, min(self.FIRST_S if calm else 2 * self._wait_s, most_s)
        return self._wait_s

# SPDX-License-Identifier: GPL-2.0-or-later
"""What libvirt's definition of each guest says, asked for in a thread of its own: one wish after the other.

From libvirt 11.0 the answer waits for whatever libvirt does with the guest (a start, a save, a migration): up to 30 s,
and then it is an error. So a guest that was never asked about goes before one that failed, which is tried again later
and later; nobody else waits for longer than the one call under way. Nothing is ever asked for that nobody wished.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from rtpind.core.ledger import Process
from rtpind.core.model import Traits
from rtpind.core.traits import parse

#: Between two attempts for one guest. The first is short of what a start takes, the last what a long migration does.
_BACKOFF_S = (5.0, 15.0, 60.0, 300.0)


class Definition(NamedTuple):
    """What libvirt says of a domain: its live XML, and the nodes that its memory is bound to ("" for none)."""

    xml: str
    nodeset: str = ""


def read(definition: Definition) -> Traits | str:
    """Return a definition's traits, or why it cannot be read."""
    try:
        return parse(*definition)
    except ValueError as error:
        return str(error)


@dataclass(frozen=True, slots=True)
class Described:
    """The answer about one guest, of whom ``process`` is what was asked with. Without traits: what the trouble is.

    ``unreadable``: libvirt has told, and would tell the same again; else it is asked again.
    """

    uuid: str
    process: Process
    traits: Traits | None
    trouble: str = ""
    unreadable: bool = False


@dataclass(frozen=True, slots=True)
class _Wish:
    process: Process
    due: float
    failures: int = 0

    @property
    def rank(self) -> tuple[int, float]:
        return (self.failures, self.due)


class Details:
    """A queue of wishes, by UUID. ``fetch`` returns a definition, None when there is none; it may take its time."""

    def __init__(
        self,
        fetch: Callable[[str], Definition | None],
        post: Callable[[Described], None],
        *,
        backoff_s: tuple[float, ...] = _BACKOFF_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._fetch = fetch
        self._post = post
        self._backoff_s = backoff_s
        self._clock = clock
        self._wishes: dict[str, _Wish] = {}
        self._news = threading.Condition()
        self._stop = False

    def start(self) -> None:
        """Start the thread; returns at once."""
        threading.Thread(target=self._run, name="libvirt-details", daemon=True).start()

    def ask(self, uuid: str, process: Process) -> None:
        """Wish for a guest's details as they are from now on; several wishes before the answer are one."""
        with self._news:
            self._wishes[uuid] = _Wish(process, self._clock())
            self._news.notify()

    def stop(self) -> None:
        """Ask the thread to end; does not wait for a call that hangs."""
        with self._news:
            self._stop = True
            self._news.notify()

    def _run(self) -> None:
        while (taken := self._take()) is not None:
            self._fulfil(*taken)

    def _take(self) -> tuple[str, _Wish] | None:
        """Wait for a wish that is due, and take it off the queue; None: stopped."""
        with self._news:
            while not self._stop:
                now = self._clock()
                due = [(wish.rank, uuid) for uuid, wish in self._wishes.items() if wish.due <= now]
                if due:
                    uuid = min(due)[1]
                    return uuid, self._wishes.pop(uuid)
                next_due = min((wish.due for wish in self._wishes.values()), default=None)
                self._news.wait(None if next_due is None else next_due - now)
            return None

    def _fulfil(self, uuid: str, wish: _Wish) -> None:
        try:
            told = self._fetch(uuid)
        except Exception as error:  # whatever it is: without this thread rtpind would never hear of any guest again
            if wish.failures == 0:
                self._post(Described(uuid, wish.process, None, str(error)))
            self._retry(uuid, wish)
            return
        if told is None:
            return
        traits = read(told)
        if isinstance(traits, str):
            self._post(Described(uuid, wish.process, None, traits, unreadable=True))
        else:
            self._post(Described(uuid, wish.process, traits))

    def _retry(self, uuid: str, wish: _Wish) -> None:
        pause = self._backoff_s[min(wish.failures, len(self._backoff_s) - 1)]
        with self._news:
            if uuid not in self._wishes:  # else somebody has wished anew
                self._wishes[uuid] = _Wish(wish.process, self._clock() + pause, wish.failures + 1)

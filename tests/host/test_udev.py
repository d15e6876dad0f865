# SPDX-License-Identifier: GPL-2.0-or-later
"""Words about pCPUs that come and go: from a socket of the test's own, and from the kernel of this host."""

from __future__ import annotations

import os
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from trees import until

from rtpind.host.listener import Unheard
from rtpind.host.udev import CpuEvents, CpusChanged, listen

UEVENT = Path("/sys/devices/system/cpu/cpu1/uevent")


class Kernel:
    """What a monitor of pyudev is to the module: events that the test makes, and errors."""

    def __init__(self) -> None:
        self.near, self.far = socket.socketpair()
        self.devices: list[Any] = []

    def fileno(self) -> int:
        return self.near.fileno()

    def poll(self, timeout: float | None = None) -> Any:
        assert timeout == 0
        try:
            if not self.near.recv(1, socket.MSG_DONTWAIT):
                raise OSError("it is closed")
        except BlockingIOError:
            return None  # as pyudev's does not wait either
        return self.devices.pop(0)

    def say(self, action: str | None, number: str | None, *, something: bool = True) -> None:
        self.devices.append(SimpleNamespace(action=action, sys_number=number) if something else None)
        self.far.send(b"x")

    def close(self) -> None:
        self.near.close()
        self.far.close()


@pytest.fixture
def kernel() -> Iterator[Kernel]:
    made = Kernel()
    yield made
    made.close()


def ended() -> bool:
    return not any(thread.name == "udev" for thread in threading.enumerate())


@pytest.fixture
def hear() -> Iterator[Callable[..., list[Any]]]:
    """Start listening; what is posted is in the list. Stops after the test."""
    made: list[CpuEvents] = []

    def start(*source: Any) -> list[Any]:
        posts: list[Any] = []
        made.append(CpuEvents(posts.append, *source))
        made[-1].start()
        return posts

    yield start
    for one in made:
        if not ended():
            one.stop()
    until(ended, "the thread has ended")


def test_a_pcpu_that_comes_or_goes_is_told(hear: Callable[..., list[Any]], kernel: Kernel) -> None:
    """In order; other words about pCPUs, and those that are taken back, are none."""
    posts = hear(lambda: kernel)
    kernel.say("offline", "3")
    kernel.say("change", "3")
    kernel.say("bind", "2")
    kernel.say(None, "2")
    kernel.say("online", None)
    kernel.say("offline", "4", something=False)
    kernel.say("online", "3")
    until(lambda: len(posts) == 2, "both are told")

    assert posts == [CpusChanged(3, online=False), CpusChanged(3, online=True)]


@pytest.mark.parametrize("error", [PermissionError(1, "refused"), ImportError("no libudev"), MemoryError()])
def test_who_cannot_listen_says_so_once(hear: Callable[..., list[Any]], error: Exception) -> None:
    """Whatever keeps it from that, the daemon goes on; the thread is over."""

    def refuse() -> Any:
        raise error

    posts = hear(refuse)
    until(ended, "the thread has ended")

    assert posts == [Unheard("udev", str(error) or "MemoryError")]


def test_a_socket_that_breaks_is_said(hear: Callable[..., list[Any]], kernel: Kernel) -> None:
    """From then on nothing is heard."""
    posts = hear(lambda: kernel)
    kernel.say("online", "1")
    kernel.far.shutdown(socket.SHUT_WR)
    until(ended, "the thread has ended")

    assert posts == [CpusChanged(1, online=True), Unheard("udev", "it is closed")]


def test_stopping_ends_the_thread(kernel: Kernel) -> None:
    """Though the kernel says nothing; no file stays open."""
    before = set(os.listdir("/proc/self/fd"))
    events = CpuEvents(print, lambda: kernel)  # type: ignore[arg-type, return-value]
    events.start()
    events.stop()
    until(ended, "the thread has ended")

    assert set(os.listdir("/proc/self/fd")) == before


def test_stopping_what_has_ended_is_nothing() -> None:
    """A thread that could not listen has ended long before; stop does not fail, nor write into others' files."""
    posts: list[Any] = []

    def refuse() -> Any:
        raise OSError("no libudev")

    events = CpuEvents(posts.append, refuse)
    events.start()
    until(ended, "the thread has ended")

    with tempfile.TemporaryFile() as others, tempfile.TemporaryFile() as more:
        events.stop()
        assert (os.fstat(others.fileno()).st_size, os.fstat(more.fileno()).st_size) == (0, 0)
    assert posts == [Unheard("udev", "no libudev")]


def test_the_real_kernel_is_heard(hear: Callable[..., list[Any]]) -> None:
    """On the real host: an event that is asked for by hand (no pCPU changes) comes through; of other devices none."""
    if os.geteuid() != 0 or not os.access(UEVENT, os.W_OK):
        pytest.skip("needs root, and a second pCPU")
    monitor = listen()
    posts = hear(lambda: monitor)
    Path("/sys/devices/virtual/mem/null/uevent").write_text("online")
    UEVENT.write_text("change")
    UEVENT.write_text("online")
    until(lambda: CpusChanged(1, online=True) in posts, "it is heard")

    assert {type(post) for post in posts} == {CpusChanged}

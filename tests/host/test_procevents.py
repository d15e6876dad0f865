# SPDX-License-Identifier: GPL-2.0-or-later
"""Words about new threads: which messages the filter lets pass, and what the kernel of this host tells."""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from trees import until

from rtpind.host import procevents
from rtpind.host.listener import Overran, Unheard
from rtpind.host.procevents import ProcEvents, Stirred

ACK, FORK, EXEC, UID, COMM, EXIT = 0, 1, 2, 4, 0x200, 0x80000000
ME, MANY = 4711, range(100_000, 100_450)


def message(what: int, *words: int) -> bytes:
    """Return an event as the kernel sends it."""
    event = struct.pack("=IIQ", what, 0, 1) + struct.pack("=6I", *words, *[0] * (6 - len(words)))
    return (
        struct.pack("=IHHII", 36 + len(event), 3, 0, 0, 0) + struct.pack("=IIIIHH", 1, 1, 7, 0, len(event), 0) + event
    )


def passes(pids: Any, sent: bytes) -> bool:
    """Return whether the kernel, given the filter, lets a message through to a socket."""
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with near, far:
        near.setblocking(False)
        procevents._attach(near, procevents.program(pids))
        far.send(sent)
        try:
            return near.recv(256) == sent
        except BlockingIOError:
            return False


@pytest.mark.parametrize(
    ("what", "words", "heard"),
    [
        (FORK, (ME, ME, 5000, ME), "ours"),  # a thread
        (FORK, (5, 5, 5000, ME), "ours"),  # a thread of which somebody else is the parent (CLONE_PARENT)
        (FORK, (ME, ME, 5000, 5000), "never"),  # a process
        (FORK, (5, 5, 6, 5), "all"),  # a thread of somebody else
        (FORK, (5, 5, 6, 6), "never"),
        (FORK, (2, 2, 6, 6), "always"),  # a kernel thread
        (COMM, (5000, ME), "ours"),
        (COMM, (ME, ME), "ours"),
        (COMM, (5000, 5), "all"),
        (COMM, (ME, 5), "all"),
        (ACK, (0,), "always"),
        (EXEC, (ME, ME), "never"),
        (UID, (ME, ME), "never"),
        (EXIT, (ME, ME), "never"),
    ],
)
def test_only_what_concerns_guests_passes_the_filter(what: int, words: tuple[int, ...], heard: str) -> None:
    """Whoever else is listened for; with None the threads and names of all processes pass, and never a process."""
    sent = message(what, *words)

    for ours in ([ME], [*MANY, ME], [ME, *MANY]):
        assert passes(ours, sent) is (heard in ("ours", "always"))
    assert passes(list(MANY), sent) is (heard == "always")
    assert passes([], sent) is (heard == "always")
    assert passes(None, sent) is (heard in ("all", "ours", "always"))


@pytest.mark.parametrize("count", [1, 199, 200, 201, 399, 400, 401])
def test_each_of_many_passes(count: int) -> None:
    """At the borders of what one jump reaches."""
    pids = list(range(1000, 1000 + count))

    assert all(passes(pids, message(COMM, 5000, pid)) for pid in (pids[0], pids[-1], pids[count // 2]))
    assert not any(passes(pids, message(COMM, 5000, pid)) for pid in (999, 1000 + count))


def ended() -> bool:
    return not any(thread.name == ProcEvents.name for thread in threading.enumerate())


@pytest.fixture
def hear() -> Iterator[Callable[..., list[Any]]]:
    """Listen for this process; what is posted is in the list. Skips where the kernel does not let us."""
    made: list[ProcEvents] = []

    def start() -> list[Any]:
        posts: list[Any] = []
        made.append(ProcEvents(posts.append))
        made[-1].watch({os.getpid()})
        made[-1].start()

        def listens() -> bool:
            if posts and isinstance(posts[0], Unheard):
                pytest.skip(f"this kernel does not let us listen: {posts[0].why}")
            _rename("listens?")
            return bool(posts)

        until(listens, "it listens")
        return posts

    yield start
    for one in made:
        one.stop()
    until(ended, "the thread has ended")


def _rename(name: str) -> None:
    """Give the calling thread a name, as prctl(2) does."""
    own = Path(f"/proc/self/task/{threading.get_native_id()}/comm")
    before = own.read_text().strip()
    own.write_text(name)
    own.write_text(before)


def test_a_thread_that_begins_is_told(hear: Callable[..., list[Any]]) -> None:
    """On the real kernel: of this process' threads, and nothing of the processes that it starts."""
    posts = hear()
    until(lambda: not posts or posts.clear(), "it is quiet")
    subprocess.run(["true"])
    subprocess.run(["sh", "-c", "sh -c true; sh -c true"])
    assert posts == []

    thread = threading.Thread(target=lambda: None)
    thread.start()
    thread.join()
    until(lambda: posts, "the thread is told")

    assert set(posts) == {Stirred(os.getpid())}


def test_a_process_that_is_no_more_watched_is_not_told(hear: Callable[..., list[Any]]) -> None:
    """The filter follows at once."""
    hear()  # skips where that is not possible
    posts: list[Any] = []
    listener = ProcEvents(posts.append)
    listener.open()
    listener.watch({os.getpid()})
    _rename("first")
    listener.hear()
    first = list(posts)
    listener.watch({1})
    _rename("second")
    listener.hear()
    listener.close()

    assert (first, posts) == ([Stirred(os.getpid())], first)


def test_events_that_are_lost_are_said(hear: Callable[..., list[Any]]) -> None:
    """Once for each time: the kernel says ENOBUFS and drops what has no room."""
    hear()  # skips where that is not possible
    posts: list[Any] = []
    listener = ProcEvents(posts.append)
    listener.open()
    assert listener._socket is not None
    listener._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)  # as little as there is
    listener.watch({os.getpid()})
    for _ in range(200):
        _rename("flood")
    listener.hear()
    listener.close()

    assert posts.count(Overran()) == 1
    assert posts[-1] == Stirred(os.getpid())


def test_a_kernel_thread_is_told_by_the_number_in_its_name() -> None:
    """Of the guest whose pid that is; its name may come a moment after it."""
    posts: list[Any] = []
    listener = ProcEvents(posts.append)
    listener.watch({ME, 88})
    names = ["kthreadd", "vhost-4711", "kvm-pit/4711", "kvm-nx-88", "kworker/0:88", "vhost-5", "none"]
    threads = [Sleeper(name) for name in names]
    listener._unnamed = {thread.tid: 2 for thread in threads} | {2**22 + 1: 2}
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with near, far:
        near.setblocking(False)
        listener._socket = near
        waits = [listener.hear() for _ in range(3)]
        listener._socket = None
    for thread in threads:
        thread.end()

    assert posts == [Stirred(88, kernel=True), Stirred(ME, kernel=True)]
    assert waits == [0.005, 0.005, None]


class Sleeper(threading.Thread):
    """A thread with a name."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.given, self.over, self.named, self.tid = name, threading.Event(), threading.Event(), 0
        self.start()
        self.named.wait(10)

    def run(self) -> None:
        self.tid = threading.get_native_id()
        Path(f"/proc/self/task/{self.tid}/comm").write_text(self.given)
        self.named.set()
        self.over.wait(60)

    def end(self) -> None:
        self.over.set()
        self.join()


def test_who_is_in_another_network_namespace_is_told_so() -> None:
    """Whatever keeps it from listening, it says so once, and the thread is over."""
    code = (
        "import sys, threading, time; sys.path.insert(0, sys.argv[1])\n"
        "from rtpind.host.procevents import ProcEvents\n"
        "ProcEvents(lambda item: print(item.layer, item.why)).start()\n"
        "while threading.active_count() > 1: time.sleep(0.01)"
    )
    root = str(Path(__file__).resolve().parents[2])
    done = subprocess.run(["unshare", "-n", sys.executable, "-c", code, root], capture_output=True, text=True)
    if "unshare" in done.stderr:
        pytest.skip("needs root")

    assert done.stdout == "proc-events [Errno 111] Connection refused\n"


def test_stopping_ends_the_thread() -> None:
    """And no file stays open."""
    before = set(os.listdir("/proc/self/fd"))
    listener = ProcEvents(print)
    listener.start()
    listener.stop()
    until(ended, "the thread has ended")
    listener.watch({1})

    assert set(os.listdir("/proc/self/fd")) == before

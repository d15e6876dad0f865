# SPDX-License-Identifier: GPL-2.0-or-later
"""Words about what libvirt writes: from a run directory and cgroups of the test's own, on the real kernel."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from trees import until

from rtpind.host import inotify
from rtpind.host.inotify import Appeared, Inotify, Moved, Regrouped, Saved
from rtpind.host.listener import Unheard
from rtpind.host.proc import Proc

#: Writes its pid into a locked file, as virPidFileAcquire() does, and becomes QEMU when it is told to.
START = """
import fcntl, os, sys
file = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT)
fcntl.lockf(file, fcntl.LOCK_EX)
os.write(file, b"%d" % os.getpid())
os.set_inheritable(file, True)
os.execv(sys.executable, [*sys.argv[2:], *sys.stdin.readline().split()])
"""
CGROUPS = ("/sys/fs/cgroup", "/sys/fs/cgroup/cpu")
QEMU = [sys.executable, "-I", "-S", "-c", "import sys; print(flush=True); sys.stdin.read()"]


def ended() -> bool:
    return not any(thread.name == Inotify.name for thread in threading.enumerate())


class Heard:
    """A listener, and what it has posted."""

    def __init__(self, run_dir: Path) -> None:
        self.posts: list[Any] = []
        self.listener = Inotify(self.posts.append, Proc(), run_dir)
        self.listener.start()

    def until(self, *items: Any) -> None:
        until(lambda: self.posts == list(items), f"exactly {items} is heard")


@pytest.fixture
def heard(tmp_path: Path) -> Iterator[Heard]:
    """Listens to ``tmp_path/run``."""
    (tmp_path / "run").mkdir()
    made = Heard(tmp_path / "run")
    until(lambda: made.listener._saved >= 0, "it listens")
    yield made
    made.listener.stop()
    until(ended, "the thread has ended")


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Start a process that takes the lock on NAME.pid; ``go`` makes it what its arguments say."""
    children = []

    def made(name: str) -> Any:
        command = [sys.executable, "-I", "-S", "-c", START, str(tmp_path / "run" / f"{name}.pid"), *QEMU]
        children.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        return children[-1]

    yield made
    for child in children:
        child.communicate("\n")


def go(child: Any, arguments: str = "") -> None:
    child.stdin.write(f"{arguments}\n")
    child.stdin.flush()
    assert child.stdout.readline() == "\n"


def test_a_guest_is_told_when_its_qemu_has_its_arguments(heard: Heard, start: Callable[..., Any]) -> None:
    """From the pid file on it is waited for; the arguments are those of the process that holds the lock."""
    child = start("rt-1")
    until(lambda: heard.listener._arriving, "it is waited for")
    assert heard.posts == []
    go(child, "-name guest=rt-1 -uuid 1234-5")
    heard.until(Appeared("1234-5", "rt-1"))
    until(lambda: not heard.listener._arriving, "it is waited for no longer")


def test_what_is_no_guest_is_waited_for_in_vain(heard: Heard, start: Callable[..., Any]) -> None:
    """There are pid files of virtiofsd and others, too; one that nobody holds is dropped at once."""
    go(start("virtiofsd"))
    go(start("odd"), "-uuid")
    (heard.listener._run_dir / "stale.pid").write_text("1")
    until(lambda: set(heard.listener._arriving) == {"virtiofsd", "odd"}, "who holds a lock is waited for")
    heard.listener._arriving |= {"virtiofsd": 0.0, "odd": 0.0}
    until(lambda: not heard.listener._arriving, "not for ever")

    assert heard.posts == []


def test_a_status_is_told_when_it_is_in_place(heard: Heard) -> None:
    """As libvirt does it: it writes another file, and renames it."""
    new = heard.listener._run_dir / "rt-1.xml.new"
    new.write_text("<domstatus/>")
    new.rename(new.with_suffix(""))
    heard.until(Saved("rt-1"))


def test_cgroups_that_come_and_go_are_told(heard: Heard, tmp_path: Path) -> None:
    """Of each guest that is watched; when its own is gone, it can be watched anew."""
    guests = {name: tmp_path / f"machine-{name}" / "libvirt" for name in ("a", "b")}
    for name, place in guests.items():
        place.mkdir(parents=True)
        assert heard.listener.watch(name, str(place))
    (guests["a"] / "vcpu0").mkdir()
    heard.until(Regrouped("a"))
    (guests["a"] / "vcpu0").rmdir()
    (guests["b"] / "iothread1").mkdir()
    heard.until(Regrouped("a"), Regrouped("a"), Regrouped("b"))
    guests["a"].rmdir()
    until(lambda: {uuid for uuid, _ in heard.listener._guests.values()} == {"b"}, "the watch has gone, too")

    guests["a"].mkdir()
    assert heard.listener.watch("a", str(guests["a"]))
    (guests["a"] / "vcpu0").mkdir()
    heard.until(Regrouped("a"), Regrouped("a"), Regrouped("b"), Regrouped("a"))


def test_a_write_into_a_new_cgroup_is_told(heard: Heard, tmp_path: Path) -> None:
    """A thread is moved by that. In one that was there before it is not heard; what has gone is forgotten."""
    (tmp_path / "home" / "vcpu0").mkdir(parents=True)
    assert heard.listener.watch("a", str(tmp_path / "home"))
    (tmp_path / "home" / "vcpu0" / "tasks").write_text("1")
    made = tmp_path / "home" / "vcpu1"
    made.mkdir()
    heard.until(Regrouped("a"))
    for name in ("cgroup.type", "cpuset.mems", "tasks"):
        os.mknod(made / name)
        with open(made / name, "a", encoding="ascii") as file:
            file.write("4711")
    heard.until(Regrouped("a"), Moved("a"))
    for name in ("cgroup.type", "cpuset.mems"):
        (made / name).unlink()
    (made / "tasks").unlink()
    made.rmdir()
    heard.until(Regrouped("a"), Moved("a"), Regrouped("a"))
    until(lambda: not heard.listener._threads, "the watch has gone with the directory")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to make cgroups")
def test_the_kernel_tells_of_a_thread_that_is_moved(heard: Heard) -> None:
    """On real cgroups: a write into tasks (v1) or cgroup.threads (v2) is a modification like any other."""
    threads = "tasks" if (Path(CGROUPS[1]) / "tasks").exists() else "cgroup.threads"
    root = next((path for path in map(Path, CGROUPS) if (path / "cgroup.procs").exists()), None)
    if root is None:
        pytest.skip("no cgroups in which a thread could be moved")
    home = root / f"rtpind-test-{os.getpid()}"
    home.mkdir()
    child = subprocess.Popen(["sleep", "60"])
    try:
        assert heard.listener.watch("a", str(home))
        (home / "vcpu0").mkdir()
        heard.until(Regrouped("a"))
        if threads != "tasks":
            (home / "cgroup.procs").write_text(str(child.pid))
            (home / "vcpu0" / "cgroup.type").write_text("threaded")
        (home / "vcpu0" / threads).write_text(str(child.pid))
        until(lambda: Moved("a") in heard.posts, "the move is told")
    finally:
        child.kill()
        child.wait()
        until(lambda: not (home / "vcpu0" / threads).read_text(), "the cgroup is empty")
        (home / "vcpu0").rmdir()
        home.rmdir()
    # The kernel says nothing of a cgroup that has gone, and keeps its watch.
    until(lambda: watched(heard) == 2, "the thread's watch has been given up")
    heard.listener.keep({"b"})
    until(lambda: watched(heard) == 1, "the guest's, too")
    assert (heard.listener._guests, heard.listener._threads) == ({}, {})


def watched(heard: Heard) -> int:
    """Return how many watches the kernel keeps for it; one is that of the run directory."""
    return Path(f"/proc/self/fdinfo/{heard.listener._fd}").read_text().count("inotify wd:")


def test_a_guest_is_watched_where_it_is_now(heard: Heard, tmp_path: Path) -> None:
    """Its next process has another cgroup; the last one's is given up, with those of its threads."""
    first, second = tmp_path / "machine-1", tmp_path / "machine-2"
    first.mkdir()
    second.mkdir()
    assert heard.listener.watch("a", str(first))
    (first / "vcpu0").mkdir()
    heard.until(Regrouped("a"))
    assert watched(heard) == 3
    assert heard.listener.watch("a", str(second))
    assert heard.listener.watch("a", str(second))
    until(lambda: watched(heard) == 2, "the first one's are given up")
    assert list(heard.listener._guests.values()) == [("a", str(second))]


def test_a_cgroup_that_has_gone_is_not_watched(heard: Heard, tmp_path: Path) -> None:
    """The guest has ended meanwhile; nothing is said."""
    assert not heard.listener.watch("a", str(tmp_path / "none"))
    assert heard.posts == []


def test_a_run_directory_that_comes_later_is_listened_to(tmp_path: Path) -> None:
    """It is made when libvirt first starts; and anew, should somebody remove it."""
    made = Heard(tmp_path / "late")
    for _ in range(2):
        (tmp_path / "late").mkdir()
        until(lambda: made.listener._saved >= 0, "it listens")
        (tmp_path / "late").rmdir()
        until(lambda: made.listener._saved < 0, "it knows that it does not")
    made.listener.stop()
    until(ended, "the thread has ended")

    assert made.posts == []


def test_a_kernel_without_room_for_one_more_is_said(heard: Heard, tmp_path: Path) -> None:
    """Once, with the name of the limit."""

    class Full:
        """The C library of a user whose watches are all taken."""

        def inotify_add_watch(self, *_: Any) -> int:
            inotify.ctypes.set_errno(28)
            return -1

    libc: Any = Full()
    heard.listener._libc = libc
    assert not heard.listener.watch("a", str(tmp_path))
    assert not heard.listener.watch("b", str(tmp_path))

    (post,) = heard.posts
    assert post.layer == "inotify"
    assert "fs.inotify.max_user_watches" in post.why


def test_a_user_without_an_instance_left_is_told_so(tmp_path: Path) -> None:
    """The thread is over, and watching is nothing."""
    posts: list[Any] = []
    made = Inotify(posts.append, Proc(), tmp_path)

    class Spent:
        """The C library of a user whose instances are all taken."""

        def inotify_init1(self, *_: Any) -> int:
            inotify.ctypes.set_errno(24)
            return -1

    libc: Any = Spent()
    made._libc = libc
    made.start()
    until(ended, "the thread has ended")

    (post,) = posts
    assert isinstance(post, Unheard)
    assert "fs.inotify.max_user_instances" in post.why
    assert not made.watch("a", str(tmp_path))


def test_stopping_ends_the_thread(tmp_path: Path) -> None:
    """And no file stays open."""
    before = set(os.listdir("/proc/self/fd"))
    made = Heard(tmp_path)
    made.listener.stop()
    until(ended, "the thread has ended")

    assert set(os.listdir("/proc/self/fd")) == before

"""Which process a guest's QEMU is: the holder of the lock, and nobody else (promise 5)."""

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rtpind.host import pidfile

HOLD = """
import fcntl, sys
file = open(sys.argv[1], "r+")
{lock}
print("held", flush=True)
sys.stdin.read()
"""
WRITE_LOCK = "fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)"
# As virFileLock() does for a pid file: one byte at the start (virpidfile.c).
FIRST_BYTE = "fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, 0)"
FLOCK = "fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)"
# F_OFD_SETLK with struct flock: a lock of the open file, of no process.
OFD = 'import struct; fcntl.fcntl(file, 37, struct.pack("hhqqi4x", fcntl.F_WRLCK, 0, 0, 0, 0))'


@pytest.fixture
def hold():
    """Start processes that hold a lock on a file; ends them after the test."""
    children = []

    def start(path, lock=WRITE_LOCK):
        path.touch()
        command = [sys.executable, "-I", "-S", "-c", HOLD.format(lock=lock), str(path)]
        child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        children.append(child)
        assert child.stdout.readline() == "held\n"
        return child

    yield start
    for child in children:
        child.communicate("")


@pytest.mark.parametrize("lock", [WRITE_LOCK, FIRST_BYTE])
@pytest.mark.parametrize("content", ["1\n", "", "no number"])
def test_the_holder_of_the_lock_is_the_guest(tmp_path, hold, lock, content):
    """What the kernel says of the lock counts, and nothing that the file says."""
    path = tmp_path / "rt.pid"
    child = hold(path, lock)
    path.write_text(content)

    assert pidfile.pid_of("rt", tmp_path) == child.pid


@pytest.mark.parametrize("lock", [FLOCK, OFD])
def test_a_lock_of_another_kind_proves_nothing(tmp_path, hold, lock):
    """Locks that belong to no process (flock, open file description) name no holder."""
    hold(tmp_path / "rt.pid", lock)

    assert pidfile.pid_of("rt", tmp_path) is None


def test_a_stale_file_is_no_guest(tmp_path, hold):
    """Once the holder is gone the file, which still names its pid, says nothing."""
    child = hold(tmp_path / "rt.pid")
    (tmp_path / "rt.pid").write_text(f"{child.pid}\n")
    child.communicate("")

    assert pidfile.pid_of("rt", tmp_path) is None


def test_a_file_without_a_lock_is_no_guest(tmp_path):
    """A file that names a living process, even this one, proves nothing without its lock."""
    (tmp_path / "rt.pid").write_text(f"{os.getpid()}\n")

    assert pidfile.pid_of("rt", tmp_path) is None


def test_asking_takes_no_lock(tmp_path, hold):
    """The question leaves the file free for others to lock."""
    (tmp_path / "rt.pid").touch()
    pidfile.pid_of("rt", tmp_path)

    child = hold(tmp_path / "rt.pid")

    assert pidfile.pid_of("rt", tmp_path) == child.pid


def test_a_replaced_file_is_another_file(tmp_path, hold):
    """The holder of a file that was replaced since holds nothing of the new one."""
    hold(tmp_path / "rt.pid")
    (tmp_path / "rt.new").touch()
    (tmp_path / "rt.new").replace(tmp_path / "rt.pid")

    assert pidfile.pid_of("rt", tmp_path) is None


@pytest.mark.parametrize("name", ["", ".", "..", "../rt", "a/b", "x" * 300, "none", "ü"])
def test_an_odd_name_is_no_guest(tmp_path, hold, name):
    """No name leads out of the directory, and none fails."""
    (tmp_path / "run").mkdir()
    hold(tmp_path / "rt.pid")

    assert pidfile.pid_of(name, tmp_path / "run") is None


def test_what_is_no_file_does_not_hang(tmp_path):
    """A FIFO, a directory, a device or a dangling link in a pid file's place is no guest."""
    os.mkfifo(tmp_path / "fifo.pid")
    (tmp_path / "dir.pid").mkdir()
    (tmp_path / "link.pid").symlink_to("/nonexistent")
    (tmp_path / "device.pid").symlink_to("/dev/zero")

    assert pidfile.running(tmp_path) == {}


def test_the_running_guests_are_those_with_a_held_file(tmp_path, hold):
    """Names may hold blanks and dots; libvirt's own file and stale ones are no guests."""
    names = ["rt one", "a.b", "ü", "driver"]
    children = {name: hold(tmp_path / f"{name}.pid").pid for name in names}
    (tmp_path / "stale.pid").write_text("1\n")
    (tmp_path / "rt one.xml").touch()
    del children["driver"]

    assert pidfile.running(tmp_path) == children
    assert pidfile.running(tmp_path / "none") == {}


def test_real_guests_are_found():
    """On the real host: every guest that libvirt's directory shows is a process that runs."""
    found = pidfile.running()
    if not found:
        pytest.skip("no guest runs on this host")

    assert all(Path(f"/proc/{pid}").exists() for pid in found.values())


def test_the_lock_is_what_the_kernel_lists(tmp_path, hold):
    """The answer agrees with /proc/locks."""
    child = hold(tmp_path / "rt.pid")
    listed = [line.split() for line in Path("/proc/locks").read_text().splitlines()]

    inode = f":{(tmp_path / 'rt.pid').stat().st_ino}"
    assert [int(words[4]) for words in listed if words[5].endswith(inode)] == [child.pid]
    assert pidfile.holder(tmp_path / "rt.pid") == child.pid
    with open(tmp_path / "rt.pid", "r+") as file, pytest.raises(BlockingIOError):
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)

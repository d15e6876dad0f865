"""The ledger on disk: whole or not at all, one writer at a time, and no file that stops the daemon."""

import json
import os
import resource
import subprocess
import sys
import threading
from dataclasses import replace

import pytest
from factories import fifo, guest

from rtpind.core.ledger import HandsOff, Ledger, Off, dump
from rtpind.core.model import Placement
from rtpind.host.ledgerfile import BusyError, LedgerFile

HOLD = """
import fcntl, os, sys
fd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
print("held", flush=True)
sys.stdin.read()
"""


def ledger(name="rt-1"):
    """Return a ledger with something of everything in it."""
    seen = guest(name)
    first, *rest = seen.threads
    first = replace(first, now=Placement(first.now.cpus, fifo(3)))
    off = {"u": Off(HandsOff.PAUSED, (1, 2), 3.5), "*": Off(HandsOff.RELEASED)}
    return Ledger(hands_off=off).recording([first, *rest])


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock."""
    command = [sys.executable, "-I", "-S", "-c", HOLD, str(tmp_path / "lock")]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "held\n"
    yield child
    child.communicate("")


def test_what_was_written_is_read(tmp_path):
    """A ledger comes back as it was."""
    file = LedgerFile(tmp_path)
    file.write(ledger())

    assert LedgerFile(tmp_path).read() == (ledger(), "")


def test_no_file_is_an_empty_ledger(tmp_path):
    """A first start has nothing to put back, and nothing to complain about."""
    assert LedgerFile(tmp_path / "none").read() == (Ledger(), "")


def test_a_file_is_replaced_and_never_half_written(tmp_path):
    """Whoever reads while another writes sees one whole ledger or the next."""
    file = LedgerFile(tmp_path)
    small, large = Ledger(), ledger()
    file.write(small)
    stop = threading.Event()

    def write():
        while not stop.is_set():
            file.write(large)
            file.write(small)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        seen = [LedgerFile(tmp_path).read() for _ in range(300)]
    finally:
        stop.set()
        writer.join()

    assert all(found in ((small, ""), (large, "")) for found in seen)


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    """Where the new file cannot be written the old one stands, and the caller is told."""
    file = LedgerFile(tmp_path)
    file.write(ledger())
    (tmp_path / "ledger.new").mkdir()

    with pytest.raises(OSError, match=r"ledger\.new"):
        file.write(Ledger())
    assert file.read() == (ledger(), "")


def test_a_full_disk_leaves_the_old_file(tmp_path):
    """No room is an error for the caller, not a shorter ledger."""
    file = LedgerFile(tmp_path)
    file.write(ledger())
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            file.write(replace(ledger(), hands_off={}))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert file.read() == (ledger(), "")


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_no_link_in_the_directory_leads_elsewhere(tmp_path, link):
    """The daemon's user owns the directory: what root does there must not reach any other file."""
    precious = tmp_path / "precious"
    precious.write_text("as it was")
    precious.chmod(0o600)
    owner = precious.stat().st_uid
    state = tmp_path / "state"
    state.mkdir()
    if os.geteuid() == 0:
        os.chown(state, 65534, 65534)
    file = LedgerFile(state)
    link(precious, state / "lock")
    link(precious, state / "ledger.new")

    with pytest.raises(OSError, match=r"symbolic links|not a file of its own"):
        file.lock()
    file.write(ledger())

    assert file.read() == (ledger(), "")
    assert precious.read_text() == "as it was"
    assert (precious.stat().st_mode & 0o777, precious.stat().st_uid) == (0o600, owner)


def test_a_pipe_in_the_files_place_holds_nobody_up(tmp_path):
    """Nobody writes to it, and nobody waits for that."""
    os.mkfifo(tmp_path / "ledger.json")
    os.mkfifo(tmp_path / "lock")
    file = LedgerFile(tmp_path)

    assert file.read()[1] != ""
    with pytest.raises(OSError, match="not a file of its own"):
        file.lock()


GOOD = json.dumps(dump(ledger()))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b"{}",
        b"\xff\xfe\x00",
        b"[" * 100_000,
        b"1" * 10_000,
        GOOD[: len(GOOD) // 2].encode(),
        GOOD.replace('"version": 1', '"version": 2').encode(),
        GOOD.replace('"0-7"', '"7-0"').encode(),
        GOOD.replace('"fifo"', '"turbo"').encode(),
        GOOD.replace('"paused"', '"eaten"').encode(),
    ],
    ids=range(13),
)
def test_a_damaged_file_is_told_and_set_aside(tmp_path, content):
    """What is no ledger is empty, with the reason; it is kept for people to look at, and a new one can be written."""
    file = LedgerFile(tmp_path)
    file.path.write_bytes(content)

    found, trouble = file.read()
    aside = file.set_aside()

    assert found == Ledger()
    assert trouble.startswith(f"{file.path}: ")
    assert aside.read_bytes() == content
    file.write(ledger())
    assert file.read() == (ledger(), "")


def test_a_huge_file_is_not_read(tmp_path):
    """A file beyond all reason is set aside unread."""
    file = LedgerFile(tmp_path)
    with open(file.path, "wb") as sparse:
        sparse.truncate(1 << 40)

    assert file.read() == (Ledger(), f"{file.path}: far too large")
    assert file.set_aside() == tmp_path / "ledger.damaged"


def test_what_cannot_be_read_says_nothing_of_its_content(tmp_path):
    """A folder or a loop of links in the file's place is an error for the caller, who must not set it aside."""
    file = LedgerFile(tmp_path)
    file.path.mkdir()
    with pytest.raises(IsADirectoryError):
        file.read()
    file.path.rmdir()
    file.path.symlink_to(file.path)

    with pytest.raises(OSError, match="symbolic links"):
        file.read()


def test_what_cannot_be_set_aside_stays(tmp_path):
    """A file that is gone, or whose place is taken, is nothing to fall over."""
    file = LedgerFile(tmp_path)
    first = file.set_aside()
    file.path.write_text("damaged")
    (tmp_path / "ledger.damaged").mkdir()

    assert (first, file.set_aside()) == (None, None)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become somebody who may not read")
def test_an_unreadable_file_is_an_error(tmp_path):
    """Permission missing says nothing against what is in the file."""
    file = LedgerFile(tmp_path)
    file.write(ledger())
    os.seteuid(65534)
    try:
        with pytest.raises(PermissionError):
            file.read()
    finally:
        os.seteuid(0)


def test_the_file_is_readable_for_everybody(tmp_path):
    """A command of any user shows what is left alone, whatever the umask of the daemon was."""
    mask = os.umask(0o077)
    try:
        LedgerFile(tmp_path).write(ledger())
    finally:
        os.umask(mask)

    assert (tmp_path / "ledger.json").stat().st_mode & 0o777 == 0o644


def test_only_one_process_has_the_lock(tmp_path, holder):
    """A second daemon is turned away and told why; once the first is gone, however it went, the lock is free."""
    file = LedgerFile(tmp_path)
    with pytest.raises(BusyError, match="another rtpind"):
        file.lock()

    holder.kill()
    holder.wait()

    file.lock()
    file.unlock()


def test_the_lock_is_let_go_and_taken_again(tmp_path):
    """Two files of one directory exclude each other, in one process too; letting go twice is no error."""
    first, second = LedgerFile(tmp_path / "a/b"), LedgerFile(tmp_path / "a/b")
    first.lock()
    with pytest.raises(BusyError):
        second.lock()
    first.unlock()
    first.unlock()

    second.lock()
    second.unlock()


def test_the_lock_is_not_inherited(tmp_path):
    """A program that the holder starts does not keep the lock alive."""
    file = LedgerFile(tmp_path)
    file.lock()
    child = subprocess.Popen(["sleep", "60"], close_fds=False)
    file.unlock()
    try:
        LedgerFile(tmp_path).lock()
    finally:
        child.kill()
        child.wait()


def test_turned_away_leaves_nothing_open(tmp_path, holder):
    """A process that keeps asking does not run out of file descriptors."""
    file = LedgerFile(tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(10):
        with pytest.raises(BusyError):
            file.lock()

    assert len(os.listdir("/proc/self/fd")) == before


def test_a_directory_that_cannot_be_made_is_an_error(tmp_path):
    """The caller is told by OSError, which is how it knows that it lacks the right."""
    (tmp_path / "file").touch()

    with pytest.raises(OSError, match="file"):
        LedgerFile(tmp_path / "file/state").lock()

"""A policy file is read without waiting and without trust, and whatever is wrong with it is a problem, not a fault."""

import os
import threading
from pathlib import Path

import factories
import pytest

from rtpind.daemon import policysource

HOST = factories.host()
NEEDS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be or to make somebody else")
WAIT = pytest.mark.timeout(20)


@pytest.fixture
def path(tmp_path):
    """A good policy file."""
    made = tmp_path / "policy.yaml"
    made.write_text(factories.REALTIME)
    made.chmod(0o644)
    return made


def refused(path):
    """Return the only problem of a file that is not used."""
    policy, problems = policysource.read(path, HOST)
    assert policy is None
    (problem,) = problems
    return problem


def test_a_good_file_is_a_policy(path):
    """Nothing to say, and the rules are there."""
    policy, problems = policysource.read(path, HOST)

    assert problems == []
    assert [rule.class_name for rule in policy.rules] == ["realtime"]


def test_problems_keep_their_lines(path):
    """What is wrong inside is told with the line on which it stands."""
    path.write_text(factories.REALTIME.replace("class: realtime", "class: realtme"))
    problem = refused(path)

    assert (problem.line, problem.path) == (10, "guests[0].class")


@pytest.mark.parametrize("mode", [0o664, 0o646, 0o666, 0o777, 0o622])
def test_a_file_that_others_may_write_is_refused(path, mode):
    """Group and others may read and nothing else, however good the content is."""
    path.chmod(mode)
    problem = refused(path)

    assert problem.message == f"others may write this file (mode {mode:04o})"
    assert problem.hint == "chmod go-w"


@pytest.mark.parametrize("mode", [0o644, 0o600, 0o755, 0o640, 0o400])
def test_a_file_that_only_its_owner_may_write_is_used(path, mode):
    """Every other mode is as good as another."""
    path.chmod(mode)

    assert policysource.read(path, HOST)[1] == []


@NEEDS_ROOT
def test_a_file_of_somebody_else_is_refused(path):
    """Its owner could write it, whatever its mode says now; root's is good for everybody."""
    os.chown(path, 65534, 65534)

    assert refused(path).message == "the file belongs to uid 65534"
    os.chown(path, 0, 65534)
    assert policysource.read(path, HOST)[1] == []


@NEEDS_ROOT
def test_both_faults_are_told_beside_those_of_the_content(path):
    """Trust and content are judged at once: every problem is in one list."""
    path.write_text(factories.REALTIME.replace("class: realtime", "class: realtme"))
    os.chown(path, 65534, 0)
    path.chmod(0o666)
    policy, problems = policysource.read(path, HOST)

    assert (policy, len(problems)) == (None, 3)


@NEEDS_ROOT
def test_the_file_behind_a_link_is_judged(path, tmp_path):
    """A link is as good as the file it leads to."""
    link = tmp_path / "link"
    link.symlink_to(path)
    os.chown(link, 65534, 65534, follow_symlinks=False)
    good = policysource.read(link, HOST)[1]
    path.chmod(0o666)

    assert good == []
    assert "others may write" in refused(link).message


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda _: None, "No such file or directory"),
        (Path.mkdir, "Is a directory"),
        (lambda path: path.symlink_to(path), "Too many levels of symbolic links"),
    ],
    ids=["missing", "folder", "loop"],
)
def test_what_cannot_be_read_is_said_by_the_kernel(tmp_path, make, message):
    """The kernel's own words say why."""
    make(tmp_path / "odd")
    problem = refused(tmp_path / "odd")

    assert (problem.line, problem.message) == (1, message)


@pytest.mark.parametrize("name", ["x" * 300, "file/below", "\udcff"])
def test_an_odd_name_is_a_problem(tmp_path, name):
    """A name that no file can have is not a fault."""
    (tmp_path / "file").touch()

    assert refused(tmp_path / name).message


@NEEDS_ROOT
def test_an_unreadable_file_is_a_problem(path):
    """The daemon's user may lack the right."""
    path.chmod(0o600)
    os.seteuid(65534)
    try:
        problem = refused(path)
    finally:
        os.seteuid(0)

    assert problem.message == "Permission denied"
    assert "uid 65534 may not read it" in problem.hint


@WAIT
def test_a_fifo_does_not_hang(tmp_path):
    """Neither without a writer nor with one that never writes: it is refused at once."""
    os.mkfifo(tmp_path / "fifo")
    without = refused(tmp_path / "fifo")
    reader = os.open(tmp_path / "fifo", os.O_RDONLY | os.O_NONBLOCK)
    writer = os.open(tmp_path / "fifo", os.O_WRONLY)
    try:
        silent = refused(tmp_path / "fifo")
    finally:
        os.close(reader)
        os.close(writer)

    assert (without.message, silent.message) == ("not a file", "not a file")


@WAIT
@pytest.mark.parametrize("device", ["/dev/zero", "/dev/null", "/dev/tty", "/dev/random"])
def test_a_device_does_not_hang(device):
    """Endless and silent devices are refused at once."""
    if not os.path.exists(device):
        pytest.skip(f"no {device} here")

    assert refused(Path(device)).message in ("not a file", "No such device or address")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version: \xff", "not UTF-8: invalid start byte at byte 9"),
        ("version: 1\n".encode("utf-16"), "not UTF-8: invalid start byte at byte 0"),
        (b"version: 1 # \xc3", "not UTF-8: unexpected end of data at byte 13"),
    ],
)
def test_what_is_not_utf_8_is_a_problem(path, content, message):
    """The byte is named."""
    path.write_bytes(content)

    assert refused(path).message == message


@pytest.mark.parametrize("content", [b"", b"\0", b"\xef\xbb\xbf", b"{" * 100, b"\n" * 100, b"- &a [*a]"])
def test_what_is_no_policy_is_a_problem(path, content):
    """Odd content never raises."""
    path.write_bytes(content)

    assert refused(path).line >= 1


@WAIT
def test_a_huge_file_is_not_read(path):
    """A file beyond all reason costs neither memory nor time."""
    with open(path, "wb") as sparse:
        sparse.truncate(1 << 40)

    assert "larger" in refused(path).message


def test_a_byte_order_mark_is_no_harm(path):
    """Some editors put one there."""
    path.write_bytes(b"\xef\xbb\xbf" + factories.REALTIME.lstrip().encode())

    assert policysource.read(path, HOST)[1] == []


def test_a_file_that_is_replaced_all_the_time_is_read_whole(path):
    """Whoever renames a new file over the old one is never seen half-way."""
    stop = threading.Event()

    def replace():
        while not stop.is_set():
            fresh = path.with_suffix(".new")
            fresh.write_text(factories.REALTIME)
            fresh.chmod(0o644)
            fresh.replace(path)

    writer = threading.Thread(target=replace)
    writer.start()
    try:
        found = [policysource.read(path, HOST)[1] for _ in range(30)]
    finally:
        stop.set()
        writer.join()

    assert found == [[]] * 30


def test_nothing_stays_open(path, tmp_path):
    """However often it is read, and whatever it is, no descriptor is left."""
    before = len(os.listdir("/proc/self/fd"))
    for odd in (path, tmp_path, tmp_path / "none", Path("/dev/zero")):
        for _ in range(5):
            policysource.read(odd, HOST)

    assert len(os.listdir("/proc/self/fd")) == before

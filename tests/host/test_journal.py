"""Records reach the journal, or stderr, or nobody; the daemon goes on in each case."""

import io
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from rtpind.core.audit import Kind, Level, Record
from rtpind.host.journal import Journal, notify, watchdog_s

ROOT = Path(__file__).resolve().parents[2]
RECORD = Record(Kind.CHANGED, "rt-1: vcpu 0: pCPU 0-1 → 1", Level.NOTICE, {"TID": "7", "COMM": "CPU 0/KVM", "RULE": ""})

#: Binds the journal's socket where libsystemd looks for it, in a mount namespace of its own, and prints what arrives.
AS_JOURNAL = """
import os, socket, sys
os.makedirs("/run/systemd/journal")
server = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
server.bind("/run/systemd/journal/socket")
if sys.argv[1] == "deaf":
    server.close()
from rtpind.core.audit import Kind, Level, Record
from rtpind.host.journal import Journal
fields = {"COMM": "a\\nRTPIND_FORGED=1", "RULE": "", "TID": "7"}
Journal().send(Record(Kind.DRIFT, sys.argv[2], Level.WARNING, fields))
if sys.argv[1] != "deaf":
    server.setblocking(False)  # what was sent is there
    try:
        sys.stdout.buffer.write(server.recv(65536))
    except BlockingIOError:
        pass
"""


def in_namespace(*arguments):
    """Run AS_JOURNAL with an empty /run of its own."""
    script = 'mount -t tmpfs none /run && exec "$@"'
    command = ["unshare", "--mount", "sh", "-c", script, "sh", sys.executable, "-c", AS_JOURNAL, *arguments]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, env=env, timeout=30)
    if done.returncode in (1, 32) and b"Traceback" not in done.stderr:
        pytest.skip(f"no mount namespace here: {done.stderr.decode().strip()}")
    return done


def sent(record, **options):
    """Return what a record looks like on stderr where there is no journal."""
    out = io.StringIO()
    Journal(Path("/nonexistent"), out, **options).send(record)
    return out.getvalue()


def test_a_record_arrives_in_the_journal_with_its_fields():
    """What a journal receives: message, id, priority, and the fields; a value with a line's end forges no field."""
    done = in_namespace("listening", "one\ntwo")

    assert (done.returncode, done.stderr) == (0, b"")
    fields = done.stdout
    assert b"MESSAGE_ID=" + Kind.DRIFT.value.encode() + b"\n" in fields
    assert b"PRIORITY=4\n" in fields
    assert b"SYSLOG_IDENTIFIER=rtpind\n" in fields
    assert b"RTPIND_TID=7\n" in fields
    assert b"RTPIND_RULE" not in fields
    assert b"MESSAGE\n" + (7).to_bytes(8, "little") + b"one\ntwo\n" in fields
    assert b"RTPIND_COMM\n" + (17).to_bytes(8, "little") + b"a\nRTPIND_FORGED=1\n" in fields


@pytest.mark.parametrize(("how", "message"), [("deaf", "text"), ("listening", "a path \udcff that is no text")])
def test_a_record_that_the_journal_does_not_take_goes_to_stderr(how, message):
    """A socket that nobody reads, or a text that cannot be sent, loses no record."""
    done = in_namespace(how, os.fsencode(message))

    assert done.returncode == 0
    assert done.stderr.startswith(b"rtpind: warning: ")
    assert b"Traceback" not in done.stderr
    assert b"journal: " in done.stderr


def test_without_a_journal_a_record_is_a_line_on_stderr():
    """Level, message and the fields that say something stand in one line."""
    assert sent(RECORD) == (
        "rtpind: notice: rt-1: vcpu 0: pCPU 0-1 → 1 [RTPIND_TID=7 RTPIND_COMM='CPU 0/KVM']\n"
    )  # fmt: skip
    assert sent(Record(Kind.DAEMON, "started")) == "rtpind: info: started\n"


@pytest.mark.parametrize("end", ["\n", "\r", "\x1b[2J", "\0", "\u2028", "\x85"])
def test_a_record_is_one_line_whatever_it_holds(end):
    """A thread's name can neither end the line nor steer the terminal that shows it."""
    text = sent(Record(Kind.DAEMON, f"a{end}rtpind: b", fields={"COMM": f"c{end}d"}))

    assert text.endswith("\n")
    assert text[:-1].isprintable()


def test_a_journal_that_comes_is_used_from_then_on(tmp_path):
    """Each record looks anew: what is not there now may be there later."""
    out = io.StringIO()
    journal = Journal(tmp_path / "socket", out)
    journal.send(RECORD)
    first = out.getvalue()
    (tmp_path / "socket").touch()
    journal.send(RECORD)

    assert first
    assert out.getvalue() == first  # it went to the library, which knows whether there is a journal


class Broken(io.StringIO):
    """A stream whose reader is gone, or whose disk is full."""

    def write(self, _text):
        raise BrokenPipeError

    def flush(self):
        raise OSError(28, "No space left on device")


def test_a_stderr_that_cannot_be_written_is_no_fault():
    """A closed stream, a pipe without a reader and a full disk lose the record and nothing else."""
    closed = io.StringIO()
    closed.close()
    for stream in (closed, Broken()):
        Journal(Path("/nonexistent"), stream).send(RECORD)

    assert closed.closed


@pytest.mark.parametrize("redirect", ["2>&-", "2>/dev/full", "2>&- >&- <&-"])
def test_a_process_without_stderr_goes_on(redirect):
    """A daemon that was started with a closed or full stderr still sends its records, to nobody."""
    code = (
        "from pathlib import Path; from rtpind.core.audit import Kind, Record; from rtpind.host.journal import Journal;"
        "j = Journal(Path('/nonexistent')); j.send(Record(Kind.DAEMON, 'x')); j.send(Record(Kind.DAEMON, 'y'));"
        "import os; os._exit(7)"
    )
    command = f'exec "$0" -c "$1" {redirect}'
    done = subprocess.run(["sh", "-c", command, sys.executable, code], env=os.environ | {"PYTHONPATH": str(ROOT)})

    assert done.returncode == 7


def test_systemd_is_told(tmp_path, monkeypatch):
    """What is said arrives at the notify socket, one value in a line."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as server:
        server.bind(str(tmp_path / "notify"))
        server.settimeout(5)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        notify(READY="1", STATUS="enforce; 1 of 2 → ü")

        assert server.recv(65536).decode() == "READY=1\nSTATUS=enforce; 1 of 2 → ü"


@pytest.mark.parametrize("name", [None, "", "/nonexistent/notify", "nonsense"])
def test_a_systemd_that_does_not_listen_is_no_fault(monkeypatch, name):
    """Started by hand, or with a socket that nobody listens on, the daemon just goes on."""
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    if name is not None:
        monkeypatch.setenv("NOTIFY_SOCKET", name)

    notify(READY="1")

    assert os.environ.get("NOTIFY_SOCKET") == name


@pytest.mark.parametrize(
    ("usec", "pid", "seconds"),
    [
        (None, None, None),
        ("20000000", None, 20.0),
        ("20000000", "own", 20.0),
        ("20000000", "1", None),  # meant for another process
        ("0", None, None),
        ("soon", None, None),
        ("-5", None, None),
        ("", "", None),
        ("500000", "", 0.5),
    ],
)
def test_the_watchdog_interval_is_systemds(monkeypatch, usec, pid, seconds):
    """The interval is taken only when systemd means this process, and nonsense is none."""
    for name, value in (("WATCHDOG_USEC", usec), ("WATCHDOG_PID", str(os.getpid()) if pid == "own" else pid)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)

    assert watchdog_s() == seconds

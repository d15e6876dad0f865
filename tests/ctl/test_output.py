"""What rtpinctl prints: narrow, plain when piped, harmless whatever threads are called, and no fuss when cut off."""

import contextlib
import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import unicodedata
from pathlib import Path

import pytest
from documents import Made

ESCAPE = re.compile(r"\x1b\[[0-9;]*m")
LOOKS = ["status", "verify", "explain rt-1"]


@pytest.fixture(params=LOOKS)
def look(request, daemon):
    """A command for which a daemon answers with long and hostile names."""
    made = Made()
    daemon({"ok": made.explain(0) if request.param.startswith("explain") else made.status()})
    return request.param


def width(line):
    return sum(2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in line)


def assert_plain(text):
    """Fail unless the text is at most 100 columns wide, without blanks at ends of lines or control characters."""
    assert text.endswith("\n")
    for line in text[:-1].split("\n"):
        assert width(line) <= 100, line
        assert line == line.rstrip(), repr(line)
        assert line.isprintable(), repr(line)


def test_piped_output_is_plain(look, run):
    """Nothing but text reaches a program: no colours, no lines, no padding, no names that steer a terminal."""
    _, out, err = run(*look.split())

    assert err == ""
    assert_plain(out)


def test_the_look_at_this_host_is_plain(run, policy, tmp_path):
    """On the real host too, with and without a policy."""
    for words in (["status"], ["status", "--config", policy], ["plan", "--config", policy]):
        assert_plain(run(*words)[1])


def test_names_are_shown_as_they_are(made, daemon, run):
    """Brackets and colons in a name are text: neither markup, nor emoji, nor a fault."""
    daemon({"ok": made.status()})
    _, out, _ = run("status")

    assert "[/x] \ufffd[31m\ufffd:cat:" in out
    assert "[bold]" in out.replace("\n", "")


def test_piped_output_does_not_depend_on_the_terminal(look, command):
    """A narrow or wide terminal elsewhere changes nothing for a program."""
    narrow, wide = (
        command(f"CTL {look} | cat", COLUMNS=columns, TERM="xterm-256color")[1] for columns in ("20", "300")
    )

    assert narrow == wide
    assert_plain(narrow)


def test_a_verdict_and_its_place_are_shown(made, daemon, run):
    """The table has each thread with where it is, should be, and how that stands."""
    daemon({"ok": made.placed().status()})
    rows = [line.split() for line in run("status")[1].splitlines()]

    vcpu = next(row for row in rows if row[:2] == ["vcpu", "0"])
    assert vcpu[3:5] == ["CPU", "0/KVM"]
    assert vcpu[6:] == ["fifo:1", vcpu[5], "fifo:1", "ok"]


def test_off_place_time_is_shown(made, daemon, run):
    """What was measured of a guest's start stands behind its name, added up; of others nothing does."""
    document = made.status()
    vcpus = [thread for guest in document["guests"] for thread in guest["threads"] if thread["role"] == "vcpu"]
    assert [thread["off_place"] for thread in vcpus] == [None] * len(vcpus)
    daemon({"ok": document})
    assert "off place" not in run("status")[1]

    for thread in document["guests"][0]["threads"][:2]:
        thread["off_place"] = {"affinity_ns": 0, "scheduling_ns": 1_250_000}
    assert run("status")[1].count("; off place at start: pCPU 0.000 ms, scheduling 2.500 ms") == 1


def test_hazards_are_marked(made, daemon, run):
    """What is dangerous stands behind a mark, with and without a policy."""
    for document in (made.status(), made.bare()):
        daemon_answer = {"ok": document}
        daemon(daemon_answer)
        assert "! fifo:2 leaked to" in " ".join(run("status")[1].split())


def test_an_older_daemon_s_answer_is_shown(made, daemon, run):
    """Between an upgrade and the daemon's restart it does not tell all that there is to show."""
    status, explained = made.status(), made.explain(0)
    del status["host"]["blocked"], explained["memory"]
    for words, answer in ((["status"], status), (["explain", "rt-1"], explained)):
        daemon({"ok": answer})
        code, out, err = run(*words)
        assert (code, err) == (0, "")
        assert "rt-1" in out


def test_what_is_held_by_others_and_where_memory_is_are_shown(made, daemon, run):
    """With whose thread it is, and who is away."""
    status, explained = made.status(), made.explain(0)
    status["host"]["blocked"] = {"4": "busy: ptp4l (812)", "5": "busy: ptp4l (812)"}
    explained["memory"] = {"nodes": "1", "cpus": "4-7", "away": ["vcpu 0"]}
    daemon({"ok": status})
    assert "not given out pCPU 4-5: busy: ptp4l (812)" in " ".join(run("status")[1].split())
    daemon({"ok": explained})
    assert "memory: NUMA node 1, pCPU 4-7; away from it: vcpu 0" in run("explain", "rt-1")[1]


CUT = [("status", 0), ("status --json", 0), ("verify", 1), ("verify --json", 1), ("check-config etc/rtpind.yaml", 0)]


@pytest.mark.parametrize("buffered", ["", "1"])
@pytest.mark.parametrize(("words", "expected"), CUT)
def test_a_reader_that_goes_away_is_no_fault(made, daemon, command, buffered, words, expected):
    """There is no complaint, whether it is noticed in the middle or at the end, and nothing is called good unseen."""
    many = made.status()
    many["guests"] = many["guests"] * 30  # more than a pipe holds
    daemon({"ok": many})
    gone = "exec 3> >(:); wait $!; "  # a pipe without a reader

    for line in (f"set -o pipefail; CTL {words} | head -1", f"{gone}CTL {words} >&3"):
        code, _, err = command(line, PYTHONUNBUFFERED=buffered)
        assert (code, err) == (expected, "")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_every_encoding_will_do(look, command, encoding):
    """A terminal that lacks a character gets another one, and no traceback."""
    code, out, err = command(f"CTL {look}", PYTHONIOENCODING=encoding)

    assert (code in (0, 1), err) == (True, "")
    assert out


@pytest.mark.parametrize("columns", [60, 300])
def test_a_terminal_gets_colours_and_no_more_than_100_columns(look, tmp_path, command, columns):
    """On a terminal the table is as wide as that, up to 100, and a thread's name still steers nothing."""
    primary, secondary = pty.openpty()
    fcntl.ioctl(secondary, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    environment = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "NO_COLOR")}
    name, *more = look.split()
    words = [Path(sys.executable).with_name("rtpinctl"), name, "--state-dir", str(tmp_path), *more]
    child = subprocess.Popen(words, stdout=secondary, stdin=secondary, env=environment | {"TERM": "xterm-256color"})
    os.close(secondary)
    chunks = []
    with contextlib.suppress(OSError):  # EIO: the other side is closed
        while chunk := os.read(primary, 65536):
            chunks.append(chunk)
    os.close(primary)
    child.wait(timeout=20)
    text = b"".join(chunks).decode().replace("\r\n", "\n")

    assert child.returncode in (0, 1)
    assert ESCAPE.search(text)
    for line in ESCAPE.sub("", text).split("\n"):
        assert line.isprintable()
        assert width(line) <= min(columns, 100)

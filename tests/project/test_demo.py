"""``make demo`` on the real libvirt: it bears out its claims and leaves nothing behind, however it ends."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from demo.stage import PREFIX, RT_RUNTIME, refusal

ROOT = Path(__file__).resolve().parent.parent.parent
DEMO = [sys.executable, "-u", "-m", "demo.run"]

pytestmark = pytest.mark.live


def left_behind() -> set[str]:
    """Return what a demonstration could leave: guests, processes that belong to it, files."""
    guests = subprocess.run(["virsh", "-r", "-q", "list", "--name"], capture_output=True, text=True, check=True)
    processes = subprocess.run(["pgrep", "-af", f"{PREFIX}-"], capture_output=True, text=True)
    files = [*Path("/tmp").glob("rtpind-demo-*"), *Path("/var/tmp").glob(f"{PREFIX}-*")]
    return {
        *(name for name in guests.stdout.split() if name.startswith(PREFIX)),
        *processes.stdout.splitlines(),
        *map(str, files),
    }


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """Skip where no demonstration can be, and compare the host before and after it."""
    reason = refusal()
    if reason:
        if os.environ.get("RTPIND_REQUIRE_LIVE") == "1":
            pytest.fail(f"RTPIND_REQUIRE_LIVE=1, but {reason}")
        pytest.skip(reason)
    before = left_behind(), RT_RUNTIME.read_text()
    yield
    assert (left_behind(), RT_RUNTIME.read_text()) == before


@pytest.mark.timeout(300)
def test_the_demonstration_bears_out_its_claims() -> None:
    """Exit 0, every step there, plain text of at most 100 columns."""
    done = subprocess.run(DEMO, cwd=ROOT, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^All \d+ claims hold", done.stdout, re.MULTILINE)
    assert "FAILED" not in done.stdout
    assert [int(number) for number in re.findall(r"^== (\d) of \d: ", done.stdout, re.MULTILINE)] == [*range(1, 8)]
    assert "\x1b" not in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 100


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("number", "until"),
    [
        pytest.param(signal.SIGINT, "round 1 of", id="ctrl-c under load"),
        pytest.param(signal.SIGTERM, "== 2 of", id="terminated while placing"),
        pytest.param(signal.SIGINT, "== 1 of", id="ctrl-c while guests start"),
    ],
)
def test_a_signal_leaves_nothing_behind(number: signal.Signals, until: str) -> None:
    """Stopped halfway it cleans up, says so, and exits with 128 + signal; the fixture looks at what is left."""
    with subprocess.Popen(DEMO, cwd=ROOT, stdout=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL) as demo:
        assert demo.stdout is not None
        try:
            shown = [""]
            while until not in shown[-1]:
                shown.append(demo.stdout.readline())
                assert shown[-1], "".join(shown)
        finally:
            demo.send_signal(number)
            rest = demo.stdout.read()
    assert demo.returncode == 128 + number, rest
    assert "Stopped by a signal.\n" in rest

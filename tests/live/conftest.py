"""Fixtures of the live tests: real libvirt, real QEMU, the real daemon; what a machine lacks is skipped by name.

Each test touches only guests that it started (rules by UUID). With RTPIND_REQUIRE_LIVE=1 a skip is a failure.
"""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import harness
import pytest

from demo.guests import PREFIX, Lab, kvm_works

REQUIRED = os.environ.get("RTPIND_REQUIRE_LIVE") == "1"


def _missing() -> str:
    """Return what this machine lacks for live tests; "" when it has everything."""
    if os.geteuid() != 0:
        return "live tests need root"
    for program in ("virsh", "qemu-system-x86_64", "strace", "setpriv", "taskset", "chrt"):
        if shutil.which(program) is None:
            return f"{program} is not installed"
    if len(os.sched_getaffinity(0)) < 2 or not {0, 1} <= os.sched_getaffinity(0):
        return "live tests need pCPUs 0 and 1"
    done = subprocess.run(["virsh", "-r", "-c", "qemu:///system", "list"], capture_output=True, timeout=30)
    return "" if done.returncode == 0 else "libvirtd does not answer on qemu:///system"


def skip(reason: str) -> None:
    """Skip the test, or fail it where nothing may be skipped."""
    if REQUIRED:
        pytest.fail(f"RTPIND_REQUIRE_LIVE=1, but {reason}")
    pytest.skip(reason)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark everything here as live."""
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.live)


@pytest.fixture(scope="session", autouse=True)
def _machine() -> Iterator[None]:
    reason = _missing()
    if reason:
        skip(reason)
    yield
    harness.remove_copy()


@pytest.fixture(scope="session")
def _closing() -> Iterator[list[threading.Thread]]:
    """Labs that are being cleaned up while other tests run: libvirt takes seconds for what is dead already."""
    threads: list[threading.Thread] = []
    yield threads
    for thread in threads:
        thread.join(60)


@pytest.fixture
def lab(_closing: list[threading.Thread]) -> Iterator[Lab]:
    """Starts guests, and ends them after the test. Its prefix is its own, as the last test's may still be known."""
    made = Lab(f"{PREFIX}-{secrets.token_hex(2)}")
    yield made
    made.kill()
    _closing.append(threading.Thread(target=made.close))
    _closing[-1].start()


@pytest.fixture
def kvm() -> None:
    """The test needs /dev/kvm."""
    if not kvm_works():
        reason = "libvirt offers no KVM guests here"
        # A machine without hardware virtualisation is an honest one: this is not a skip that CI must forbid.
        pytest.skip(reason)


@pytest.fixture(params=["root", "unprivileged"])
def unprivileged(request: pytest.FixtureRequest) -> bool:
    """Every test that uses the daemon runs with it as root, and as a user with CAP_SYS_NICE only."""
    if request.param == "unprivileged" and harness.libvirt_lets_nobody_in():
        skip("libvirt's read-only socket refuses a user without rights (start libvirtd with auth_unix_ro = none)")
    return bool(request.param == "unprivileged")


@pytest.fixture
def daemon(unprivileged: bool) -> Iterator[Callable[..., harness.Daemon]]:
    """Makes daemons (not started yet), and ends them after the test."""
    made: list[harness.Daemon] = []

    def make(text: str, **more: Path) -> harness.Daemon:
        made.append(harness.Daemon(text, unprivileged=unprivileged, **more))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture
def unthrottled() -> Iterator[None]:
    """FIFO is possible in libvirt's cgroups: RT throttling off where RT_GROUP_SCHED would refuse it."""
    before = harness.RT_RUNTIME.read_text()
    harness.RT_RUNTIME.write_text("-1")
    yield
    harness.RT_RUNTIME.write_text(before)

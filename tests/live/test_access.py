# SPDX-License-Identifier: GPL-2.0-or-later
"""Whom libvirt lets in: a libvirtd of its own, which asks polkit, beside the host's; and rtpind as a plain user."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from harness import NOBODY, Daemon, policy, readable_python

from demo.guests import wait_for

#: Its own /run, /var/lib/libvirt, polkit rules and network: the host's libvirtd does not notice.
LIBVIRTD = """
set -e
mount --make-rprivate /
for place in /run /var/lib/libvirt /var/cache/libvirt /etc/libvirt/qemu; do mount -t tmpfs none $place; done
mkdir -p /run/dbus /run/lock
mount --bind $1/rules /etc/polkit-1/rules.d
if [ $2 = no-polkitd ]; then mount -t tmpfs none /usr/share/dbus-1/system-services; fi
if [ $2 != no-dbus ]; then dbus-daemon --system --fork --print-pid=1 --nopidfile >$1/dbus.pid; fi
exec libvirtd -f $1/libvirtd.conf -p /run/libvirtd.pid
"""
CONF = 'unix_sock_dir = "{}"\nauth_unix_ro = "polkit"\nauth_unix_rw = "polkit"\nadmin_min_workers = 1\n'
DENY = 'polkit.addRule(function(a, s) {{ if (a.id == "org.libvirt.unix.monitor") return polkit.Result.{}; }});\n'


def missing(reason: str) -> None:
    """Skip the test, or fail it where nothing may be skipped."""
    if os.environ.get("RTPIND_REQUIRE_LIVE") == "1":
        pytest.fail(f"RTPIND_REQUIRE_LIVE=1, but {reason}")
    pytest.skip(reason)


Start = Callable[..., Path]


def _end(process: subprocess.Popen[bytes]) -> None:
    """End all that runs in the mount namespace that a process made for itself."""
    namespace = Path(f"/proc/{process.pid}/ns/mnt").readlink()
    if namespace == Path("/proc/self/ns/mnt").readlink():  # it did not get so far
        process.kill()
    else:
        for path in Path("/proc").glob("[0-9]*/ns/mnt"):
            with contextlib.suppress(OSError):
                if path.readlink() == namespace:
                    os.kill(int(path.parts[2]), signal.SIGTERM)
    process.wait(timeout=30)


@pytest.fixture
def libvirtd() -> Iterator[Start]:
    """Starts a libvirtd that asks polkit (how it stands with polkit, polkit's answer); returns where it is."""
    for program in ("libvirtd", "dbus-daemon", "unshare", "/usr/lib/polkit-1/polkitd"):
        if shutil.which(program) is None:
            missing(f"{program} is not installed")
    if subprocess.run(["unshare", "-m", "-n", "true"], capture_output=True).returncode != 0:
        missing("namespaces cannot be made here")
    where = Path(tempfile.mkdtemp(prefix="rtpind-libvirtd-", dir="/var/tmp"))
    where.chmod(0o755)
    for name in ("rules", "sock"):
        (where / name).mkdir()
        (where / name).chmod(0o755)
    made: list[subprocess.Popen[bytes]] = []

    def start(how: str = "", answer: str = "") -> Path:
        if answer:
            (where / "rules/00-test.rules").write_text(DENY.format(answer))
        (where / "libvirtd.conf").write_text(CONF.format(where / "sock"))
        command = ["unshare", "-m", "-n", "bash", "-c", LIBVIRTD, "bash", str(where), how or "polkit"]
        with open(where / "log", "wb") as log:
            made.append(subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log))
        wait_for((where / "sock/libvirt-sock-ro").exists, "libvirtd listens", 30)
        return where

    yield start
    for process in made:
        if process.poll() is None:
            _end(process)
    shutil.rmtree(where, ignore_errors=True)


@pytest.fixture
def daemon() -> Iterator[Callable[[Path], Daemon]]:
    """Starts rtpind as a user with CAP_SYS_NICE only, on that libvirtd."""
    made: list[Daemon] = []

    def start(where: Path) -> Daemon:
        text = policy().replace(
            "daemon: {", f'daemon: {{uri: "qemu+unix:///system?socket={where}/sock/libvirt-sock-ro", '
        )
        made.append(Daemon(text, unprivileged=True))
        made[-1].start_without_libvirt()
        return made[-1]

    yield start
    for one in made:
        one.close()


def test_a_member_of_the_group_may_look_and_change_nothing(libvirtd: Start, daemon: Callable[[Path], Daemon]) -> None:
    """The daemon's own group asks its status; only root and the daemon's user release, pause and manage."""
    made = daemon(libvirtd())
    wait_for(lambda: made.count("connected to libvirt") == 1, "rtpind has connected")
    python, where = readable_python()

    def as_user(uid: int, *words: str) -> subprocess.CompletedProcess[str]:
        user = ["setpriv", f"--reuid={uid}", f"--regid={NOBODY}", "--clear-groups", "--inh-caps=-all"]
        command = [*user, python, "-m", "rtpind.ctl.main", words[0], "--state-dir", str(made.state), *words[1:]]
        return subprocess.run(command, capture_output=True, text=True, cwd="/", env=os.environ | where, timeout=60)

    assert json.loads(as_user(4242, "status", "--json").stdout)["daemon"]["pid"] == made.tid()
    refused = as_user(4242, "pause")
    assert (refused.returncode, "only root" in refused.stderr) == (1, True)
    assert made.ctl("status")["daemon"]["mode"] == "enforce"
    assert as_user(NOBODY, "pause").returncode == 0
    assert made.ctl("status")["daemon"]["mode"] == "paused"
    assert made.run_ctl("manage").returncode == 0  # root
    assert made.ctl("status")["daemon"]["mode"] == "enforce"


def test_by_default_polkit_lets_its_user_in(libvirtd: Start, daemon: Callable[[Path], Daemon]) -> None:
    """Nobody has to add a rule: org.libvirt.unix.monitor is allowed to everybody."""
    made = daemon(libvirtd())
    wait_for(lambda: made.count("connected to libvirt") == 1, "rtpind has connected")
    assert made.count("libvirt is away") == 0


@pytest.mark.parametrize(
    ("how", "answer", "cure"),
    [
        ("no-dbus", "", "install polkitd"),
        ("no-polkitd", "", "install polkitd"),
        ("", "NO", "allow org.libvirt.unix.monitor"),
        ("", "AUTH_ADMIN", "allow org.libvirt.unix.monitor"),
    ],
)
def test_where_it_is_refused_the_record_names_the_cure(
    libvirtd: Start, daemon: Callable[[Path], Daemon], how: str, answer: str, cure: str
) -> None:
    """Once; and rtpinctl, which cannot be told who runs, is told why."""
    made = daemon(libvirtd(how, answer))
    wait_for(lambda: made.count("libvirt is away") == 1, "it is on record")
    assert made.count(f"libvirt is away.*{cure}") == 1
    told = made.run_ctl("release", "--all")
    assert told.returncode == 1
    assert cure in told.stderr


def test_it_connects_by_itself_once_polkit_allows_it(libvirtd: Start, daemon: Callable[[Path], Daemon]) -> None:
    """A rule that is corrected is all that it takes."""
    where = libvirtd(answer="NO")
    made = daemon(where)
    wait_for(lambda: made.count("libvirt is away") == 1, "it is refused")
    (where / "rules/00-test.rules").unlink()
    wait_for(lambda: made.count("connected to libvirt") == 1, "rtpind has connected", 30)
    assert made.count("libvirt is away") == 1


def test_another_reason_is_said_anew(libvirtd: Start, daemon: Callable[[Path], Daemon]) -> None:
    """First there is no libvirt, then one whose socket is closed to others: the second has a cure of its own."""
    where = libvirtd()
    (where / "sock").chmod(0o700)
    made = daemon(where)
    wait_for(lambda: made.count("libvirt is away.*unix_sock_ro_perms") == 1, "a closed socket is told as such")
    (where / "rules/00-test.rules").write_text(DENY.format("NO"))
    (where / "sock").chmod(0o755)
    wait_for(lambda: made.count("libvirt is away.*allow org.libvirt.unix.monitor") == 1, "polkit's refusal is told", 30)

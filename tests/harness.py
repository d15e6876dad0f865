"""Runs the real daemon on the real host for the live tests, and reads what it did from outside."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from demo.guests import Guest, Seen, wait_for

ROOT = Path(__file__).resolve().parent.parent
RT_RUNTIME = Path("/proc/sys/kernel/sched_rt_runtime_us")
FIFO_RESET = 0x40000001
NOBODY = 65534
_PRIVILEGES = [
    "setpriv",
    f"--reuid={NOBODY}",
    f"--regid={NOBODY}",
    "--clear-groups",
    "--inh-caps=-all,+sys_nice",
    "--ambient-caps=-all,+sys_nice",
    "--bounding-set=-all,+sys_nice",
]

POLICY = """\
version: 1
mode: {mode}
pools: {{housekeeping: {housekeeping}, realtime: "{realtime}"}}
classes:
  realtime:
    vcpu: {{pool: realtime, exclusive: thread, scheduler: fifo, priority: 1}}
    emulator: {{pool: housekeeping}}
  dedicated:
    vcpu: {{pool: realtime, exclusive: thread}}
    emulator: {{pool: housekeeping}}
  floating:
    vcpu: {{pool: housekeeping}}
    emulator: {{pool: housekeeping}}
guests:
{rules}
drift: {drift}
when_full: {when_full}
daemon: {{period: {period}}}
"""


def policy(
    *rules: tuple[Guest, str],
    mode: str = "enforce",
    drift: str = "repair",
    when_full: str = "degrade",
    period: str = "200ms",
    housekeeping: str = "0",
    realtime: str = "1",
    names: Sequence[tuple[str, str]] = (),
) -> str:
    """Return a policy for this 2-pCPU host that touches only these guests."""
    lines = [f"  - {{uuid: {guest.uuid}, class: {class_}}}" for guest, class_ in rules]
    lines += [f"  - {{name: {name!r}, class: {class_}}}" for name, class_ in names]
    return POLICY.format(
        mode=mode,
        rules="\n".join(lines),
        drift=drift,
        when_full=when_full,
        period=period,
        housekeeping=housekeeping,
        realtime=realtime,
    )


class Daemon:
    """One rtpind process, as root or as a user with nothing but CAP_SYS_NICE; its records come from stderr."""

    def __init__(self, text: str, *, unprivileged: bool, state: Path | None = None) -> None:
        self.unprivileged = unprivileged
        self.dir = Path(tempfile.mkdtemp(prefix="rtpind-test-", dir="/var/tmp"))
        self.dir.chmod(0o755)
        self.policy = self.dir / "policy.yaml"
        self.state = state or self.dir / "state"
        self.state.mkdir(exist_ok=True)
        if unprivileged:
            os.chown(self.state, NOBODY, NOBODY)
        self.write(text)
        self.process: subprocess.Popen[str] | None = None
        self._reader: threading.Thread | None = None
        self.killed_at = 0
        self.records: list[str] = []

    def write(self, text: str) -> None:
        """Replace the policy file."""
        fresh = self.policy.with_suffix(".new")
        fresh.write_text(text)
        fresh.chmod(0o644)
        fresh.replace(self.policy)

    def start(self, *arguments: str, prefix: Sequence[str] = (), env: dict[str, str] | None = None) -> None:
        """Start it and wait until it has seen libvirt (or has ended)."""
        before = len(self.records)
        self._spawn(arguments, prefix, env or {})
        wait_for(
            lambda: any("connected to libvirt" in record for record in self.records[before:]) or self.died(),
            "the daemon has connected to libvirt",
        )

    def start_without_libvirt(self) -> None:
        """Start it and wait for nothing."""
        self._spawn((), (), {})

    def start_killed_at(self, number: int) -> None:
        """Run it until its Nth sched_set* call, where strace kills it; sets ``killed_at``, 0 when it got to the end."""
        calls = "sched_setaffinity,sched_setscheduler"
        inject = f"inject={calls}:signal=SIGKILL:when={number}"
        prefix = ["strace", "-f", "-qq", "-o", "/dev/null", "-e", f"trace={calls}", "-e", inject]
        self._spawn((), prefix, {})
        pid = 0

        def ended() -> bool:
            nonlocal pid
            found = self.ctl("status")["daemon"]
            pid = found["pid"] if found else 0
            connected = bool(found) and found["libvirt"] == "connected"
            return self.died() or (connected and self.run_ctl("verify").returncode == 0)

        wait_for(ended, "it is killed, or has done all it wants to", 30)
        self.killed_at = number if self.died() else 0
        if not self.killed_at:
            os.kill(pid, signal.SIGKILL)
        assert self.process is not None
        self.process.wait(timeout=10)

    def _spawn(self, arguments: Sequence[str], prefix: Sequence[str], env: dict[str, str]) -> None:
        command = [sys.executable, "-m", "rtpind", "--config", str(self.policy), "--state-dir", str(self.state)]
        command.append("--stderr")
        where: dict[str, str] = {"PYTHONPATH": str(ROOT)}
        if self.unprivileged:
            python, where = readable_python()
            command = [*_PRIVILEGES, python, *command[1:]]
        self.process = subprocess.Popen(
            [*prefix, *command, *arguments],
            stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            text=True,
            cwd="/",
            env=os.environ | where | env,
        )
        self._reader = threading.Thread(target=self._read, args=(self.process,), daemon=True)
        self._reader.start()

    def died(self) -> bool:
        """Return whether the process has ended."""
        return self.process is not None and self.process.poll() is not None

    def _read(self, process: subprocess.Popen[str]) -> None:
        assert process.stderr is not None
        with process.stderr:
            for line in process.stderr:
                self.records.append(line.rstrip("\n"))

    def stop(self, number: int = signal.SIGTERM) -> int:
        """End it and return its exit code."""
        assert self.process is not None
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(timeout=20)

    def reload(self) -> None:
        """Have it read the policy again."""
        assert self.process is not None
        self.process.send_signal(signal.SIGHUP)

    def tid(self) -> int:
        """Return the pid of rtpind itself (the process may have been started through another)."""
        return int(self.ctl("status")["daemon"]["pid"])

    def ctl(self, *words: str, check: bool = True) -> dict[str, Any]:
        """Run rtpinctl with --json against this daemon's state and return its document."""
        done = self.run_ctl(*words, "--json")
        if check and done.returncode not in (0, 1):
            raise AssertionError(done.stderr + done.stdout)
        document: dict[str, Any] = json.loads(done.stdout) if done.stdout.strip() else {"stderr": done.stderr}
        return document

    def run_ctl(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run rtpinctl against this daemon's state."""
        return subprocess.run(
            [sys.executable, "-m", "rtpind.ctl.main", words[0], "--state-dir", str(self.state), *words[1:]],
            capture_output=True,
            text=True,
            cwd="/",
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            timeout=60,
        )

    def count(self, pattern: str) -> int:
        """Return how many records match."""
        return sum(bool(re.search(pattern, record)) for record in self.records)

    def passes(self, count: int = 2) -> None:
        """Wait until that many further full passes have been made."""
        target = int(self.ctl("status")["daemon"]["passes"]) + count
        wait_for(lambda: int(self.ctl("status")["daemon"]["passes"]) >= target, f"{count} more passes")

    def close(self) -> None:
        """End it and remove its files."""
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait(timeout=10)
        if self._reader is not None:
            self._reader.join(timeout=10)
        shutil.rmtree(self.dir, ignore_errors=True)


_copy: dict[str, str] = {}


def readable_python() -> tuple[str, dict[str, str]]:
    """Return an interpreter and an environment that a user without rights can use, copying what it cannot read."""
    site = Path(sysconfig.get_paths()["purelib"])
    python = os.path.realpath(sys.executable)
    if _reads(ROOT / "rtpind/__init__.py") and _reads(site / "libvirt.py"):
        return python, {"PYTHONPATH": f"{ROOT}:{site}"}
    if "dir" not in _copy:
        _copy["dir"] = tempfile.mkdtemp(prefix="rtpind-code-", dir="/var/tmp")
        skip = shutil.ignore_patterns("mypy*", "ruff*", "hypothesis*", "pip*", "setuptools*", "grimp*", "*.pth")
        shutil.copytree(site, f"{_copy['dir']}/site", ignore=skip)
        shutil.copytree(ROOT / "rtpind", f"{_copy['dir']}/rtpind")
        subprocess.run(["chmod", "-R", "a+rX", _copy["dir"]], check=True)
    return python, {"PYTHONPATH": f"{_copy['dir']}:{_copy['dir']}/site"}


def remove_copy() -> None:
    """Remove what :func:`readable_python` copied."""
    if "dir" in _copy:
        shutil.rmtree(_copy.pop("dir"), ignore_errors=True)


def _reads(path: Path) -> bool:
    done = subprocess.run([*_PRIVILEGES, "test", "-r", str(path)], capture_output=True)
    return done.returncode == 0


def libvirt_lets_nobody_in() -> bool:
    """Return whether libvirt's read-only socket refuses a user without rights."""
    done = subprocess.run(
        [*_PRIVILEGES, "virsh", "-r", "-c", "qemu:///system", "list"], capture_output=True, timeout=30
    )
    return done.returncode != 0


def placed(guest: Guest, cpus: set[int], *, fifo: int = 0) -> bool:
    """Return whether all vCPUs are on ``cpus``, FIFO at that priority with RESET_ON_FORK (0: not realtime)."""
    policy_ = FIFO_RESET if fifo else os.SCHED_OTHER
    found = guest.vcpus()
    return bool(found) and all(
        thread.cpus <= cpus and thread.policy == policy_ and thread.priority == fifo for thread in found
    )


def helpers_on(guest: Guest, cpus: set[int]) -> bool:
    """Return whether every other thread is allowed exactly on ``cpus`` and not realtime."""
    return all(thread.cpus == cpus and not thread.fifo for thread in guest.helpers())


def violations(guests: Sequence[Guest]) -> list[tuple[Seen, Seen]]:
    """Return every (FIFO vCPU, thread that may run beside it) that breaks promise 1, as the kernel shows it."""
    found = []
    threads = [(guest, thread) for guest in guests for thread in guest.threads()]
    for guest, vcpu in threads:
        if not (vcpu.comm.startswith("CPU ") and vcpu.fifo):
            continue
        for other_guest, other in threads:
            above = other_guest is guest and other.fifo and other.priority > vcpu.priority
            if other.tid != vcpu.tid and other.cpus & vcpu.cpus and not above:
                found.append((vcpu, other))
    return found


def state_of(guests: Sequence[Guest]) -> dict[int, tuple[frozenset[int], int, int]]:
    """Return tid → (pCPUs, policy, priority) of every thread."""
    return {thread.tid: (thread.cpus, thread.policy, thread.priority) for guest in guests for thread in guest.threads()}


def foreign_guests() -> set[str]:
    """Return the names of guests that these tests did not start."""
    done = subprocess.run(["virsh", "-r", "list", "--name"], capture_output=True, text=True, timeout=30)
    return {name for name in done.stdout.split() if not name.startswith(("rtpind-lab", "rtpind-demo"))}


def restart_libvirtd() -> None:
    """Stop libvirtd and start it anew as it was started; guests keep running."""
    stop_libvirtd()()


def stop_libvirtd() -> Any:
    """Stop libvirtd; returns a function that starts it anew as it was started."""
    pid = libvirtd_pid()
    words = [word for word in Path(f"/proc/{pid}/cmdline").read_text().split("\0") if word]
    if Path("/run/systemd/system").exists():
        subprocess.run(["systemctl", "stop", "libvirtd.socket", "libvirtd"], check=True)
        return lambda: subprocess.run(["systemctl", "start", "libvirtd"], check=True)
    os.kill(pid, signal.SIGTERM)
    wait_for(lambda: not Path(f"/proc/{pid}").exists(), "libvirtd has stopped", 20)

    def start() -> None:
        subprocess.run([*words] if "-d" in words else [*words, "-d"], check=True, stdout=subprocess.DEVNULL)
        wait_for(
            lambda: subprocess.run(["virsh", "-r", "list"], capture_output=True).returncode == 0,
            "libvirtd answers",
            20,
        )

    return start


def libvirtd_pid() -> int:
    """Return the pid of libvirtd."""
    done = subprocess.run(["pgrep", "-x", "libvirtd"], capture_output=True, text=True)
    return int(done.stdout.split()[0])


def sched_calls(daemon: Daemon, guests: Sequence[Guest], passes: int = 2) -> list[str]:
    """Return the sched_set* calls on threads of ``guests`` that the daemon makes during its next passes (strace)."""
    tids = {thread.tid for guest in guests for thread in guest.threads()}
    log = daemon.dir / "strace.log"
    pid = daemon.tid()
    tracer = subprocess.Popen(
        ["strace", "-f", "-qq", "-e", "trace=sched_setaffinity,sched_setscheduler,sched_setattr,sched_setparam",
         "-o", str(log), "-p", str(pid)], stderr=subprocess.DEVNULL
    )  # fmt: skip
    try:
        wait_for(lambda: "TracerPid:\t0" not in Path(f"/proc/{pid}/status").read_text(), "strace is attached")
        daemon.passes(passes)
    finally:
        tracer.send_signal(signal.SIGINT)
        tracer.wait(timeout=10)
    calls = log.read_text().splitlines() if log.exists() else []
    return [call for call in calls if any(re.search(rf"sched_set\w+\({tid}\b", call) for tid in tids)]


class NotifySocket:
    """What systemd would listen on: collects what a service tells it."""

    def __init__(self) -> None:
        self._dir = tempfile.mkdtemp(prefix="rtpind-notify-", dir="/var/tmp")
        os.chmod(self._dir, 0o755)
        self.path = f"{self._dir}/notify"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(self.path)
        os.chmod(self.path, 0o777)
        self.messages: list[str] = []

    def __enter__(self) -> Self:
        threading.Thread(target=self._read, daemon=True).start()
        return self

    def _read(self) -> None:
        while True:
            message = self._socket.recv(65536)
            if message == b"end":
                return
            self.messages.append(message.decode())

    def __exit__(self, *_: object) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as own:
            own.sendto(b"end", self.path)
        self._socket.close()
        shutil.rmtree(self._dir, ignore_errors=True)

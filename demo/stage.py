# SPDX-License-Identifier: GPL-2.0-or-later
"""What the demonstration stands on: its guests, its daemon, the host's settings; and putting all of it back."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from demo.guests import Guest, Lab, Seen, wait_for
from demo.measure import Clock
from rtpind.core.cpuset import CpuSet
from rtpind.ctl import show

PREFIX = "rtpind-demo"
RT_RUNTIME = Path("/proc/sys/kernel/sched_rt_runtime_us")
FIFO_RESET = os.SCHED_FIFO | os.SCHED_RESET_ON_FORK
PERIOD_S = 1
#: Ends a child when its parent dies without a chance to clean up.
DIE_WITH_ME = ("setpriv", "--pdeathsig", "KILL")
_LOCK = Path("/run/rtpind/lock")
_PROGRAMS = ("virsh", "qemu-system-x86_64", "setpriv", "taskset", "pgrep")
_BIN = Path(sys.executable).parent
_UNIT = Path(__file__).resolve().parent.parent / "systemd/rtpind.service"


class Interrupted(BaseException):
    """Ctrl-C, or another signal that ends the run."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class Interrupts:
    """Turns signals into :class:`Interrupted`, but never between taking something and knowing how to give it back."""

    def __init__(self) -> None:
        self._held = 0
        self._counting = threading.Lock()  # guests may be started by several threads
        self._pending = 0
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._arrived)

    def _arrived(self, number: int, _frame: FrameType | None) -> None:
        if self._held:
            self._pending = number
        else:
            raise Interrupted(number)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Delay them until the block is left."""
        with self._counting:
            self._held += 1
        try:
            yield
        finally:
            with self._counting:
                self._held -= 1
        if self._pending and not self._held:
            raise Interrupted(self._pending)

    def hold(self) -> None:
        """Delay them for good: from here on everything is put back."""
        self._held += 1


@dataclass
class Stage:
    """Everything the steps share. What is taken goes onto ``undo``, in the order of taking."""

    undo: contextlib.ExitStack
    interrupts: Interrupts
    prefix: str = PREFIX
    claims: dict[str, bool] = field(default_factory=dict)
    before: dict[int, Seen] = field(default_factory=dict)
    classes: dict[str, str] = field(default_factory=dict)
    fifo: bool = True
    lab: Lab | None = None
    dir: Path = Path("/nonexistent")
    rt: Guest = field(init=False)
    clock: Clock = field(init=False)

    def __post_init__(self) -> None:
        cpus = sorted(os.sched_getaffinity(0))
        spare = 2 if len(cpus) > 3 else 1
        self.all = frozenset(cpus)
        self.realtime = frozenset(cpus[-spare:])
        self.housekeeping = self.all - self.realtime

    def set_up(self) -> None:
        """Make the files and connect to libvirt."""
        with self.interrupts.held():
            self.dir = Path(tempfile.mkdtemp(prefix=f"{self.prefix}-", dir="/dev/shm"))
            self.undo.callback(shutil.rmtree, self.dir, ignore_errors=True)
            self.lab = self.undo.enter_context(Lab(self.prefix))

    @property
    def state(self) -> Path:
        """Where rtpind keeps originals, its lock and its socket."""
        return self.dir / "state"

    @property
    def policy(self) -> Path:
        """The policy file."""
        return self.dir / "policy.yaml"

    @property
    def log(self) -> Path:
        """What rtpind wrote to stderr."""
        return self.dir / "records"

    @property
    def guests(self) -> list[Guest]:
        """The guests of this run; nothing else is ever touched."""
        return list(self.lab.guests.values()) if self.lab else []

    def start(self, name: str, **wanted: Any) -> Guest:
        """Start one of them."""
        assert self.lab is not None
        with self.interrupts.held():
            return self.lab.start(name, **wanted)

    def spawn(self, *words: str, log: Path | None = None) -> subprocess.Popen[bytes]:
        """Start a process that ends with this one, whatever ends that."""
        with self.interrupts.held(), open(log or os.devnull, "wb") as output:
            process = subprocess.Popen(
                [*DIE_WITH_ME, *words], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=output
            )
            self.undo.callback(end, process)
        return process

    def start_daemon(self) -> subprocess.Popen[bytes]:
        """Start rtpind on :attr:`policy`, as nice as its unit has it; its records go to a file."""
        (nice,) = re.findall(r"^Nice=(.*)$", _UNIT.read_text(), re.MULTILINE)
        words = ("--config", str(self.policy), "--state-dir", str(self.state), "--stderr")
        daemon = self.spawn("nice", "-n", nice, str(_BIN / "rtpind"), *words, log=self.log)
        wait_for(lambda: "connected to libvirt" in self.log.read_text() or daemon.poll() is not None, "rtpind is up")
        if daemon.poll() is not None:
            raise RuntimeError(f"rtpind ended with {daemon.returncode}: {self.log.read_text().strip()}")
        return daemon

    def rtpinctl(self, *words: str) -> int:
        """Show a command and its output; return its exit code."""
        show.line(f"$ rtpinctl {' '.join(words)}")
        sys.stdout.flush()
        return subprocess.run([str(_BIN / "rtpinctl"), *words, "--state-dir", str(self.state)], check=False).returncode

    def quietly(self, *words: str) -> bool:
        """Run rtpinctl without showing it; return whether it went well."""
        command = [str(_BIN / "rtpinctl"), *words, "--state-dir", str(self.state)]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0

    def passes(self, count: int) -> None:
        """Wait until rtpind has looked at everything that many times more."""

        def made() -> int:
            command = [str(_BIN / "rtpinctl"), "status", "--json", "--state-dir", str(self.state)]
            done = subprocess.run(command, capture_output=True, check=True)
            return int(json.loads(done.stdout)["daemon"]["passes"])

        target = made() + count
        wait_for(lambda: made() >= target, f"{count} more passes")

    def run(self, *words: str) -> None:
        """Show and run another command. Raises CalledProcessError with its complaint."""
        show.line(f"$ {' '.join(words)}")
        subprocess.run(words, capture_output=True, text=True, check=True)

    def claim(self, text: str, *, true: bool) -> None:
        """Write down whether something that was shown is so, as the kernel tells it."""
        self.claims[text] = self.claims.get(text, True) and true
        show.line(f"  {'ok' if true else 'FAILED'}: {text}")

    def records(self) -> list[str]:
        """Return what rtpind wrote down, one record a line."""
        return self.log.read_text().splitlines() if self.log.exists() else []

    def allow_fifo(self, tid: int) -> None:
        """Have FIFO possible in libvirt's cgroups for the time of the run, where that is safe."""
        runtime = RT_RUNTIME.read_text().strip()
        if _takes_fifo(tid):
            self.fifo = runtime != "-1" or _fair_server()
            if not self.fifo:
                show.line("No RT throttling and no fair server: rtpind withholds FIFO here unless told otherwise.")
        elif _fair_server():
            show.line(
                "This kernel has RT_GROUP_SCHED: without a budget no thread of a guest gets SCHED_FIFO. For the time "
                f"of this run kernel.sched_rt_runtime_us is -1 (was {runtime}; put back at the end)."
            )
            show.line("")
            with self.interrupts.held():
                RT_RUNTIME.write_text("-1")
                self.undo.callback(RT_RUNTIME.write_text, runtime)
        else:
            self.fifo = False
            show.line(
                "This kernel has RT_GROUP_SCHED and no fair server: SCHED_FIFO cannot be had safely, so this shows "
                "pCPUs only."
            )
            show.line("")


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process: gently, then not."""
    process.terminate()
    try:
        process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(timeout=10)


def refusal(prefix: str = PREFIX) -> str:
    """Return why there can be no demonstration (or benchmark) here; "" when there can."""
    if os.geteuid() != 0:
        return "this needs root: it starts guests and moves their threads"
    missing = [program for program in _PROGRAMS if shutil.which(program) is None]
    if missing:
        return f"not installed: {', '.join(missing)} (make demo and make bench install them on Debian)"
    if len(os.sched_getaffinity(0)) < 2:
        return "this needs two pCPUs: one for the vCPU and one for everything else"
    if _service_runs():
        return "an rtpind service enforces on this host and two would fight; stop it first (systemctl stop rtpind)"
    done = subprocess.run(
        ["virsh", "-q", "-c", "qemu:///system", "list", "--name", "--all"], capture_output=True, text=True, check=False
    )
    if done.returncode:
        return f"libvirt does not answer on qemu:///system: {done.stderr.strip()}"
    left = [name for name in done.stdout.split() if name.startswith(prefix + "-")]
    if left:
        return (
            f"guests of another such run are there; if it was killed: {'; '.join('virsh destroy ' + n for n in left)}"
        )
    return ""


def _service_runs() -> bool:
    if Path("/run/systemd/system").exists():
        words = ["systemctl", "is-active", "--quiet", "rtpind"]
        if subprocess.run(words, capture_output=True, check=False).returncode == 0:
            return True
    with contextlib.suppress(FileNotFoundError), open(_LOCK, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _takes_fifo(tid: int) -> bool:
    """Try on a thread of an own guest."""
    try:
        os.sched_setscheduler(tid, FIFO_RESET, os.sched_param(1))
    except PermissionError:
        return False
    os.sched_setscheduler(tid, os.SCHED_OTHER, os.sched_param(0))
    return True


def _fair_server() -> bool:
    """Return whether the kernel keeps 5 % of each pCPU for threads that are not realtime (Linux 6.12 and later)."""
    version = re.match(r"(\d+)\.(\d+)", platform.release())
    if version is None or (int(version[1]), int(version[2])) < (6, 12):
        return False
    for runtime in Path("/sys/kernel/debug/sched/fair_server").glob("cpu*/runtime"):
        with contextlib.suppress(OSError):
            if int(runtime.read_text()) == 0:
                return False
    return True


def cpus_text(cpus: frozenset[int]) -> str:
    """Return ``0-1,4``."""
    return str(CpuSet(cpus))

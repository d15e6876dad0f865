# SPDX-License-Identifier: GPL-2.0-or-later
"""Who is compared: nothing, libvirt's own <cputune>, a hook script, a subscriber, a poller, TuneD, and rtpind.

Each is told the same place for the same guests (those whose names begin with the run's prefix), and touches no other.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from bench.guests import Place
from bench.rivals import HOOK
from demo.guests import RUN_DIR, wait_for
from demo.stage import Stage, end

HOOK_FILE = Path("/etc/libvirt/hooks/qemu")
_MARK = "# Installed by a benchmark of rtpind, for the time of its run, by process"
_PROFILE = "rtpind-benchmark"
_POLICY = """\
version: 1
mode: enforce
pools: {{housekeeping: "{helpers}", realtime: "{vcpus}"}}
classes:
  benchmark:
    vcpu: {{pool: realtime{vcpu}}}
    emulator: {{pool: housekeeping}}
guests:
  - {{name: "{prefix}-*", class: benchmark}}
drift: repair
"""

#: Yields the pid of the contender's process; 0 when it has none.
Running = AbstractContextManager[int]


@dataclass(frozen=True, slots=True)
class Contender:
    """One of them. ``run`` starts it and ends it; ``lacks`` says why it cannot take part here ("": it can)."""

    name: str
    text: str
    run: Callable[[Stage, Place], Running]
    lacks: Callable[[], str] = lambda: ""
    cputune: bool = False  # the guest's definition says where it should be
    process: bool = True  # something of it runs all the time


@contextlib.contextmanager
def _nobody(_stage: Stage, _place: Place) -> Iterator[int]:
    yield 0


@contextlib.contextmanager
def _hook(stage: Stage, place: Place) -> Iterator[int]:
    called = stage.dir / "hook-called"
    script = HOOK.format(
        mark=_MARK,
        harness=os.getpid(),
        prefix=stage.prefix,
        called=called,
        run_dir=RUN_DIR,
        vcpus=_list(place.vcpus),
        helpers=_list(place.helpers),
        fifo=place.fifo,
    )
    with stage.interrupts.held():
        stage.undo.callback(remove_hook)
        HOOK_FILE.parent.mkdir(parents=True, exist_ok=True)
        with open(HOOK_FILE, "x") as file:  # never over one that is there
            os.fchmod(file.fileno(), 0o755)
            file.write(script)
    try:
        _look_for_hooks()
        yield 0
        if not called.exists():
            raise RuntimeError("libvirt did not call the hook script")
    finally:
        called.unlink(missing_ok=True)
        remove_hook()
        _look_for_hooks()


def _look_for_hooks() -> None:
    """Have libvirt notice that a hook came or went: it looks when it starts and on SIGHUP, and does not say when."""
    for name in ("libvirtd", "virtqemud"):
        done = subprocess.run(["pgrep", "-x", name], capture_output=True, text=True, check=False)
        for pid in done.stdout.split():
            os.kill(int(pid), signal.SIGHUP)
    time.sleep(1)


def remove_hook() -> None:
    """Remove the hook script, if it is a benchmark's own."""
    if _hook_is_ours():
        HOOK_FILE.unlink()


def _hook_is_ours() -> bool:
    return HOOK_FILE.is_file() and _MARK in HOOK_FILE.read_text(errors="replace")


def _lacks_hook() -> str:
    if HOOK_FILE.exists() and not _hook_is_ours():
        return f"{HOOK_FILE} is there and stays as it is"
    return ""


def _rival(kind: str) -> Callable[[Stage, Place], Running]:
    @contextlib.contextmanager
    def run(stage: Stage, place: Place) -> Iterator[int]:
        log = stage.dir / kind
        words = (kind, stage.prefix, _list(place.vcpus), _list(place.helpers), str(place.fifo))
        with _process(stage, sys.executable, "-m", "bench.rivals", *words, log=log) as process:
            wait_for(lambda: "ready" in log.read_text() or process.poll() is not None, f"the {kind} is ready", 30)
            if process.poll() is not None:
                raise RuntimeError(f"the {kind} ended: {log.read_text()}")
            yield process.pid

    return run


@contextlib.contextmanager
def _tuned(stage: Stage, place: Place) -> Iterator[int]:
    """Run the TuneD daemon, without D-Bus, on a profile with one scheduler rule; what it writes to disk is its own.

    A rule matches a process's command line: TuneD cannot tell a vCPU from the guest's other threads.
    """
    profile = stage.dir / "tuned" / _PROFILE
    profile.mkdir(parents=True, exist_ok=True)
    mask = sum(1 << cpu for cpu in place.vcpus)
    scheduler = f"f:{place.fifo}" if place.fifo else "*:0"
    rule = f"group.guests=0:{scheduler}:{mask:x}:.*guest={stage.prefix}-.*"
    (profile / "tuned.conf").write_text(f"[scheduler]\n{rule}\n")
    script = (
        'cp -a /etc/tuned/. "$1" && mount --bind "$1" /etc/tuned && '
        "mkdir -p /run/tuned && mount -t tmpfs tmpfs /run/tuned && exec tuned --no-dbus --no-socket --profile $2"
    )
    log = stage.dir / "tuned.log"
    words = ("unshare", "--mount", "sh", "-c", script, "sh", str(profile.parent), _PROFILE)
    with _process(stage, *words, log=log) as process:
        wait_for(
            lambda: "applied" in log.read_text() or process.poll() is not None, "TuneD has applied its profile", 60
        )
        if process.poll() is not None:
            raise RuntimeError(f"TuneD ended: {log.read_text()[-500:]}")
        yield process.pid


def _lacks_tuned() -> str:
    if shutil.which("tuned") is None:
        return "TuneD is not installed (apt-get install tuned)"
    running = ["pgrep", "-f", "^[^ ]*python[^ ]* .*/tuned( |$)"]
    if subprocess.run(running, capture_output=True, check=False).returncode == 0:
        return "a TuneD daemon of this host's runs already"
    perf = subprocess.run(["/usr/bin/python3", "-c", "import perf"], capture_output=True, check=False)
    return "its scheduler plugin needs the kernel's perf module for Python" if perf.returncode else ""


@contextlib.contextmanager
def _rtpind(stage: Stage, place: Place) -> Iterator[int]:
    vcpu = f", exclusive: thread, scheduler: fifo, priority: {place.fifo}" if place.fifo else ""
    stage.policy.write_text(
        _POLICY.format(helpers=_list(place.helpers), vcpus=_list(place.vcpus), vcpu=vcpu, prefix=stage.prefix)
    )
    daemon = stage.start_daemon()
    try:
        yield daemon.pid
    finally:
        end(daemon)


@contextlib.contextmanager
def _process(stage: Stage, *words: str, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    process = stage.spawn(*words, log=log)
    try:
        yield process
    finally:
        end(process)


def _list(cpus: frozenset[int]) -> str:
    return ",".join(map(str, sorted(cpus)))


ALL = (
    Contender("nothing", "libvirt as it is", _nobody, process=False),
    Contender("<cputune>", "vcpupin, emulatorpin, iothreadpin and vcpusched in the guest's definition", _nobody,
              cputune=True, process=False),
    Contender("hook script", "taskset and chrt from /etc/libvirt/hooks/qemu at 'started'", _hook, _lacks_hook,
              process=False),
    Contender("subscriber", "a program that pins every thread once when libvirt says STARTED", _rival("subscriber")),
    Contender("poller", "a program that pins every thread of every guest once a second", _rival("poller")),
    Contender("TuneD", "its scheduler plugin, with a rule for QEMU's command line; it cannot tell threads apart",
              _tuned, _lacks_tuned),
    Contender("rtpind", "this tree, with the period and the niceness it ships with (10 s, -10)", _rtpind),
)  # fmt: skip


def cputune(place: Place, vcpus: int, iothreads: int) -> str:
    """Return what <cputune> says for a place; <vcpusched> only for guests whose vCPUs should be FIFO."""
    cpus, helpers = _list(place.vcpus), _list(place.helpers)
    lines = [f"<vcpupin vcpu='{number}' cpuset='{cpus}'/>" for number in range(vcpus)]
    lines += [f"<emulatorpin cpuset='{helpers}'/>"]
    lines += [f"<iothreadpin iothread='{number}' cpuset='{helpers}'/>" for number in range(1, iothreads + 1)]
    if place.fifo:
        lines += [f"<vcpusched vcpus='0-{vcpus - 1}' scheduler='fifo' priority='{place.fifo}'/>"]
    return "".join(lines)

# SPDX-License-Identifier: GPL-2.0-or-later
"""What a pass costs on up to 1000 guests of 8 threads, beside a bare loop that makes the same reads and calls.

``python -m bench.scale``; root, for cgroups of its own. The guests are stand-ins (:mod:`bench.standins`), the passes
are those of the daemon. The first full pass places every thread: it finds, writes the ledger, moves, and reads back.
The verify pass finds everybody on its place, identity included. Records are made and thrown away. The bare loop makes
sense of nothing; reading the facts of the host is in the daemon's time alone.
"""

from __future__ import annotations

import argparse
import fcntl
import gc
import os
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import linear_regression, median

from bench.standins import StandIns
from rtpind.core.identify import SETTLE_S
from rtpind.core.memory import Memory
from rtpind.core.policyfile import load
from rtpind.daemon.observe import Observer
from rtpind.daemon.reconcile import Reconciler
from rtpind.host.ledgerfile import LedgerFile

_CPU = min(os.sched_getaffinity(0))
POLICY = f"""
version: 1
mode: enforce
pools: {{housekeeping: "{_CPU}"}}
classes: {{c: {{vcpu: {{pool: housekeeping}}, emulator: {{pool: housekeeping}}}}}}
guests: [{{name: "standin-*", class: c}}]
"""
_LOCK = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
_OLD_S = SETTLE_S + 0.5  # then a guest is not young any more: no vCPU is waited for


def read(path: str) -> bytes:
    """Return what is in a small file."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(fd, 4096)
    finally:
        os.close(fd)


class Bare:
    """The reads and calls of a pass, and nothing else. What a thread is, and which cgroup is a guest's, is known."""

    def __init__(self, standins: StandIns, observer: Observer) -> None:
        seen = observer.look(standins.domains, Memory())
        self.everybody = [thread.id.tid for thread in seen.threads()]
        self.guests = []
        for guest in seen.guests:
            named = {thread.id.tid for thread in guest.threads if thread.index is not None}
            home = observer.cgroups.of(guest.pid, guest.pid)
            controller = next(name for name in ("cpuset", "cpu", "") if home.paths.get(name, "/") != "/")
            members = observer.cgroups.mounts[controller] + home.paths[controller]
            members += "/tasks" if controller else "/cgroup.threads"
            self.guests.append((f"{standins.dir}/{guest.name}.pid", guest.pid, named, members))

    def look(self) -> None:
        """Make the reads of a look."""
        os.listdir("/proc")
        for pidfile, pid, named, members in self.guests:
            fd = os.open(pidfile, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            fcntl.fcntl(fd, fcntl.F_GETLK, _LOCK)
            os.close(fd)
            read(f"/proc/{pid}/task/{pid}/stat")
            read(f"/proc/{pid}/task/{pid}/cgroup")
            for name in os.listdir(f"/proc/{pid}/task"):
                tid = int(name)
                read(f"/proc/{pid}/task/{tid}/stat")
                if tid in named:
                    read(f"/proc/{pid}/task/{tid}/cgroup")
                os.sched_getscheduler(tid)
                os.sched_getaffinity(tid)
            read(members)

    def place(self, ledger: bytes, path: Path) -> None:
        """Make the calls of a first pass, after its look: the ledger, and each step with proof and read-back."""
        path.write_bytes(ledger)
        for _, pid, *_ in self.guests:
            for name in os.listdir(f"/proc/{pid}/task"):
                tid = int(name)
                read(f"/proc/{pid}/task/{tid}/stat")
                os.sched_setaffinity(tid, {_CPU})
                read(f"/proc/{tid}/stat")
                os.sched_getscheduler(tid)
                os.sched_getaffinity(tid)


class Bench:
    """One number of stand-ins, and the daemon's passes over them."""

    def __init__(self, standins: StandIns, scratch: Path) -> None:
        self.standins = standins
        self.scratch = scratch
        self.mask = os.sched_getaffinity(0)
        self.bare = Bare(standins, Observer(run_dir=standins.dir))
        self.reconciler = self.fresh()

    def fresh(self) -> Reconciler:
        """Return a daemon that has seen the host and no guest yet, and put every thread back."""
        for tid in self.bare.everybody:
            os.sched_setaffinity(tid, self.mask)
        observer = Observer(run_dir=self.standins.dir)
        observer.look({}, Memory())
        made = Reconciler(observer, LedgerFile(self.scratch), lambda _record: None)
        made.policy, problems = load(POLICY, observer.host())
        assert made.policy is not None, problems
        made.domains = self.standins.domains
        return made

    def first(self) -> None:
        """Place everybody."""
        view = self.reconciler.run()
        assert len(view.plan.steps) == len(self.bare.everybody)

    def verify(self) -> None:
        """Find everybody in place."""
        assert self.reconciler.run().plan.steps == ()

    def bare_first(self) -> None:
        """Do what the first pass asks of the kernel."""
        self.bare.look()
        self.bare.place(self.ledger, self.scratch / "bare.json")

    def bare_verify(self) -> None:
        """Do what the verify pass asks of the kernel."""
        self.bare.look()

    def measure(self, rounds: int) -> dict[str, tuple[list[float], list[float]]]:
        """Return for each kind of pass the milliseconds of CPU time of the daemon and of the bare loop, interleaved."""
        found: dict[str, tuple[list[float], list[float]]] = {"first": ([], []), "verify": ([], [])}
        for _ in range(rounds):
            self.reconciler = self.fresh()
            found["first"][0].append(taken(self.first))
            self.ledger = (self.scratch / "ledger.json").read_bytes()
            self.fresh()
            found["first"][1].append(taken(self.bare_first))
        for _ in range(3):
            self.verify()
        for _ in range(2 * rounds):
            found["verify"][0].append(taken(self.verify))
            found["verify"][1].append(taken(self.bare_verify))
        return found


def taken(what: Callable[[], object]) -> float:
    """Return the milliseconds of CPU time that something takes: others run on this machine."""
    gc.collect()
    began = time.process_time()
    what()
    return (time.process_time() - began) * 1000


def told(values: Sequence[float]) -> str:
    """Return ``median (min–max)``."""
    return f"{median(values):.1f} ({min(values):.1f}–{max(values):.1f})"


def opened(what: Callable[[], object]) -> int:
    """Return how many files and directories something opens."""
    count, counting = 0, True

    def hook(event: str, _: object) -> None:
        nonlocal count
        count += counting and event in ("open", "os.listdir")

    sys.addaudithook(hook)  # for ever: measure first
    what()
    counting = False
    return count


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--guests", type=int, nargs="+", default=[10, 100, 300, 1000])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    print("CPU time in ms, median (min–max); rtpind beside a bare loop of the same reads and calls, interleaved")
    medians: dict[str, list[float]] = {}
    for count in options.guests:
        with StandIns(count) as standins, tempfile.TemporaryDirectory(dir="/run") as scratch:
            time.sleep(_OLD_S)
            bench = Bench(standins, Path(scratch))
            for name, (ours, bare) in bench.measure(options.rounds).items():
                ratio = median(ours) / median(bare)
                print(
                    f"{count:5} guests, {name:6}  {told(ours):28}  bare {told(bare):28}  ratio {ratio:.2f}", flush=True
                )
                medians.setdefault(name, []).append(median(ours))
            if count == options.guests[-1]:
                print(f"files opened by a verify pass: {opened(bench.verify)}, bare {opened(bench.bare_verify)}")
    for name, values in medians.items():
        if len(values) > 1:
            slope, base = linear_regression(options.guests, values)
            worst = max(abs(value - base - slope * count) for count, value in zip(options.guests, values, strict=True))
            print(f"{name}: {base:.1f} ms + {slope * 1000:.0f} us for each guest; off by {worst:.1f} ms at most")


if __name__ == "__main__":
    main()

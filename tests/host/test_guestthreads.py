# SPDX-License-Identifier: GPL-2.0-or-later
"""What is kept of a guest between looks is what would be read anew."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import pytest
from trees import PF_KTHREAD, PF_USER_WORKER, V1, V2, make_tree, process, stat_line

from rtpind.core.model import ThreadId
from rtpind.core.offplace import Start, Starts
from rtpind.host.cgroup import Cgroups
from rtpind.host.guestthreads import GuestThreads
from rtpind.host.proc import Proc

PID, SCOPE = 1000, "/machine.slice/rt.scope/libvirt"
COMMS = ["CPU 0/KVM", "CPU 1/KVM", "IO iothread1", "IO mon_iothread", "worker", "vhost-1000", "kvm-pit/1000"]


class Host:
    """A fake tree whose threads change; their affinity and policy, which are system calls, are kept beside it."""

    def __init__(self, root: Path, random: Random, mountinfo: str) -> None:
        self.root, self.random = root, random
        self.version1 = mountinfo == V1
        self.allowed: dict[int, set[int]] = {}
        self.policies: dict[int, int] = {}
        self.start = 500
        self.stats: dict[int, dict[str, Any]] = {PID: {"comm": "qemu-system-x86"}}
        self.leaves = {PID: "emulator"}
        self.others: set[int] = set()
        make_tree(root, {"proc/self/mountinfo": mountinfo})
        self.proc = Proc(root, affinity=lambda tid: self.allowed.get(tid, {0, 1}), scheduler=self.scheduler)
        self.kept = GuestThreads(self.proc, Cgroups(root))

    def scheduler(self, tid: int) -> int:
        return self.policies.get(tid, 0)

    def change(self) -> None:
        """Change something about one thread, its number's next owner included."""
        random = self.random
        tid = random.choice([PID, *range(1001, 1008)])
        what = random.choice(["stat", "leaf", "affinity", "policy", "end", "other", "restart"])
        if what == "stat" or tid not in self.stats:
            self.stats[tid] = {
                "comm": random.choice(COMMS) if tid != PID else "qemu-system-x86",
                "flags": random.choice([0, 0, PF_USER_WORKER, PF_KTHREAD]),
                "start": random.choice([500, 500, 60_000]),
                "priority": random.choice([0, 1]),
                "policy": random.choice([0, 1]),
            }
            self.leaves.setdefault(tid, "emulator")
        elif what == "leaf":
            self.leaves[tid] = random.choice(["emulator", "emulator", "vcpu0", "iothread1"])
        elif what == "affinity":
            self.allowed[tid] = set(random.sample(range(4), 2))
        elif what == "policy":
            self.policies[tid] = random.choice([0, 1, 0x40000001])
        elif what == "end" and tid != PID:
            del self.stats[tid], self.leaves[tid]
            self.others.discard(tid)
        elif what == "other" and tid != PID:
            self.others ^= {tid}
        elif what == "restart":
            self.start += 1

    def write(self) -> None:
        for old in (self.root / "proc").glob("1*"):
            for path in sorted(old.rglob("*"), reverse=True):
                path.unlink() if path.is_file() else path.rmdir()
        self.stats[PID]["start"] = self.start
        own = {tid: stat_line(tid, **stat) for tid, stat in self.stats.items() if tid not in self.others}
        groups = {tid: self.groups(leaf) for tid, leaf in self.leaves.items()}
        files = process(PID, own, groups)
        for tid in own:
            files[f"proc/{PID}/task/{tid}/schedstat"] = f"{self.random.choice([5, 6])} 0 0\n"
        for tid in self.others:
            files |= process(tid, {tid: stat_line(tid, **self.stats[tid])}, groups)
        members = "".join(f"{tid}\n" for tid, leaf in self.leaves.items() if leaf == "emulator")
        where = f"sys/fs/cgroup/cpuset{SCOPE}/emulator/tasks" if self.version1 else (
            f"sys/fs/cgroup{SCOPE}/emulator/cgroup.threads"
        )  # fmt: skip
        make_tree(self.root, files | {where: members})

    def groups(self, leaf: str) -> str:
        path = f"{SCOPE}/{leaf}"
        return f"2:cpuset:{path}\n1:cpu,cpuacct:{path}\n" if self.version1 else f"0::{path}\n"


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("mountinfo", [V1, V2], ids=["version 1", "version 2"])
def test_what_is_kept_is_what_would_be_read(tmp_path: Path, seed: int, mountinfo: str) -> None:
    """Whatever changes between two looks, in what /proc shows, in system calls, or in time."""
    host = Host(tmp_path, Random(seed), mountinfo)
    uptime = 595.0
    for _ in range(25):
        for _ in range(host.random.randint(0, 3)):
            host.change()
        host.write()
        host.proc.kernel_threads.scan()
        uptime += host.random.choice([0.1, 5.0])
        over = [ThreadId(PID, host.start, tid, 500) for tid in (1001, 1002)]
        starts: Starts = {(PID, host.start): Start(over=dict.fromkeys(over))} if host.random.randrange(2) else {}
        fresh = GuestThreads(host.proc, Cgroups(tmp_path)).look(PID, uptime, starts)
        assert host.kept.look(PID, uptime, starts) == fresh


def test_a_thread_that_is_as_it_was_stays_the_same_object(tmp_path: Path) -> None:
    """So does one that has run since; of one that has changed, and of a guest that was forgotten, all is made anew."""
    host = Host(tmp_path, Random(0), V2)
    host.stats[1001] = {"comm": "worker"}
    host.leaves[1001] = "emulator"

    def look() -> list[Any]:
        host.write()
        found = host.kept.look(PID, 1000.0)
        assert found is not None
        return found[1]

    before = look()
    assert [a is b for a, b in zip(before, look(), strict=True)] == [True, True]
    path = tmp_path / f"proc/{PID}/task/1001/stat"
    path.write_bytes(path.read_bytes().replace(b" S 1 0 0", b" R 1 0 9"))
    found = host.kept.look(PID, 1000.0)
    assert found is not None
    assert [a is b for a, b in zip(before, found[1], strict=True)] == [True, True]
    host.allowed[1001] = {3}
    assert [a is b for a, b in zip(before, look(), strict=True)] == [True, False]
    host.kept.keep({PID})
    assert look()[0] is before[0]
    host.kept.keep(set())
    assert look()[0] is not before[0]

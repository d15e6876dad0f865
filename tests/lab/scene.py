# SPDX-License-Identifier: GPL-2.0-or-later
"""What a scenario works with: the installed product, a policy, guests, and what the kernel and the journal say."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from lab.channel import ChannelError
from lab.host import ROOT, Done, LabHost

FIFO_RESET = 0x40000001
OTHER = 0

POLICY = """\
version: 1
mode: {mode}
pools:
  realtime: {pool}
classes:
  realtime:
    vcpu: {{pool: realtime, exclusive: thread, scheduler: fifo, priority: 1}}
    emulator: {{pool: housekeeping}}
  dedicated:
    vcpu: {{pool: realtime, exclusive: thread}}
    emulator: {{pool: housekeeping}}
guests:
{rules}
drift: {drift}
daemon: {{period: {period}}}
"""


def policy(
    *rules: tuple[str, str],
    mode: str = "enforce",
    pool: str = "isolated",
    drift: str = "repair",
    period: str = "2s",
    more: str = "",
) -> str:
    """Return a policy with rules (glob of names, class); ``pool`` is where vCPUs go: a CPU list, or all of a pool."""
    lines = "\n".join(f"  - {{name: {name!r}, class: {class_}}}" for name, class_ in rules)
    pool = pool if pool.startswith("{") else repr(pool)
    return POLICY.format(mode=mode, pool=pool, rules=lines or "  []", drift=drift, period=period) + more


#: pCPUs, policy with RESET_ON_FORK, priority: what rtpind may change.
Place = tuple[tuple[int, ...], int, int]


@dataclass(frozen=True, slots=True)
class Thread:
    """One thread as the kernel shows it."""

    tid: int
    comm: str
    cpus: tuple[int, ...]
    policy: int
    priority: int
    start: int
    cgroup: str

    @property
    def fifo(self) -> bool:
        """Whether it is SCHED_FIFO."""
        return self.policy & 0xFF == 1

    @property
    def vcpu(self) -> bool:
        """Whether it is a vCPU."""
        return self.comm.startswith("CPU ")

    @property
    def place(self) -> Place:
        """What rtpind may change."""
        return self.cpus, self.policy, self.priority


class Guest:
    """A nested guest."""

    def __init__(self, host: LabHost, name: str, uuid: str, pid: int) -> None:
        self.host = host
        self.name = name
        self.uuid = uuid
        self.pid = pid

    def threads(self) -> list[Thread]:
        """Return the threads of its QEMU and its kernel threads."""
        found = self.host.call("threads", pid=self.pid)
        return [Thread(**{**thread, "cpus": tuple(thread["cpus"])}) for thread in found]

    def vcpus(self) -> list[Thread]:
        """Return its vCPU threads in the order of their numbers."""
        found = [thread for thread in self.threads() if thread.vcpu]
        return sorted(found, key=lambda thread: int(thread.comm.split()[1].partition("/")[0]))

    def helpers(self) -> list[Thread]:
        """Return all its other threads."""
        return [thread for thread in self.threads() if not thread.vcpu]

    def virsh(self, words: str, *, check: bool = True) -> Done:
        """Run virsh; ``{}`` in ``words`` stands for the guest's name."""
        return self.host.run(f"virsh -q {words.format(self.name)}", check=check)

    def define(self) -> None:
        """Make it persistent, which it is not."""
        self.host.run(
            f"virsh -q dumpxml {self.name} >/var/tmp/{self.name}.xml && virsh -q define /var/tmp/{self.name}.xml"
        )

    def destroy(self) -> None:
        """End it."""
        self.host.call("destroy", names=[self.name])

    def places(self) -> dict[int, Place]:
        """Return tid → place, but for QEMU's workers, which come and go."""
        return {thread.tid: thread.place for thread in self.threads() if thread.comm != "worker"}

    def moved(self, before: Mapping[int, Place]) -> list[tuple[Thread, Place]]:
        """Return every thread whose place is another than before."""
        return [(now, before[now.tid]) for now in self.threads() if before.get(now.tid, now.place) != now.place]


class Scene:
    """One scenario's view of a lab host."""

    def __init__(self, host: LabHost) -> None:
        self.host = host
        self.run = host.run
        self.wait_for = host.wait_for
        self.isolated = cpus(host.shape.isolated)
        total = int(host.shape.smp.split(",")[0])
        self.housekeeping = tuple(cpu for cpu in range(total) if cpu not in self.isolated)
        self._cursor = self._now()

    def _now(self) -> str:
        return self.run("journalctl -n0 --show-cursor -q").out.strip().removeprefix("-- cursor: ")

    # --- the product ------------------------------------------------------------------------------------------

    def write_policy(self, text: str) -> None:
        """Replace /etc/rtpind.yaml."""
        self.host.push({"etc/rtpind.yaml": text})

    def start(self, text: str | None = None) -> None:
        """Start rtpind and wait until it knows who runs."""
        if text is not None:
            self.write_policy(text)
        seen = self.count("connected to libvirt")
        self.run("systemctl start rtpind")
        self.wait_for(lambda: self.count("connected to libvirt") > seen, "rtpind has connected to libvirt")

    def ctl(self, *words: str) -> Done:
        """Run rtpinctl."""
        return self.run(["rtpinctl", *words], check=False)

    def ctl_json(self, *words: str) -> Any:
        """Run rtpinctl --json and return its document."""
        done = self.ctl(*words, "--json")
        assert done.out.strip(), str(done)
        return json.loads(done.out)

    def wait_verified(self, timeout_s: float = 300.0) -> None:
        """Wait until ``rtpinctl verify`` is content."""
        last: list[Done] = []

        def content() -> bool:
            last[:] = [self.ctl("verify")]
            return last[0].code == 0

        try:
            self.wait_for(content, "rtpinctl verify exits 0", timeout_s)
        except TimeoutError as error:
            raise TimeoutError(f"{error}\n{last[0]}") from None

    def read_shipped_policy(self) -> str:
        """Return the policy file as it ships."""
        return (ROOT / "etc/rtpind.yaml").read_text()

    def status(self) -> dict[str, Any]:
        """Return the daemon's own document of ``rtpinctl status``; one that is busy is asked again."""
        found: dict[str, Any] = {}

        def answered() -> bool:
            try:
                found.update(self.host.call("status"))
            except ChannelError as error:
                if "the daemon is busy" not in str(error):
                    raise
            return bool(found)

        self.host.wait_for(answered, "the daemon answers")
        return found

    def fact(self, name: str) -> dict[str, Any]:
        """Return one of the facts of the host in the header of ``rtpinctl status``."""
        (found,) = [fact for fact in self.status()["host"]["facts"] if fact["name"] == name]
        return dict(found)

    def verdicts(self, guest: Guest) -> list[dict[str, Any]]:
        """Return what ``rtpinctl status`` says of a guest's threads."""
        found = [found for found in self.status()["guests"] if found["name"] == guest.name]
        return list(found[0]["threads"]) if found else []

    def verdict(self, guest: Guest, role: str) -> set[str]:
        """Return the verdicts of a guest's threads of a role."""
        return {str(thread["verdict"]) for thread in self.verdicts(guest) if thread["role"] == role}

    def whys(self, guest: Guest) -> list[str]:
        """Return why threads of a guest are not ok."""
        return [str(thread["why"]) for thread in self.verdicts(guest) if thread["verdict"] != "ok"]

    def pid(self) -> int:
        """Return rtpind's pid by systemd; 0 when it does not run."""
        return int(self.run("systemctl show -P MainPID rtpind").out)

    def passes(self, count: int = 2) -> None:
        """Wait until the daemon has made that many further full passes."""
        target = int(self.status()["daemon"]["passes"]) + count
        self.wait_for(lambda: int(self.status()["daemon"]["passes"]) >= target, f"{count} more passes", every_s=1)

    def records(self) -> list[str]:
        """Return rtpind's records since the scenario began."""
        command = ["journalctl", "-t", "rtpind", "-o", "cat", "-q", f"--after-cursor={self._cursor}"]
        return self.run(command).out.splitlines()

    def count(self, pattern: str) -> int:
        """Return how many records match."""
        return sum(bool(re.search(pattern, record)) for record in self.records())

    def steps(self) -> list[str]:
        """Return the records of changes, without QEMU's workers, which come and go."""
        return [record for record in self.records() if "→" in record and "(worker, " not in record]

    # --- guests -----------------------------------------------------------------------------------------------

    def guest(self, name: str, **options: Any) -> Guest:
        """Start a guest ``rt-NAME`` (options of demo.guests.Lab.start)."""
        return Guest(self.host, **self.host.call("start", name=name, **options))

    def guests(self, *names: str, **options: Any) -> list[Guest]:
        """Start several at once."""
        with ThreadPoolExecutor(len(names)) as pool:
            return list(pool.map(lambda name: self.guest(name, **options), names))

    def again(self, guest: Guest) -> Guest:
        """Return a guest as the process that it is now on this host."""
        return Guest(self.host, guest.name, guest.uuid, int(self.host.read(f"/run/libvirt/qemu/{guest.name}.pid")))

    def alone(self, guests: Sequence[Guest]) -> bool:
        """Whether every vCPU has an isolated pCPU to itself, at FIFO with RESET_ON_FORK, and all helpers keep house."""
        threads = [thread for guest in guests for thread in guest.threads()]
        vcpus = [thread for thread in threads if thread.vcpu]
        taken = [cpu for vcpu in vcpus for cpu in vcpu.cpus]
        return (
            bool(vcpus)
            and len(taken) == len(vcpus) == len(set(taken))
            and set(taken) <= set(self.isolated)
            and all((vcpu.policy, vcpu.priority) == (FIFO_RESET, 1) for vcpu in vcpus)
            and all(thread.cpus == self.housekeeping and not thread.fifo for thread in threads if not thread.vcpu)
        )

    def placed(self, *names: str, **options: Any) -> list[Guest]:
        """Start rtpind, then guests, and wait until all their threads are on their place."""
        self.start(policy(("rt-*", "realtime")))
        guests = self.guests(*names, **options)
        self.wait_for(lambda: self.alone(guests), "each vCPU is alone on its pCPU at FIFO")
        self.wait_verified()
        return guests

    def moved(self, guests: Sequence[Guest], before: Sequence[Mapping[int, Place]]) -> list[tuple[Thread, Place]]:
        """Return every thread of guests whose place is another than before."""
        return [found for guest, places in zip(guests, before, strict=True) for found in guest.moved(places)]

    def clear(self) -> None:
        """End guests and rtpind and forget what it knew. Files stay, the policy too: a scenario writes its own."""
        self.host.call("clear")
        self.run("systemctl stop rtpind; systemctl reset-failed rtpind; rm -rf /run/rtpind", check=False)
        self.host.used = False


def violations(guests: Iterable[Guest]) -> list[tuple[str, str]]:
    """Return every (FIFO vCPU, thread that may run beside it) that breaks promise 1, as the kernel shows it."""
    return violations_among((guest.name, thread) for guest in guests for thread in guest.threads())


def violations_among(threads: Iterable[tuple[str, Thread]]) -> list[tuple[str, str]]:
    """Return the same of these (guest, thread)."""
    found = list(threads)
    return [
        (f"{guest} {vcpu.comm} {vcpu.cpus}", f"{other_guest} {other.comm} {other.cpus}")
        for guest, vcpu in found
        if vcpu.vcpu and vcpu.fifo
        for other_guest, other in found
        if other.tid != vcpu.tid
        and set(other.cpus) & set(vcpu.cpus)
        and not (other_guest == guest and other.fifo and other.priority > vcpu.priority)
    ]


def cpus(text: str) -> tuple[int, ...]:
    """Return the numbers of a CPU list."""
    found: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    return tuple(found)

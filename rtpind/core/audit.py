# SPDX-License-Identifier: GPL-2.0-or-later
"""What happened → journal records (promise 9). Formatting only; :mod:`rtpind.host.journal` sends them.

The MESSAGE_IDs and the fields are the interface; the text is for people.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum, StrEnum

from rtpind.core.cpuset import CpuSet
from rtpind.core.model import Guest, Host, Limits, Placement, Thread, ThreadId
from rtpind.core.offplace import OffPlace
from rtpind.core.plan import Reason, Step

_FORBIDDEN = "EPERM: a security module forbids it (SELinux setsched, AppArmor, or a seccomp filter of the unit)"


class Kind(Enum):
    """Every kind of record: its MESSAGE_ID (sd-id128) and what it says; systemd/rtpind.catalog explains them."""

    CHANGED = "9f8a6bde266945119d57ebda4594f53c"  # a thread was given its pCPUs or its scheduling
    WOULD = "90b5306338754c428638af42a08637a2"  # what mode: enforce would do
    DRIFT = "ab8da1d294704420becbc779325ef92a"  # a verified thread was found off its place
    REFUSED = "6424e3d64f094ff7af9d9399e66ef853"  # the kernel refused or narrowed a step
    FIFO_WITHHELD = "908e6d1deafb4d6fb7470f3367250358"  # FIFO is not given, and why
    NOT_PLACED = "8b28c34318004980acac6f707ea613fa"  # a guest, or one of its threads, has no room
    STARTED = "aee0b8ff9a7d4f4c8f2e94ea2d2f6dd1"  # a guest's start, or the hotplug of vCPUs, is over: off-place time
    FIGHT = "48bacb9be3f94e6d860e6f5cdd13081f"  # something else keeps moving a thread; paused
    INTRUDER = "21e77d58d6b448a0a5818acde980a9ed"  # a thread may run on somebody's exclusive pCPU and is not moved
    CONTESTED = "871a7f13a7f744f7a620e4cd246a7a25"  # two threads claim one vCPU or iothread
    UNCLAIMED = "684f92bd07a24609b73d76568f46e18c"  # a guest's rule is gone
    RELEASED = "a74f1e42ec764e549306ae4bf76c60ed"  # a guest was put back, or is left alone, or managed again
    POLICY = "771a0afe30554d2f9f0a144912c11cdd"  # a policy was loaded
    POLICY_BAD = "2fc9e575c8934c39a3568f6feae1fde6"  # a policy file was refused
    HOTPLUG = "2f8fda0263634432a7ca119dedebf88b"  # pCPUs went offline or came online
    EVENTS = "e090f854f11844d19fb6d100106184b6"  # what the kernel tells of is not heard
    LIBVIRT = "86d59941e7b44508b2479d6157009a1e"  # libvirt is there, or away
    LEDGER = "1f600e166d604bb0adbf41e2ebc6504c"  # the ledger was set aside or could not be written
    METRICS = "ccc3409ffd174b8e9f88a7147ac43843"  # the metrics cannot be written
    DAEMON = "ce370c6a00d04f93893b2494d176c1d2"  # the daemon started or stopped
    FAULT = "dd856770284a4edda20bbd24000d97de"  # a fault in rtpind itself; the pass went on


class Level(int, Enum):
    """syslog(3) priorities."""

    ERROR = 3
    WARNING = 4
    NOTICE = 5
    INFO = 6


class Result(StrEnum):
    """What became of a step."""

    APPLIED = "applied"
    WOULD = "would"
    NARROWED = "narrowed"  # the kernel took only a part of the mask
    REFUSED = "refused"
    BLOCKED = "blocked"  # promise 1 does not allow it as things are
    VANISHED = "vanished"  # the thread ended; nobody's fault, no record
    DEFERRED = "deferred"  # FIFO that waits for the second look; no record
    OVERTAKEN = "overtaken"  # somebody else set a mask between the call and the read-back; the next look tries again


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """A step and what the kernel answered: ``after`` is read back; ``limits`` says what refused it."""

    step: Step
    result: Result
    before: Placement
    after: Placement | None = None
    error: int = 0
    limits: Limits | None = None
    beside: str = ""

    @property
    def done(self) -> bool:
        """Whether the thread is now as the step wanted it."""
        return self.result is Result.APPLIED


@dataclass(frozen=True, slots=True)
class Record:
    """One journal record. Field names are without their ``RTPIND_`` prefix."""

    kind: Kind
    message: str
    level: Level = Level.INFO
    fields: Mapping[str, str] = field(default_factory=dict)


def of_outcome(outcome: Outcome, guest: Guest, host: Host) -> Record | None:
    """Return the record of a step; None for a thread that ended and for FIFO that is not due yet."""
    step = outcome.step
    if outcome.result in (Result.VANISHED, Result.DEFERRED):
        return None
    fields = {
        **thread_fields(step.thread, guest),
        "REASON": str(step.reason),
        "RULE": step.rule,
        "RESULT": str(outcome.result),
    }
    if step.cpus is not None:
        fields["OLD_CPUS"], fields["WANTED_CPUS"] = str(outcome.before.cpus), str(step.cpus)
        if outcome.after:
            fields["NEW_CPUS"] = str(outcome.after.cpus)
        what = f"pCPU {outcome.before.cpus} → {step.cpus}"
    else:
        fields["OLD_SCHED"], fields["WANTED_SCHED"] = str(outcome.before.scheduling), str(step.scheduling)
        if outcome.after:
            fields["NEW_SCHED"] = str(outcome.after.scheduling)
        what = f"{outcome.before.scheduling} → {step.scheduling}"
    who = f"{guest.name}: {step.thread.label} ({step.thread.comm}, tid {step.thread.id.tid})"
    why = f" ({step.reason})"
    if outcome.result is Result.WOULD:
        return Record(kind=Kind.WOULD, message=f"{who}: would {what}{why}", fields=fields)
    if outcome.result is Result.OVERTAKEN:
        text = f"{who}: {what}{why}, overtaken: somebody has set another mask meanwhile; the next look tries again"
        return Record(kind=Kind.CHANGED, message=text, fields=fields)
    if outcome.result is Result.APPLIED:
        level = Level.NOTICE if step.reason in (Reason.DRIFT, Reason.SAFETY) else Level.INFO
        return Record(kind=Kind.CHANGED, message=f"{who}: {what}{why}", level=level, fields=fields)
    cause = refusal_text(outcome, host)
    if outcome.error:
        fields["ERRNO"] = str(outcome.error)
    text = f"{who}: {what} {outcome.result}: {cause}"
    return Record(kind=Kind.REFUSED, message=text, level=Level.WARNING, fields=fields | {"CAUSE": cause})


def of_start(guest: Guest, spent: Mapping[ThreadId, OffPlace]) -> Record:
    """Return the record of vCPUs whose start is over, with their off-place time."""
    vcpus = CpuSet(thread.index for thread in guest.threads if thread.id in spent and thread.index is not None)
    affinity = sum(one.affinity_ns for one in spent.values())
    scheduling = sum(one.scheduling_ns for one in spent.values())
    placed = all(one.right for one in spent.values())
    text = f"{guest.name}: vCPU {vcpus} started, at most {affinity / 1e6:.3f} ms of CPU time off its pCPUs and "
    text += f"{scheduling / 1e6:.3f} ms without its scheduling" + ("" if placed else "; not on its place yet")
    fields = guest_fields(guest) | {
        "VCPUS": str(vcpus),
        "OFF_AFFINITY_NS": str(affinity),
        "OFF_SCHED_NS": str(scheduling),
        "RESULT": "placed" if placed else "not-placed",
    }
    return Record(Kind.STARTED, text, Level.INFO if placed else Level.NOTICE, fields)


def thread_fields(thread: Thread, guest: Guest) -> dict[str, str]:
    """Return the fields that name a thread."""
    return {
        **guest_fields(guest),
        "ROLE": str(thread.role),
        "INDEX": "" if thread.index is None else str(thread.index),
        "TID": str(thread.id.tid),
        "COMM": thread.comm,
    }


def guest_fields(guest: Guest) -> dict[str, str]:
    """Return the fields that name a guest."""
    return {"GUEST": guest.name, "GUEST_UUID": guest.uuid, "PID": str(guest.pid)}


def refusal_text(outcome: Outcome, host: Host) -> str:
    """Return cause and cure of a step that did not come out as wanted."""
    limits = outcome.limits or Limits()
    if outcome.result is Result.BLOCKED:
        return f"{outcome.beside} can run there too; FIFO would starve it"
    if outcome.step.cpus is not None:
        if outcome.error == errno.EPERM:
            return _no_capability(host) or _FORBIDDEN
        if limits.fence is not None and not outcome.step.cpus <= limits.fence:
            return f"cgroup {limits.fenced_by} allows only pCPU {limits.fence} (see vcpupin, emulatorpin, AllowedCPUs=)"
        return f"{errno.errorcode.get(outcome.error, 'the kernel kept another mask')}: the kernel does not let it move"
    if outcome.error != errno.EPERM:
        return errno.errorcode.get(outcome.error, "the kernel kept another scheduling")
    return _no_capability(host) or _no_budget(outcome, limits, host) or _FORBIDDEN


def _no_capability(host: Host) -> str:
    if host.nice_capable:
        return ""
    return "rtpind lacks CAP_SYS_NICE over the host's threads (see the unit's AmbientCapabilities= and PrivateUsers=)"


def _no_budget(outcome: Outcome, limits: Limits, host: Host) -> str:
    """Explain RT_GROUP_SCHED. Recommends no throttling (-1) only where promise 7 holds without it."""
    if not host.rt_group_sched or limits.rt_budget_us or host.rt_runtime_us == -1:
        return ""
    scheduling = outcome.step.scheduling
    priority = scheduling.priority if scheduling else 0
    cures = "boot with rt_group_sched=0, or give its cgroups a budget in cpu.rt_runtime_us"
    if _safe_without_throttling(outcome.before, priority, host):
        cures += ", or set kernel.sched_rt_runtime_us=-1"
    return f"RT_GROUP_SCHED: its cpu cgroup has no realtime budget ({cures})"


def _safe_without_throttling(now: Placement, priority: int, host: Host) -> bool:
    """Return whether the host is known to survive FIFO on these pCPUs with RT throttling off."""
    if host.fair_server is not None and now.cpus <= host.fair_server:
        return True
    guards = host.guards or {}
    return all(guards.get(cpu, 0) > priority for cpu in now.cpus)


def protection_unknown(host: Host) -> str:
    """Return what could not be read about the protection of the host from FIFO threads; "" when all is known."""
    if host.fair_server is None and (host.throttles is False or host.rt_runtime_us == -1):
        return "the fair server's runtime cannot be read (debugfs); it counts as on"
    return ""

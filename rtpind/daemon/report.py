# SPDX-License-Identifier: GPL-2.0-or-later
"""What commands show, as plain data that follows the shipped schemas: status, plan, explain. Formatting only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rtpind.core.capacity import Row
from rtpind.core.cpuset import CpuSet
from rtpind.core.decision import Decision, GuestDecision
from rtpind.core.memory import Memory, Wanted
from rtpind.core.model import Guest, Host, Snapshot, Thread
from rtpind.core.offplace import OffPlace
from rtpind.core.plan import Plan
from rtpind.core.policy import HOUSEKEEPING, Policy, Rule, pool_cpus
from rtpind.core.verdict import Verdict, hazards, judge

VERSION = 1


def facts(host: Host, policy: Policy | None, others: Mapping[str, str]) -> list[dict[str, str]]:
    """Return the eight host facts of the status header: name, value, and a warning where there is one."""
    helpers, exclusive = _pools(host, policy)
    inside = helpers & host.isolated
    mixed = [cpu for cpu in exclusive if host.topology.siblings(cpu) & helpers]
    throttled = host.throttles is not False and host.rt_runtime_us not in (None, -1)
    unread = host.throttles is not False and host.rt_runtime_us is None
    if host.fair_server is None:
        fair = "unknown (debugfs cannot be read); it counts as on"
    else:
        fair = f"on for pCPU {host.fair_server}" if host.fair_server else "none"
    found = [
        ("isolated", str(host.isolated) or "none", ""),
        (
            "helper pool in isolated set",
            f"pCPU {inside}" if inside else "no",
            "helpers pile up on one pCPU: the kernel does not balance there" if inside else "",
        ),
        (
            "RT throttling",
            f"{host.rt_runtime_us} us per s" if throttled else "unknown" if unread else "off",
            "FIFO loses up to 5 % of its pCPU" if throttled else "",
        ),
        ("fair server", fair, ""),
        (
            "RT_GROUP_SCHED",
            {True: "yes", False: "no", None: "unknown"}[host.rt_group_sched],
            "FIFO needs a budget in each cgroup" if host.rt_group_sched and host.rt_runtime_us != -1 else "",
        ),
        (
            "SMT siblings across pools",
            f"pCPU {CpuSet(mixed)}" if mixed else "no",
            "helpers disturb the vCPUs beside them" if mixed else "",
        ),
        *((name, value.partition("!")[0], value.partition("!")[2]) for name, value in others.items()),
    ]
    return [{"name": name, "value": value, "warning": warning} for name, value, warning in found]


def _pools(host: Host, policy: Policy | None) -> tuple[CpuSet, CpuSet]:
    """Return the pCPUs where threads float and those given out exclusively; without a policy by isolation."""
    if policy is None:
        return host.online - host.isolated, host.isolated
    floats, owned = pool_cpus(policy.pools, HOUSEKEEPING, host), CpuSet()
    for class_ in policy.classes.values():
        for _, entry in class_.every():
            if entry.exclusive:
                owned |= policy.pool(entry.pool, host)
            else:
                floats |= policy.pool(entry.pool, host)
    return floats - owned, owned


def blocked(host: Host, policy: Policy | None, decision: Decision | None) -> dict[str, str]:
    """Return pCPU → why it is not given out, of those that could be: whose thread is narrowed to it."""
    _, exclusive = _pools(host, policy)
    found = {cpu: f"busy: {who}" for cpu, who in sorted(host.busy.items())} if decision is None else decision.blocked
    return {str(cpu): who for cpu, who in found.items() if cpu in exclusive}


def status(
    snapshot: Snapshot,
    *,
    others: Mapping[str, str],
    policy: Policy | None = None,
    decision: Decision | None = None,
    memory: Memory | None = None,
    daemon: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the document of ``rtpinctl status``: host facts, and every thread with its verdict and hazards."""
    dangers: dict[Any, list[str]] = {}
    for hazard in hazards(snapshot.threads(), snapshot.host):
        dangers.setdefault(hazard.thread.id, []).append(hazard.text)
    decided = {guest.guest.uuid: guest for guest in decision.guests} if decision else {}
    guests = []
    for guest in snapshot.guests:
        found = decided.get(guest.uuid)
        start = memory.starts.get(guest.process) if memory is not None else None
        threads = []
        for thread in sorted(guest.threads, key=_display):
            row = _thread(thread, found.wanted.get(thread.id) if found else None)
            row["hazards"] = dangers.get(thread.id, [])
            row["off_place"] = _off_place(start.spent(thread.id) if start else None)
            if found and decision and memory is not None:
                verdict, why = judge(thread, found, decision, memory, snapshot)
                row |= {"verdict": str(verdict), "why": why}
            threads.append(row)
        guests.append(_guest(guest, found) | {"threads": threads})
    return {
        "version": VERSION,
        "daemon": dict(daemon) if daemon else None,
        "policy": policy is not None,
        "host": {
            "kernel": snapshot.host.kernel,
            "online": str(snapshot.host.online),
            "facts": facts(snapshot.host, policy, others),
            "blocked": blocked(snapshot.host, policy, decision),
        },
        "guests": guests,
    }


def _display(thread: Thread) -> tuple[int, int, int]:
    order = {"vcpu": 0, "emulator": 1, "iothread": 2, "vhost": 3, "pit": 4}
    return (order[thread.role], thread.index or 0, thread.id.tid)


def _guest(guest: Guest, found: GuestDecision | None) -> dict[str, Any]:
    return {
        "name": guest.name,
        "uuid": guest.uuid,
        "pid": guest.pid,
        "state": str(found.state) if found else None,
        "rule": found.rule if found else None,
        "class": found.class_name if found else None,
        "reason": found.reason if found else None,
    }


def _thread(thread: Thread, wanted: Wanted | None) -> dict[str, Any]:
    return {
        "tid": thread.id.tid,
        "role": str(thread.role),
        "index": thread.index,
        "comm": thread.comm,
        "cpus": str(thread.now.cpus),
        "scheduling": str(thread.now.scheduling),
        "wanted_cpus": str(wanted.cpus) if wanted else None,
        "wanted_scheduling": None if wanted is None else f"fifo:{wanted.priority}" if wanted.priority else "other",
        "verdict": None,
        "why": "",
    }


def _off_place(spent: OffPlace | None) -> dict[str, int] | None:
    return None if spent is None else {"affinity_ns": spent.affinity_ns, "scheduling_ns": spent.scheduling_ns}


def not_ok(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the managed threads of a status document that are not ``ok``, with their guest's name."""
    found = []
    for guest in document["guests"]:
        managed = guest["state"] in ("placed", "crowded", "remote", "degraded", "left", "refused")
        found += [
            {"guest": guest["name"], **thread}
            for thread in guest["threads"]
            if managed and thread["verdict"] != Verdict.OK
        ]
    return found


def plan(plan: Plan, snapshot: Snapshot, decision: Decision, policy: Policy) -> dict[str, Any]:
    """Return the document of ``rtpinctl plan``: the steps in their order, and the guests."""
    names = {guest.uuid: guest.name for guest in snapshot.guests}
    return {
        "version": VERSION,
        "steps": [
            {
                "phase": int(step.phase),
                "guest": names[step.thread.guest],
                "role": str(step.thread.role),
                "index": step.thread.index,
                "tid": step.thread.id.tid,
                "comm": step.thread.comm,
                "from": str(step.thread.now.cpus if step.cpus is not None else step.thread.now.scheduling),
                "to": str(step.cpus if step.cpus is not None else step.scheduling),
                "what": "affinity" if step.cpus is not None else "scheduling",
                "reason": str(step.reason),
                "rule": step.rule,
            }
            for step in plan.steps
        ],
        "guests": [_guest(guest.guest, guest) for guest in decision.guests],
        "blocked": blocked(snapshot.host, policy, decision),
    }


def capacity(rows: Iterable[Row], blocked: Mapping[str, str]) -> dict[str, Any]:
    """Return the document of ``rtpinctl capacity``: a row for each class and number of vCPUs."""
    return {
        "version": VERSION,
        "blocked": dict(blocked),
        "rows": [
            {
                "class": row.class_name,
                "vcpus": row.vcpus,
                "guests": row.guests,
                "realtime_vcpus": row.realtime_vcpus,
                "limited_by": row.limited_by,
            }
            | ({} if row.running is None else _running(row))
            for row in rows
        ],
    }


def _running(row: Row) -> dict[str, Any]:
    return {"running": row.running, "running_realtime_vcpus": row.running_realtime}


def one_more(guest: Guest, decision: Decision) -> dict[str, Any]:
    """Return the document of ``rtpinctl plan --guest-shape``: where the threads of one more guest would go."""
    found = next(each for each in decision.guests if each.guest.uuid == guest.uuid)
    threads = [
        {
            key: value
            for key, value in _thread(thread, found.wanted.get(thread.id)).items()
            if key in ("role", "index", "wanted_cpus", "wanted_scheduling")
        }
        for thread in sorted(guest.threads, key=_display)
    ]
    return {
        "version": VERSION,
        "class": found.class_name,
        "state": str(found.state),
        "reason": found.reason,
        "threads": threads,
    }


def explain(guest: GuestDecision, decision: Decision, policy: Policy, snapshot: Snapshot) -> dict[str, Any]:
    """Return the document of ``rtpinctl explain``: which rule and class, which pCPU, and what else there was."""
    host = snapshot.host
    class_ = policy.classes.get(guest.class_name)
    names = {entry.guest.uuid: entry.guest.name for entry in decision.guests}
    near = host.topology.of_nodes(guest.guest.memory_nodes)
    away = [
        thread.label
        for thread in sorted(guest.guest.threads, key=_display)
        if near and thread.id in guest.wanted and not guest.wanted[thread.id].cpus <= near
    ]
    taken = {
        str(cpu): names.get(owner.partition(": ")[0], "?") + ": " + owner.partition(": ")[2]
        for cpu, owner in decision.owners.items()
    }
    pools = sorted({entry.pool for _, entry in class_.every()}) if class_ else []
    return {
        "version": VERSION,
        **_guest(guest.guest, guest),
        "considered": [
            {"rule": str(rule), "line": rule.line, "matches": rule.matches(guest.guest)}
            for rule in _until(policy.rules, guest.guest)
        ],
        "memory": {"nodes": str(guest.guest.memory_nodes), "cpus": str(near), "away": list(dict.fromkeys(away))},
        "pools": [
            {
                "pool": name,
                "cpus": str(policy.pool(name, host)),
                "taken": {cpu: who for cpu, who in taken.items() if int(cpu) in policy.pool(name, host)},
                "blocked": {str(cpu): who for cpu, who in decision.blocked.items() if cpu in policy.pool(name, host)},
            }
            for name in pools
        ],
        "threads": [
            _thread(thread, guest.wanted.get(thread.id)) for thread in sorted(guest.guest.threads, key=_display)
        ],
    }


def _until(rules: Iterable[Rule], guest: Guest) -> list[Rule]:
    """Return the rules up to and with the first that matches, or may match: what was considered."""
    found = []
    for rule in rules:
        found.append(rule)
        if rule.matches(guest) is not False:
            break
    return found

# SPDX-License-Identifier: GPL-2.0-or-later
"""``rtpinctl plan`` and ``explain``: what a daemon would do now, and why."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from typing import Any

from rtpind import EXIT_CONFIG, POLICY_FILE
from rtpind.core.capacity import one_more
from rtpind.ctl import show
from rtpind.ctl.checkconfig import print_problems
from rtpind.ctl.look import Looked, look
from rtpind.daemon import report
from rtpind.daemon.reconcile import View
from rtpind.host.control import UnreachableError, ask

_MATCHES = {True: "matches", False: "does not match", None: "not known: that rests on its definition"}


def plan(options: argparse.Namespace) -> int:
    """Show the steps that the policy asks for, in the order in which they would be taken; change nothing."""
    looked = look(options.config, options.state_dir)
    if looked.view is None or looked.policy is None:
        return _no_policy(options, looked)
    if options.guest_shape is not None:
        return _one_more(options, looked.view, looked)
    document = report.plan(looked.view.plan, looked.view.snapshot, looked.view.decision, looked.policy)
    if options.json:
        show.as_json(document)
        return 0
    rows = [
        (step["guest"], show.thread_name(step), str(step["tid"]), f"{step['from']} → {step['to']}", _why(step))
        for step in document["steps"]
    ]
    if rows:
        show.table(("guest", "thread", "tid", "change", "why"), rows)
    unplaced = [guest for guest in document["guests"] if guest["reason"] and guest["state"] != "unmanaged"]
    for guest in unplaced:
        show.line(f"{guest['name']}: {guest['state']}: {guest['reason']}")
    for cpus, who in show.blocked(document["blocked"]):
        show.line(f"{cpus} not given out: {who}")
    if not rows:
        show.line("nothing to do: every managed thread is where the policy wants it")
    return 0


def _one_more(options: argparse.Namespace, view: View, looked: Looked) -> int:
    """Show where the threads of one more guest would go."""
    name, shape = options.guest_shape
    assert looked.policy is not None
    if name not in looked.policy.classes:
        show.error(f"there is no class '{name}' (classes: {', '.join(sorted(looked.policy.classes)) or 'none'})")
        return 1
    reconciler = looked.reconciler
    decision, guest = one_more(looked.policy, name, shape, view.snapshot, reconciler.memory, reconciler.ledger)
    document = report.one_more(guest, decision)
    if options.json:
        show.as_json(document)
        return 0
    show.line(f"one more guest of class {name}: {document['state']}")
    if document["reason"]:
        show.line(f"  because: {document['reason']}")
    rows = [
        (
            show.thread_name(thread),
            show.where(thread["wanted_cpus"] or "as it is", thread["wanted_scheduling"] or "other"),
        )
        for thread in document["threads"]
    ]
    show.table(("thread", "pCPU"), rows)
    return 0


def _why(step: Mapping[str, Any]) -> str:
    return f"{step['reason']}: {step['rule']}"


def explain(options: argparse.Namespace) -> int:
    """Show which rule, class and pCPU a guest has, and what else was considered."""
    document = _explained(options)
    if isinstance(document, int):
        return document
    if options.json:
        show.as_json(document)
        return 0
    show.line(f"{document['name']} ({document['uuid']}, pid {document['pid']}): {document['state']}")
    if document["reason"]:
        show.line(f"  because: {document['reason']}")
    for rule in document["considered"]:
        show.line(f"  line {rule['line']}: {rule['rule']}: {_MATCHES[rule['matches']]}")
    if not any(rule["matches"] is not False for rule in document["considered"]):
        show.line("  no rule matches: unmanaged")
    memory = document.get("memory")  # a daemon from before an upgrade does not tell
    if memory and memory["nodes"]:
        away = ", ".join(memory["away"]) or "none"
        show.line(f"  memory: NUMA node {memory['nodes']}, pCPU {memory['cpus'] or 'none'}; away from it: {away}")
    for pool in document["pools"]:
        taken = ", ".join(f"{cpu} by {who}" for cpu, who in pool["taken"].items()) or "none"
        blocked = "".join(f"; {cpu} blocked by {who}" for cpu, who in pool["blocked"].items())
        show.line(f"  pool {pool['pool']}: pCPU {pool['cpus'] or 'none'}; taken: {taken}{blocked}")
    rows = [
        (
            show.thread_name(thread),
            str(thread["tid"]),
            thread["comm"],
            show.where(thread["cpus"], thread["scheduling"]),
            "" if thread["wanted_cpus"] is None else show.where(thread["wanted_cpus"], thread["wanted_scheduling"]),
        )
        for thread in document["threads"]
    ]
    show.table(("thread", "tid", "name", "is on pCPU", "wanted"), rows)
    return 0


def _explained(options: argparse.Namespace) -> dict[str, Any] | int:
    """Return the document, from the daemon or from a look of our own; an exit code when there is none."""
    if options.config is None:
        try:
            answer = ask({"do": "explain", "guests": [options.guest]}, options.state_dir)
            if "ok" in answer:
                return dict(answer["ok"])
            show.error(str(answer.get("error")))
            return 1
        except UnreachableError:
            pass
    looked = look(options.config, options.state_dir)
    if looked.view is None or looked.policy is None:
        return _no_policy(options, looked)
    for guest in looked.view.decision.guests:
        if options.guest in (guest.guest.name, guest.guest.uuid):
            return report.explain(guest, looked.view.decision, looked.policy, looked.view.snapshot)
    show.error(f"no running guest is called {options.guest}")
    return 1


def _no_policy(options: argparse.Namespace, looked: Looked) -> int:
    path = options.config or POLICY_FILE
    if looked.problems:
        print_problems(looked.problems, path, sys.stderr)  # programs read JSON from stdout
    else:
        show.error(f"{path}: there is no policy file")
    return EXIT_CONFIG

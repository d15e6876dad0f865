# SPDX-License-Identifier: GPL-2.0-or-later
"""``rtpinctl status`` and ``verify``: every guest thread, where it is, where it should be, and what is dangerous."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rich.text import Text

from rtpind.ctl import show
from rtpind.daemon import report
from rtpind.host import others
from rtpind.host.control import UnreachableError, ask


def document(config: Path | None, state_dir: Path) -> dict[str, Any]:
    """Return the status document: the daemon's or, without one or with another policy file, from a look of our own.

    So it is, by the daemon's policy, while the daemon waits for libvirt and knows of no guest.
    """
    daemon: dict[str, Any] | None = None
    if config is None:
        try:
            answer = ask({"do": "status"}, state_dir)
            if isinstance(answer.get("ok"), dict):
                return dict(answer["ok"])
            daemon = answer.get("daemon")
            if daemon is None:
                show.error(f"the daemon does not tell ({answer.get('error')}); this is a look of rtpinctl's own")
        except UnreachableError:
            pass
    from rtpind.ctl.look import look  # with all of the daemon

    looked = look(Path(daemon["policy"]) if daemon else config, state_dir)
    snapshot = (
        looked.view.snapshot
        if looked.view
        else looked.reconciler.observer.look(looked.reconciler.domains, looked.reconciler.memory)
    )
    found = report.status(
        snapshot,
        others=others.facts(),
        policy=looked.policy,
        decision=looked.view.decision if looked.view else None,
        memory=looked.reconciler.memory,
        daemon=daemon,
    )
    problems = [problem for problem in looked.problems if not problem.warning]
    if problems:
        show.error(f"the policy file has {len(problems)} problems and is not used here (rtpinctl check-config)")
    return found


def status(options: argparse.Namespace) -> int:
    """Show the host's facts and all guests, or the one named."""
    found = document(options.config, options.state_dir)
    if options.guest:
        found["guests"] = [guest for guest in found["guests"] if options.guest in (guest["name"], guest["uuid"])]
        if not found["guests"]:
            show.error(f"no running guest is called {options.guest}")
            return 1
    if options.json:
        show.as_json(found)
        return 0
    _header(found)
    for guest in found["guests"]:
        _guest(guest, policy=found["policy"])
    if not found["guests"]:
        show.line("no guest runs")
    return 0


def _header(found: Mapping[str, Any]) -> None:
    daemon = found["daemon"]
    rows: list[tuple[str, str | Text]] = [
        ("daemon", f"{daemon['mode']}, pid {daemon['pid']}, libvirt {daemon['libvirt']}" if daemon else "not running"),
        ("kernel", f"{found['host']['kernel']}, online {found['host']['online']}"),
    ]
    for fact in found["host"]["facts"]:
        value = Text(fact["value"])
        if fact["warning"]:
            value.append(f"  ! {fact['warning']}", style="yellow")
        rows.append((fact["name"], value))
    rows += [("not given out", f"{cpus}: {who}") for cpus, who in show.blocked(found["host"].get("blocked", {}))]
    show.table(("host", ""), rows)


def _guest(guest: Mapping[str, Any], *, policy: bool) -> None:
    title = f"{guest['name']}  (pid {guest['pid']}"
    if policy:
        title += f", {guest['state']}" + (f", class {guest['class']}" if guest["class"] else "")
    title += ")" + (f": {guest['reason']}" if guest["reason"] else "") + _off_place(guest["threads"])
    rows = []
    for thread in guest["threads"]:
        row: list[str | Text] = [show.thread_name(thread), str(thread["tid"]), thread["comm"]]
        row.append(show.where(thread["cpus"], thread["scheduling"]))
        if policy:
            wanted = thread["wanted_cpus"]
            row.append("" if wanted is None else show.where(wanted, thread["wanted_scheduling"]))
            row.append(show.verdict(thread["verdict"]))
        notes = [f"! {hazard}" for hazard in thread["hazards"]] + ([thread["why"]] if thread["why"] else [])
        row.append("; ".join(notes))
        rows.append(row)
    columns = ["thread", "tid", "name", "is on pCPU", *(["wanted", "verdict"] if policy else []), "notes"]
    show.table(columns, rows, title=title)


def _off_place(threads: Iterable[Mapping[str, Any]]) -> str:
    """Return what is known of a guest's start, for people; "" where it was not measured."""
    spent = [thread["off_place"] for thread in threads if thread["off_place"] is not None]
    if not spent:
        return ""
    affinity, scheduling = (sum(one[key] for one in spent) / 1e6 for key in ("affinity_ns", "scheduling_ns"))
    return f"; off place at start: pCPU {affinity:.3f} ms, scheduling {scheduling:.3f} ms"


def verify(options: argparse.Namespace) -> int:
    """Exit 0 when every managed thread is ok; else 1, with the list."""
    found = document(options.config, options.state_dir)
    if not found["policy"]:
        show.error("there is no policy to verify against")
        return 1
    wrong = report.not_ok(found)
    if options.json:
        show.as_json({"version": report.VERSION, "ok": not wrong, "threads": wrong})
    elif wrong:
        rows = [
            (row["guest"], show.thread_name(row), str(row["tid"]), show.verdict(row["verdict"]), row["why"])
            for row in wrong
        ]
        show.table(("guest", "thread", "tid", "verdict", "why"), rows)
    else:
        managed = sum(len(guest["threads"]) for guest in found["guests"] if guest["state"] == "placed")
        show.line(f"ok: {managed} managed threads are where the policy wants them")
    return 1 if wrong else 0

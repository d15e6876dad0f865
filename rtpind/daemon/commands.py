# SPDX-License-Identifier: GPL-2.0-or-later
"""What the daemon answers to rtpinctl: one request in, one answer out, on the loop's thread."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rtpind.daemon import report
from rtpind.daemon.reconcile import Reconciler
from rtpind.host import others
from rtpind.host.control import Answer


def only_looks(request: Answer) -> bool:
    """Return whether a request, whatever JSON it is made of, changes nothing."""
    return request.get("do") in ("status", "explain")


def answer(request: Answer, reconciler: Reconciler, about: Mapping[str, Any]) -> Answer:
    """Return ``{"ok": DOCUMENT}`` or ``{"error": TEXT}``; ``about`` is what status says of the daemon."""
    try:
        names = [str(name) for name in request.get("guests") or []]
        match request.get("do"):
            case "status":
                return {"ok": _status(reconciler, about)}
            case "explain":
                return {"ok": _explain(reconciler, names)}
            case "release":
                done = reconciler.release(names)
            case "pause":
                seconds = request.get("seconds")
                done = reconciler.pause(names, None if seconds is None else float(seconds))
            case "manage":
                done = reconciler.manage(names)
            case unknown:
                return {"error": f"this daemon does not know {unknown!r}"}
    except (LookupError, ValueError, TypeError, OverflowError) as error:
        return {"error": str(error.args[0] if error.args else error)}
    return {"ok": {"version": report.VERSION, "guests": done}}


def _status(reconciler: Reconciler, about: Mapping[str, Any]) -> dict[str, Any]:
    view = reconciler.view()
    return report.status(
        view.snapshot,
        others=others.facts(),
        policy=reconciler.policy,
        decision=view.decision,
        memory=reconciler.memory,
        daemon=about,
    )


def _explain(reconciler: Reconciler, names: list[str]) -> dict[str, Any]:
    view = reconciler.view()
    assert reconciler.policy is not None
    for guest in view.decision.guests:
        if names and names[0] in (guest.guest.name, guest.guest.uuid):
            return report.explain(guest, view.decision, reconciler.policy, view.snapshot)
    raise LookupError(f"no running guest is called {', '.join(names)}")

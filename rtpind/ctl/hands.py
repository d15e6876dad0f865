# SPDX-License-Identifier: GPL-2.0-or-later
"""``rtpinctl release``, ``manage`` and ``pause``: take guests out of rtpind's hands, and give them back."""

from __future__ import annotations

import argparse
import io
import re
import sys
from typing import Any

from rtpind.core.audit import Kind, Level, Record
from rtpind.ctl import show
from rtpind.daemon import report
from rtpind.host.control import UnreachableError, ask
from rtpind.host.ledgerfile import BusyError, LedgerFile

_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def seconds(text: str) -> float:
    """Read ``90s``, ``15m``, ``1h``, ``2d``. Raises argparse's error."""
    match = re.fullmatch(r"([1-9][0-9]{0,6})([smhd])", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a time: a number with s, m, h or d, such as 1h")
    return float(match[1]) * _UNITS_S[match[2]]


def release(options: argparse.Namespace) -> int:
    """Put guests back as they were before rtpind, and keep hands off them until they stop or are managed again."""
    if not options.guests and not options.all:
        show.error("name a guest, or say --all")
        return 2
    if options.guests and options.all:
        show.error("name guests or say --all, not both")
        return 2
    return _do(options, {"do": "release", "guests": options.guests})


def manage(options: argparse.Namespace) -> int:
    """Manage guests again."""
    return _do(options, {"do": "manage", "guests": options.guests})


def pause(options: argparse.Namespace) -> int:
    """Leave guests exactly as they are, for debugging by hand."""
    return _do(options, {"do": "pause", "guests": options.guests, "seconds": options.duration})


def _do(options: argparse.Namespace, request: dict[str, Any]) -> int:
    try:
        answer = ask(request, options.state_dir, timeout_s=30)
    except UnreachableError as unreachable:
        answer = _without_daemon(options, request, unreachable)
    if "ok" not in answer:
        show.error(str(answer.get("error")))
        return 1
    if options.json:
        show.as_json(answer["ok"])
    else:
        for name, text in answer["ok"]["guests"].items():
            print(show.plain(f"{name}: {text}"))
        if not answer["ok"]["guests"]:
            print("no guest runs")
    failed = any(text.startswith("not ") or "not every" in text for text in answer["ok"]["guests"].values())
    return 1 if failed else 0


def _without_daemon(options: argparse.Namespace, request: dict[str, Any], why: Exception) -> dict[str, Any]:
    """Do it ourselves, by the same code, under the daemon's lock."""
    from rtpind.ctl.look import running  # with all of the daemon
    from rtpind.daemon.observe import Observer
    from rtpind.daemon.reconcile import Reconciler
    from rtpind.host.journal import Journal

    file = LedgerFile(options.state_dir)
    try:
        file.lock()
    except BusyError:
        return {"error": f"a daemon runs, but its control socket does not answer ({why})"}
    except OSError as error:
        return {"error": f"no daemon runs, and without one this needs root: {error}"}
    observer = Observer()
    journal = Journal(stderr=sys.stderr if options.verbose else io.StringIO())
    reconciler = Reconciler(observer, file, journal.send)
    try:
        reconciler.open_ledger()
    except OSError as error:
        return {"error": f"the ledger cannot be read: {error}"}
    reconciler.domains = running(observer)
    observer.host()
    try:
        match request["do"]:
            case "release":
                done = reconciler.release(request["guests"])
            case "manage":
                done = reconciler.manage(request["guests"])
            case _:
                done = reconciler.pause(request["guests"], request["seconds"])
    except LookupError as error:
        return {"error": str(error.args[0])}
    finally:
        file.unlock()
    journal.send(Record(Kind.DAEMON, f"rtpinctl {request['do']} without a daemon", Level.INFO))
    return {"ok": {"version": report.VERSION, "guests": done}}

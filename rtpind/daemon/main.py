# SPDX-License-Identifier: GPL-2.0-or-later
"""The command ``rtpind``: arguments, and the one place where the daemon's parts are put together."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from rtpind import EXIT_CONFIG, POLICY_FILE, __version__
from rtpind.core.audit import Kind, Level, Record
from rtpind.daemon import policysource
from rtpind.daemon.observe import Observer
from rtpind.daemon.reconcile import Reconciler
from rtpind.daemon.service import Service
from rtpind.host.journal import Journal
from rtpind.host.ledgerfile import STATE_DIR, BusyError, LedgerFile


def parser() -> argparse.ArgumentParser:
    """Return the parser of rtpind(8)'s arguments."""
    made = argparse.ArgumentParser(
        prog="rtpind",
        description="Keep every thread of realtime KVM guests on the pCPUs and at the priority that the policy says.",
        epilog="Runs in the foreground. SIGHUP reads the policy again. See rtpind(8), rtpind.yaml(5), rtpinctl(1).",
    )
    made.add_argument(
        "--config", type=Path, default=POLICY_FILE, metavar="FILE", help="policy file (default %(default)s)"
    )
    made.add_argument(
        "--observe", action="store_true", help="only journal what would be done, whatever the policy's mode"
    )
    made.add_argument(
        "--state-dir",
        type=Path,
        default=Path(os.environ.get("RUNTIME_DIRECTORY", STATE_DIR)),
        metavar="DIR",
        help="where originals, lock and control socket are kept (default %(default)s)",
    )
    made.add_argument("--stderr", action="store_true", help="write records to stderr even where there is a journal")
    made.add_argument("--version", action="version", version=f"rtpind {__version__}")
    return made


def main(argv: list[str] | None = None) -> int:
    """Run the daemon; return its exit code: 0 stopped, 1 could not start, 78 the policy has problems."""
    options = parser().parse_args(argv)
    journal = Journal(Path("/nonexistent")) if options.stderr else Journal()
    observer = Observer()
    policy, problems = policysource.read(options.config, observer.host())
    for problem in problems:
        level = Level.WARNING if problem.warning else Level.ERROR
        kind = Kind.POLICY if problem.warning else Kind.POLICY_BAD
        journal.send(Record(kind, problem.text(str(options.config)), level, {"LINE": str(problem.line)}))
    if policy is None:
        print(f"rtpind: {options.config} has problems (rtpinctl check-config lists them)", file=sys.stderr)
        return EXIT_CONFIG
    ledger = LedgerFile(options.state_dir)
    try:
        ledger.lock()
    except (BusyError, OSError) as error:
        journal.send(Record(Kind.DAEMON, f"cannot start: {error}", Level.ERROR))
        return 1
    reconciler = Reconciler(observer, ledger, journal.send, observe_only=options.observe)
    try:
        reconciler.open_ledger()
    except OSError as error:
        journal.send(Record(Kind.DAEMON, f"cannot start: the ledger cannot be read: {error}", Level.ERROR))
        return 1
    return Service(reconciler, options.config).run(policy)


if __name__ == "__main__":
    sys.exit(main())

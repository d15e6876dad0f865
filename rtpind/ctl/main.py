# SPDX-License-Identifier: GPL-2.0-or-later
"""The command ``rtpinctl``: arguments and exit codes only; each command is a module of this folder."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from rtpind import POLICY_FILE, __version__
from rtpind.host.ledgerfile import STATE_DIR


def _of(name: str) -> Callable[[Any], Any]:
    """Return a function ``module.function`` of this folder, whose module is loaded when it is called.

    Half of what there is to load is there for other commands, and for when no daemon answers.
    """
    module, _, function = name.partition(".")

    def call(argument: Any) -> Any:
        return getattr(import_module(f"rtpind.ctl.{module}"), function)(argument)

    return call


def parser() -> argparse.ArgumentParser:
    """Return the parser of rtpinctl(1)'s arguments."""
    made = argparse.ArgumentParser(
        prog="rtpinctl",
        description="See and steer where the threads of realtime KVM guests run.",
        epilog="Start with 'rtpinctl status': it needs no policy and no daemon. See rtpinctl(1).",
    )
    made.add_argument("--version", action="version", version=f"rtpinctl {__version__}")
    commands = made.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def add(name: str, run: str, text: str, *, config: bool = False) -> argparse.ArgumentParser:
        found = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        found.set_defaults(run=_of(run))
        found.add_argument("--json", action="store_true", help="print JSON that follows the shipped schema")
        found.add_argument(
            "--state-dir", type=Path, default=STATE_DIR, metavar="DIR", help="the daemon's state (default %(default)s)"
        )
        if config:
            text = f"use this policy, not the daemon's (default {POLICY_FILE})"
            found.add_argument("--config", type=Path, metavar="FILE", help=text)
        return found

    made_status = add("status", "status.status", "show every guest thread, where it is and should be", config=True)
    made_status.add_argument("guest", nargs="?", metavar="GUEST", help="only this guest (name or UUID)")
    check = add("check-config", "checkconfig.check_config", "list every problem of a policy file")
    check.add_argument("file", nargs="?", type=Path, default=POLICY_FILE, metavar="FILE")
    planned = add("plan", "plan.plan", "show what a daemon would do now, and why; change nothing", config=True)
    planned.add_argument(
        "--guest-shape",
        type=_of("capacity.guest_shape"),
        metavar="CLASS:VCPUS[+IOTHREADS][xTHREADS]",
        help="instead, where one more guest of that class would go",
    )
    fits = add("capacity", "capacity.capacity", "show how many guests of each size fit under each class", config=True)
    fits.add_argument("--policy", dest="config", type=Path, metavar="FILE", help="the same as --config")
    fits.add_argument(
        "--shape",
        type=_of("capacity.shape"),
        metavar="SHAPE",
        help="on such a host, not on this one: SOCKETSxCORESxTHREADS[,l3=N][,dies=N][,nodes=N]",
    )
    fits.add_argument(
        "--isolated",
        type=_of("capacity.cpu_list"),
        metavar="CPUS",
        help="with --shape: what is isolated there (default: all but the first core)",
    )
    fits.add_argument(
        "--vcpus", type=_of("capacity.sizes"), default=[1, 2, 3, 4], metavar="LIST", help="sizes (default 1-4)"
    )
    fits.add_argument("--iothreads", type=int, default=0, metavar="N", help="iothreads of each guest (default 0)")
    fits.add_argument("--running", action="store_true", help="count what runs here; only what is left is free")
    add("verify", "status.verify", "exit 0 when every managed thread is where it should be", config=True)
    explained = add("explain", "plan.explain", "show which rule, class and pCPU a guest has, and why", config=True)
    explained.add_argument("guest", metavar="GUEST", help="name or UUID")
    released = add("release", "hands.release", "put guests back as they were, and leave them alone")
    released.add_argument("guests", nargs="*", metavar="GUEST")
    released.add_argument("--all", action="store_true", help="every running guest")
    managed = add("manage", "hands.manage", "manage guests again that were released or paused")
    managed.add_argument("guests", nargs="*", metavar="GUEST", help="default: all")
    paused = add("pause", "hands.pause", "leave guests as they are, for debugging by hand")
    paused.add_argument("guests", nargs="*", metavar="GUEST", help="default: all, also those that start later")
    paused.add_argument(
        "--for", dest="duration", type=_of("hands.seconds"), metavar="TIME", help="such as 1h; default: until managed"
    )
    for found in (released, managed, paused):
        found.add_argument("-v", "--verbose", action="store_true", help="without a daemon or journal: show the records")
    return made


def main(argv: list[str] | None = None) -> int:
    """Run one command; return its exit code: 0 good, 1 not, 2 usage, 78 the policy has problems."""
    options = parser().parse_args(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that has no "→"
    code = 1 if options.command == "verify" else 0  # where the reader goes away before all is said
    try:
        code = options.run(options)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader went away (| head): nothing to complain about, also not when Python flushes at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except PermissionError as error:
        from rtpind.ctl import show  # with rich

        show.error(f"{error.filename}: {error.strerror} (try as root)")
        return 1
    return code


if __name__ == "__main__":
    sys.exit(main())

# SPDX-License-Identifier: GPL-2.0-or-later
"""``rtpinctl check-config``: every problem of a policy file at once."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import TextIO

from rtpind import EXIT_CONFIG
from rtpind.core.document import Problem
from rtpind.ctl import show
from rtpind.daemon import policysource, report
from rtpind.daemon.observe import Observer


def check_config(options: argparse.Namespace) -> int:
    """Print each problem as ``FILE:LINE: path: message (hint)``. Return 0 for a good file, 78 for a bad one."""
    path: Path = options.file
    policy, problems = policysource.read(path, Observer().host(), strict=True)
    if options.json:
        rows = [
            {
                "file": str(path),
                "line": problem.line,
                "path": problem.path,
                "message": problem.message,
                "hint": problem.hint,
                "severity": "warning" if problem.warning else "problem",
            }
            for problem in problems
        ]
        show.as_json({"version": report.VERSION, "ok": policy is not None, "problems": rows})
    else:
        print_problems(problems, path)
        if policy is not None:
            print(f"{path}: good, mode {policy.mode}, {len(policy.rules)} rules")
    return 0 if policy is not None else EXIT_CONFIG


def print_problems(problems: Iterable[Problem], path: Path, file: TextIO | None = None) -> None:
    """Print problems, one in a line, to ``file`` (default: standard output)."""
    for problem in problems:
        print(show.plain(problem.text(str(path))), file=file)

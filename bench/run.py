# SPDX-License-Identifier: GPL-2.0-or-later
"""``make bench``: rtpind beside what people use today, on throwaway guests (root). Prints tables and writes the page.

Exit 0 when all experiments ran, 1 when not or when it cannot run here, 128 + signal. However it ends, guests, the hook
script and kernel.sched_rt_runtime_us are put back as they were.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import libvirt

from bench import burst, drift, jitter, late, report, starts, steady
from bench.bench import PREFIX, Bench
from bench.contenders import ALL, remove_hook
from bench.results import Table
from demo.guests import kvm_works
from demo.run import clean
from demo.stage import RT_RUNTIME, Interrupted, Interrupts, Stage, refusal
from rtpind.ctl import show

_ROOT = Path(__file__).resolve().parent.parent
_PAGE = _ROOT / "docs/benchmarks.md"
_RAW = _ROOT / "build/bench.json"


@dataclass(frozen=True, slots=True)
class Size:
    """How much of everything."""

    starts: tuple[int, int]  # turns, and starts in each
    burst: tuple[int, int]  # turns, and guests in each
    late: int
    drift: int
    steady: tuple[int, int, float]  # turns, guests, seconds
    jitter: int


QUICK = Size(starts=(3, 1), burst=(1, 20), late=3, drift=2, steady=(1, 20, 20.0), jitter=3)
FULL = Size(starts=(20, 10), burst=(5, 50), late=30, drift=6, steady=(3, 20, 60.0), jitter=10)

EXPERIMENTS: dict[str, Callable[[Bench, Size], tuple[Table, ...]]] = {
    "starts": lambda bench, size: starts.run(bench, *size.starts),
    "burst": lambda bench, size: (burst.run(bench, *size.burst),),
    "late": lambda bench, size: (late.run(bench, size.late),),
    "drift": lambda bench, size: (drift.run(bench, size.drift),),
    "steady": lambda bench, size: (steady.run(bench, *size.steady),),
    "jitter": lambda bench, size: (jitter.run(bench, size.jitter),),
}


def main() -> int:
    """Run, put everything back, write what was finished to the page."""
    parser = argparse.ArgumentParser(prog="make bench ARGS=...", description=__doc__)
    parser.add_argument("--full", action="store_true", help="hours, not minutes: as many rounds as figures need")
    parser.add_argument(
        "--only", choices=EXPERIMENTS, action="append", help="this experiment; the page keeps the others"
    )
    parser.add_argument(
        "--contender", choices=[one.name for one in ALL], action="append", help="this one only; needs --page"
    )
    parser.add_argument("--page", type=Path, default=_PAGE, help="where to write the tables")
    parser.add_argument("--note", default="", help="what else the machine did meanwhile, for the page")
    options = parser.parse_args()
    able = tuple(one for one in ALL if not one.lacks() and (not options.contender or one.name in options.contender))
    if not able:
        parser.error(f"{', '.join(options.contender)} cannot take part here")
    if options.contender and options.page == _PAGE:
        parser.error("--contender needs a --page of its own")
    reason = refusal(PREFIX)
    if reason:
        print(f"bench: {reason}", file=sys.stderr)
        return 1
    remove_hook()  # of a run that was killed
    runtime = RT_RUNTIME.read_text()
    interrupts = Interrupts()
    stage = Stage(contextlib.ExitStack(), interrupts, PREFIX)
    bench = Bench(stage, "kvm" if kvm_works() else "qemu", able)
    tables: list[Table] = []
    failure, number = "", 0
    try:
        stage.set_up()
        with bench.guest(ALL[0], bench.fifo) as guest:
            stage.allow_fifo(guest.vcpus()[0].tid)
        for name in options.only or EXPERIMENTS:
            for table in EXPERIMENTS[name](bench, FULL if options.full else QUICK):
                tables.append(table)
                _print(table)
    except Interrupted as interrupted:
        number = interrupted.number
    except (OSError, RuntimeError, libvirt.libvirtError, subprocess.SubprocessError) as error:
        failure = str(error)
    finally:
        interrupts.hold()
        cleaned = clean(stage, runtime)
    if tables:
        _keep(tables, options.page, bench, f"{'Full' if options.full else 'QUICK'} run. {options.note}".strip())
    if failure or number or not cleaned:
        print(f"bench: {failure or 'stopped by a signal'}", file=sys.stderr)
        return 128 + number if number else 1
    return 0


def _keep(tables: Sequence[Table], page: Path, bench: Bench, remark: str) -> None:
    """Write the tables to the page, and every figure to a file."""
    _RAW.parent.mkdir(exist_ok=True)
    _RAW.write_text(json.dumps({table.key: table.figures for table in tables}, indent=1) + "\n")
    guests = "KVM" if bench.kind == "kvm" else "emulated (TCG)"
    machine = f"{report.machine()}; {guests} guests where not said otherwise."
    absent = {one.name: why for one in ALL if one not in bench.contenders and (why := one.lacks())}
    sections = {"machine": f"{machine}\n\n{report.who(bench.contenders, absent)}"}
    day = f"{time.strftime('%d %B %Y')}, {report.commit(_ROOT)}"
    report.write(page, sections | {table.key: report.section(table, page, f"{day}. {remark}") for table in tables})


def _print(table: Table) -> None:
    for text in ("", f"== {table.title}", ""):
        show.line(text)
    for text in (*report.markdown(table.rows()).splitlines(), "", table.circumstances()):
        print(text)


if __name__ == "__main__":
    sys.exit(main())

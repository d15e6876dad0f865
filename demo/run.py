# SPDX-License-Identifier: GPL-2.0-or-later
"""``make demo``: rtpind's main job on throwaway guests, in about a minute.

Exit 0 when the kernel bears out everything that was claimed, 1 when not or when it cannot run here, 128 + signal.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time

import libvirt

from demo.stage import RT_RUNTIME, Interrupted, Interrupts, Stage, refusal
from demo.steps import STEPS
from rtpind.ctl import show


def main() -> int:
    """Run all steps, put everything back, say how it went."""
    reason = refusal()
    if reason:
        print(f"demo: {reason}", file=sys.stderr)
        return 1
    began = time.monotonic()
    runtime = RT_RUNTIME.read_text()
    interrupts = Interrupts()
    stage = Stage(contextlib.ExitStack(), interrupts)
    failure, number = "", 0
    try:
        stage.set_up()
        for count, step in enumerate(STEPS, 1):
            for text in ("", f"== {count} of {len(STEPS)}: {(step.__doc__ or '').strip()}", ""):
                show.line(text)
            step(stage)
    except Interrupted as interrupted:
        number = interrupted.number
    except (OSError, RuntimeError, libvirt.libvirtError, subprocess.CalledProcessError) as error:
        failure = f"{error} {getattr(error, 'stderr', None) or ''}".strip()
    finally:
        interrupts.hold()
        if failure:
            show.line(f"FAILED: {failure}. rtpind's last words:")
            for record in stage.records()[-5:]:
                show.line(f"  {record.partition(' [RTPIND_')[0]}")
        for text in ("", "== Cleaning up", ""):
            show.line(text)
        cleaned = clean(stage, runtime)
    failed = [text for text, true in stage.claims.items() if not true]
    failed += [failure] if failure else []
    failed += [] if cleaned else ["everything is as it was before"]
    if number:
        show.line("Stopped by a signal." + ("" if cleaned else " NOT everything could be put back."))
        return 128 + number
    for text in failed:
        print(f"demo: failed: {text}", file=sys.stderr)
    if not failed:
        show.line(f"All {len(stage.claims)} claims hold, as the kernel shows it. {time.monotonic() - began:.0f} s.")
    return 1 if failed else 0


def clean(stage: Stage, runtime: str) -> bool:
    """Put everything back; return whether that is so."""
    own = [guest.name for guest in stage.guests]
    try:
        stage.undo.close()
    except (OSError, subprocess.SubprocessError, libvirt.libvirtError) as error:
        show.line(f"  {error}")
    done = subprocess.run(["virsh", "-q", "list", "--name"], capture_output=True, text=True, check=False)
    left = [name for name in own if name in done.stdout.split()]
    if left:
        show.line(f"  still there: virsh destroy {' '.join(left)}")
    if RT_RUNTIME.read_text() != runtime:
        show.line(f"  put back by hand: sysctl kernel.sched_rt_runtime_us={runtime.strip()}")
    return not left and RT_RUNTIME.read_text() == runtime


if __name__ == "__main__":
    sys.exit(main())

# SPDX-License-Identifier: GPL-2.0-or-later
"""Metrics of the real daemon: off unless asked for, true, and no reason to stop managing guests."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from harness import NOBODY, Daemon, placed, policy
from prometheus_client.parser import text_string_to_metric_families

from demo.guests import Guest, Lab, wait_for

Make = Callable[..., Daemon]


def named(text: str, directory: Path | None) -> str:
    """Return a policy with a directory for metrics."""
    return text if directory is None else text.replace("daemon: {", f"daemon: {{metrics_dir: {directory}, ")


def read(path: Path) -> dict[tuple[str, ...], float]:
    """Return (name, labels) → value."""
    families = text_string_to_metric_families(path.read_text())
    return {(one.name, *sorted(one.labels.values())): one.value for family in families for one in family.samples}


def test_metrics_follow_guests_reloads_and_the_policy(lab: Lab, daemon: Make) -> None:
    """Threads by verdict, a repair, the age of the last pass, a refused reload; and no file once it is turned off."""
    guest: Guest = lab.start("told")
    made = daemon(policy((guest, "dedicated")))
    where = made.state
    path = where / "rtpind.prom"
    made.start()
    wait_for(lambda: placed(guest, {1}), "the guest is placed", 30)
    made.passes(1)
    assert not path.exists()

    made.write(named(policy((guest, "dedicated")), where))
    made.reload()
    count = len(guest.threads())
    wait_for(lambda: path.exists() and read(path)["rtpind_threads", "ok"] >= count - 1, "all threads are told as ok")
    assert path.stat().st_mode & 0o777 == 0o644
    found = read(path)
    assert 0 <= time.time() - found["rtpind_last_pass_timestamp_seconds",] < 30
    assert 0 < found["rtpind_last_pass_duration_seconds",] < 10
    assert found["rtpind_policy_info", str(made.policy), "enforce"] == 1
    assert found["rtpind_policy_last_reload_successful",] == 1
    assert found["rtpind_repairs_total",] == 0

    wait_for(lambda: made.count("vCPU 0 started") == 1, "its start is over: what moves it now is not libvirt")
    subprocess.run(["taskset", "-pc", "0", str(guest.vcpus()[0].tid)], check=True, capture_output=True)
    wait_for(lambda: read(path)["rtpind_repairs_total",] == 1, "the repair is told")

    made.write("version: 2\n")
    made.reload()
    wait_for(lambda: read(path)["rtpind_policy_last_reload_successful",] == 0, "the refused reload is told")

    made.write(policy((guest, "dedicated")))
    made.reload()
    wait_for(lambda: not path.exists(), "the file is withdrawn")


def test_a_directory_that_cannot_be_written_is_one_record(lab: Lab, daemon: Make) -> None:
    """Whatever is wrong with it: said once, never a fault, and guests are placed all the same."""
    guest = lab.start("dark")
    made = daemon(named(policy((guest, "dedicated")), Path("/nonexistent/metrics")))
    made.start()
    wait_for(lambda: placed(guest, {1}), "the guest is placed", 30)
    wait_for(lambda: made.count("metrics cannot be written to /nonexistent/metrics/rtpind.prom") == 1, "it is said")
    made.passes(3)
    assert made.count("metrics cannot be written") == 1
    assert made.ctl("status")["daemon"]["faults"] == 0


def test_what_its_user_may_not_write_is_said_as_such() -> None:
    """A directory of root's, and a daemon that is not root."""
    made = Daemon(policy(), unprivileged=True)
    try:
        closed = made.dir / "closed"
        closed.mkdir(mode=0o755)
        made.write(named(policy(), closed))
        made.start()
        wait_for(lambda: made.count("metrics cannot be written .*Permission denied") == 1, "it is said")
        os.chown(closed, NOBODY, NOBODY)
        wait_for((closed / "rtpind.prom").exists, "it is written once it can be")
    finally:
        made.stop()
        made.close()

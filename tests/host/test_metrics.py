# SPDX-License-Identifier: GPL-2.0-or-later
"""The metrics file: what node_exporter reads is whole, current and readable; what cannot be written is said once."""

from __future__ import annotations

import os
import resource
import threading
from dataclasses import replace

import pytest
from prometheus_client.parser import text_string_to_metric_families
from trees import until

from rtpind.core.audit import Result
from rtpind.core.measures import Measures, Tally
from rtpind.core.verdict import Verdict
from rtpind.host.metrics import Metrics, MetricsFile, Unwritten, write_file

MEASURES = Measures(
    threads=dict.fromkeys(Verdict, 0) | {Verdict.OK: 7, Verdict.NO_FIFO: 1},
    tally=Tally(repairs=3, refusals={Result.NARROWED: 1, Result.REFUSED: 2}),
    passed_at=1.7e9,
    pass_s=0.25,
    mode="enforce",
    policy='/etc/a "b".yaml',
    loaded_at=1.6e9,
    loaded=False,
)


def samples(path):
    """Return (name, labels) → value, as a program that scrapes understands the file."""
    found = {}
    for family in text_string_to_metric_families(path.read_text()):
        assert family.documentation
        found |= {(one.name, *sorted(one.labels.values())): one.value for one in family.samples}
    return found


@pytest.fixture
def metrics(tmp_path):
    """Metrics files of this directory, and what they posted; their threads end with the test."""
    made, posts = [], []

    def start(directory=tmp_path):
        made.append(MetricsFile(directory, posts.append))
        made[-1].start()
        return made[-1]

    yield start, posts
    for one in made:
        one.withdraw()
    until(lambda: not any(thread.name == "metrics" for thread in threading.enumerate()), "the threads have ended")


def test_every_measure_is_in_the_file(tmp_path):
    """Names, labels and values, read by the library's own parser; nothing else, such as when a counter was made."""
    write_file(tmp_path / "rtpind.prom", MEASURES)

    assert samples(tmp_path / "rtpind.prom") == {
        **{("rtpind_threads", str(verdict)): count for verdict, count in MEASURES.threads.items()},
        ("rtpind_repairs_total",): 3,
        ("rtpind_refusals_total", "narrowed"): 1,
        ("rtpind_refusals_total", "refused"): 2,
        ("rtpind_last_pass_timestamp_seconds",): 1.7e9,
        ("rtpind_last_pass_duration_seconds",): 0.25,
        ("rtpind_policy_info", '/etc/a "b".yaml', "enforce"): 1,
        ("rtpind_policy_loaded_timestamp_seconds",): 1.6e9,
        ("rtpind_policy_last_reload_successful",): 0,
    }


def test_a_reader_sees_a_whole_file_and_nothing_lies_beside_it(tmp_path):
    """It is replaced, not rewritten; a second name such as a link from the collector's directory follows it."""
    path = tmp_path / "rtpind.prom"
    link = tmp_path / "link.prom"
    link.symlink_to(path)
    write_file(path, MEASURES)
    with open(path) as before:
        write_file(path, replace(MEASURES, pass_s=9))
        assert "rtpind_last_pass_duration_seconds 0.25\n" in before.read()
    assert samples(link)["rtpind_last_pass_duration_seconds",] == 9
    assert {one.name for one in tmp_path.iterdir()} == {"rtpind.prom", "link.prom"}


def test_the_latest_measures_are_written_by_a_thread_of_its_own(tmp_path, metrics):
    """Whoever tells them does not wait; of many only the last counts."""
    made = metrics[0]()
    for number in range(100):
        made.write(replace(MEASURES, pass_s=number))

    until(lambda: made.path.exists() and samples(made.path)["rtpind_last_pass_duration_seconds",] == 99, "written")
    assert made.path == tmp_path / "rtpind.prom"


def test_a_directory_that_hangs_holds_nobody_up(tmp_path, metrics):
    """The thread may wait for a disk as long as it likes."""
    made = metrics[0]()
    writer = next(thread for thread in threading.enumerate() if thread.name == "metrics")
    slow = tmp_path / f"rtpind.prom.{os.getpid()}.{writer.ident}"
    os.mkfifo(slow)  # where the library writes to first: opening it waits for a reader
    for _ in range(10):
        made.write(MEASURES)

    with open(slow, "rb"):  # now there is one
        until(made.path.exists, "written")


def test_what_cannot_be_written_is_posted_once_and_again_after_a_success(tmp_path, metrics):
    """The same reason is no news; after it went well, it is."""
    start, posts = metrics
    made = start(tmp_path / "none")

    def failed(times):
        made.write(MEASURES)
        until(lambda: made._latest is None, "taken")
        until(lambda: len(posts) == times, "posted")

    failed(1)
    failed(1)
    assert posts == [Unwritten(tmp_path / "none/rtpind.prom", "No such file or directory")]
    (tmp_path / "none").mkdir()
    made.write(MEASURES)
    until(made.path.exists, "written")
    made.path.unlink()
    (tmp_path / "none").rmdir()
    failed(2)


def test_a_failure_leaves_the_old_file_and_no_other(tmp_path):
    """A file that grows too large for the disk, here for a limit, is given up whole."""
    path = tmp_path / "rtpind.prom"
    write_file(path, MEASURES)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_file(path, replace(MEASURES, pass_s=9))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    assert samples(path)["rtpind_last_pass_duration_seconds",] == 0.25
    assert [one.name for one in tmp_path.iterdir()] == ["rtpind.prom"]


def test_a_withdrawn_file_is_removed(metrics):
    """What nobody keeps up to date is not there to be believed; one that is gone already is no trouble."""
    start, _ = metrics
    made, never = start(), start()
    made.write(MEASURES)
    until(made.path.exists, "written")
    made.withdraw()
    until(lambda: not made.path.exists(), "removed")
    never.withdraw()


def test_they_follow_the_directory_that_is_named_last(tmp_path, metrics):
    """A policy that names another directory, or none, leaves no file behind that nobody keeps up to date."""
    one, other = tmp_path / "one", tmp_path / "other"
    one.mkdir()
    other.mkdir()
    made = Metrics(metrics[1].append)
    made.write("", MEASURES)
    made.write(str(one), MEASURES)
    until((one / "rtpind.prom").exists, "written")
    made.write(str(other), MEASURES)
    until(lambda: (other / "rtpind.prom").exists() and not any(one.iterdir()), "moved")
    made.write("", MEASURES)
    until(lambda: not any(other.iterdir()), "removed")
    assert not metrics[1]

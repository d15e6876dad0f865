# SPDX-License-Identifier: GPL-2.0-or-later
"""The only module that imports prometheus_client: measures → a text file that node_exporter collects.

A thread of its own writes it, because the directory may be on a disk that hangs, and the loop waits for nothing. Only
the latest measures count; what could not be written is posted, once.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rtpind.core.measures import Measures

if TYPE_CHECKING:
    from prometheus_client import Metric

NAME = "rtpind.prom"


@dataclass(frozen=True, slots=True)
class Unwritten:
    """The metrics cannot be written, and why."""

    path: Path
    why: str


class MetricsFile:
    """``rtpind.prom`` in ``directory``, replaced as a whole."""

    def __init__(self, directory: Path, post: Callable[[Unwritten], None]) -> None:
        self.path = directory / NAME
        self._post = post
        self._latest: Measures | None = None
        self._wake = threading.Event()
        self._closing = False
        self._said = ""

    def start(self) -> None:
        """Start the thread; returns at once."""
        threading.Thread(target=self._run, name="metrics", daemon=True).start()

    def write(self, measures: Measures) -> None:
        """Have these written, in place of any that still wait; returns at once."""
        self._latest = measures
        self._wake.set()

    def withdraw(self) -> None:
        """End the thread and remove the file: nobody keeps it up to date any more."""
        self._closing = True
        self._wake.set()

    def _run(self) -> None:
        while not self._closing:
            self._wake.wait()
            self._wake.clear()
            measures, self._latest = self._latest, None
            if measures is not None and not self._closing:
                self._write(measures)
        with contextlib.suppress(OSError):
            self.path.unlink()

    def _write(self, measures: Measures) -> None:
        try:
            write_file(self.path, measures)
        except Exception as error:  # whatever it is, such as a library that is missing: metrics are no reason to fall
            why = (error.strerror if isinstance(error, OSError) else None) or repr(error)
            if why != self._said:
                self._said = why
                self._post(Unwritten(self.path, why))
        else:
            self._said = ""


class Metrics:
    """The file, in whatever directory is named last; ``post`` is told what could not be written."""

    def __init__(self, post: Callable[[Unwritten], None]) -> None:
        self._post = post
        self._file: MetricsFile | None = None

    def write(self, directory: str, measures: Measures) -> None:
        """Have measures written there, and the file of another directory withdrawn; "": nowhere. Returns at once."""
        wanted = Path(directory) if directory else None
        if self._file is not None and wanted != self._file.path.parent:
            self._file.withdraw()
            self._file = None
        if wanted is not None and self._file is None:
            self._file = MetricsFile(wanted, self._post)
            self._file.start()
        if self._file is not None:
            self._file.write(measures)


def write_file(path: Path, measures: Measures) -> None:
    """Replace the file by one with these measures. Raises OSError; the old file then still stands."""
    from prometheus_client import CollectorRegistry, write_to_textfile
    from prometheus_client.registry import Collector

    class Once(Collector):
        def collect(self) -> Iterator[Metric]:
            return families(measures)

    registry = CollectorRegistry()
    registry.register(Once())
    try:
        write_to_textfile(str(path), registry)
    except OSError:
        with contextlib.suppress(OSError):  # what it leaves of a disk that is full
            os.unlink(f"{path}.{os.getpid()}.{threading.get_ident()}")
        raise


def families(measures: Measures) -> Iterator[Metric]:
    """Yield the metrics; rtpind(8) lists them."""
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

    def gauge(name: str, text: str, value: float) -> Metric:
        return GaugeMetricFamily(name, text, value=value)

    threads = GaugeMetricFamily("rtpind_threads", "Threads of running guests, by verdict.", labels=["verdict"])
    for verdict, count in measures.threads.items():
        threads.add_metric([str(verdict)], count)
    yield threads
    text = "Threads put back on their place after somebody had moved them, since rtpind started."
    yield CounterMetricFamily("rtpind_repairs", text, value=measures.tally.repairs)
    refusals = CounterMetricFamily(
        "rtpind_refusals", "Steps that the kernel refused or narrowed, since rtpind started.", labels=["result"]
    )
    for result, count in measures.tally.refusals.items():
        refusals.add_metric([str(result)], count)
    yield refusals
    yield gauge(
        "rtpind_last_pass_timestamp_seconds", "When the last full pass ended; its age is time() less this. 0: never.",
        measures.passed_at,
    )  # fmt: skip
    yield gauge("rtpind_last_pass_duration_seconds", "How long the last full pass took.", measures.pass_s)
    policy = GaugeMetricFamily("rtpind_policy_info", "The policy that is in force.", labels=["file", "mode"])
    policy.add_metric([measures.policy, measures.mode], 1)
    yield policy
    yield gauge("rtpind_policy_loaded_timestamp_seconds", "When the policy in force was read.", measures.loaded_at)
    yield gauge(
        "rtpind_policy_last_reload_successful", "1, or 0 when the last reload was refused and the old policy stayed.",
        int(measures.loaded),
    )  # fmt: skip

"""The benchmarks' own sums: off-place time, medians, the page and its pictures. Nothing is started."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from bench import plot, report
from bench.contenders import ALL, cputune
from bench.guests import OffPlace, Place, Sample, in_cgroup, off_place
from bench.results import Column, Table, Value, summary

ROOT = Path(__file__).resolve().parents[2]
MS = 1_000_000


def samples(*rows: tuple[int, bool, bool, bool]) -> list[Sample]:
    """Return samples of (CPU time in ms, on its pCPU, FIFO, whether the guest has begun)."""
    return [Sample(ran * MS, cpus, fifo, begun) for ran, cpus, fifo, begun in rows]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        pytest.param(
            samples((1, True, True, False), (5, True, True, True), (9, True, True, True)),
            OffPlace(0, 0, 8),
            id="on its place from the first instruction on",
        ),
        pytest.param(
            samples((0, False, False, False), (7, True, True, False), (8, True, True, True)),
            OffPlace(0, 0, 1),
            id="what it ran before the first instruction does not count",
        ),
        pytest.param(
            samples((0, False, False, False), (3, False, False, True), (5, True, False, True), (9, True, True, True)),
            OffPlace(5, 9, 9),
            id="placed in two steps: affinity and FIFO are counted apart",
        ),
        pytest.param(
            samples((0, True, True, False), (1, True, True, True), (3, False, True, True), (6, True, True, True)),
            OffPlace(5, 0, 6),
            id="moved away for one sample: the intervals on both sides of it",
        ),
        pytest.param(samples((0, False, False, False), (4, False, False, True)), OffPlace(4, 4, 4), id="never placed"),
        pytest.param(
            samples((0, True, True, False), (1, True, True, True), (3, True, False, True)),
            OffPlace(0, 2, 3),
            id="lost FIFO",
        ),
        pytest.param([], OffPlace(0, 0, 0), id="nothing seen"),
    ],
)
def test_off_place_time_counts_from_the_first_instruction(given: list[Sample], expected: OffPlace) -> None:
    """An interval counts whole when it was off at either end, from the last sample before the guest began."""
    assert off_place(given) == expected


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([3.0, 1.0, 2.0], "2.0 (1.0–3.0)"),
        ([1.0, None], "1.0 (1.0–1.0), never in 1 of 2"),
        ([None, None], "never (2 of 2)"),
        ([], "–"),
    ],
)
def test_what_never_happened_is_no_number(values: list[Value], expected: str) -> None:
    """It is counted, and is in no median."""
    assert summary(values, Column("x")) == expected


def table() -> Table:
    """Return a table of two contenders."""
    made = Table("key", "Title <here>", "How.", {"a": Column("first, ms"), "b": Column("second", 0, total=True)})
    for value in (0.0, 5.0, None):
        made.add("<cputune>", a=value, b=1)
    made.add("rtpind", a=0.2)
    made.steal, made.load = [0.0, 0.25], [1.0, 3.0]
    return made


def test_the_page_keeps_what_is_written_by_hand(tmp_path: Path) -> None:
    """Only what is between a key's markers is replaced, also the second time."""
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- bench key -->\nold\n<!-- end key -->\nafter\n<!-- bench x -->\n<!-- end x -->\n")
    for _ in range(2):
        report.write(page, {"key": report.section(table(), page, "A quick run.")})
    text = page.read_text()
    assert text.startswith("before\n<!-- bench key -->\n")
    assert text.endswith("\n<!-- end key -->\nafter\n<!-- bench x -->\n<!-- end x -->\n")
    assert "old" not in text
    assert "| &lt;cputune> | 2.5 (0.0–5.0), never in 1 of 3 | 3 |" in text
    assert "| rtpind | 0.2 (0.2–0.2) | – |" in text
    assert text.count("A quick run. 1–3 measured per contender; host steal 12.5%, at most 25.0%") == 1
    assert (tmp_path / "bench-key.svg").exists()


@pytest.mark.parametrize("more", ["", "<!-- bench b -->\n", "<!-- end b -->\n"])
def test_a_page_without_markers_is_left_alone(tmp_path: Path, more: str) -> None:
    """Nothing is overwritten that was not meant to be."""
    page = tmp_path / "page.md"
    page.write_text("<!-- bench a -->\n<!-- end a -->\n" + more)
    with pytest.raises(ValueError, match="no markers for b"):
        report.write(page, {"a": "text", "b": "text"})
    assert page.read_text() == "<!-- bench a -->\n<!-- end a -->\n" + more


def test_lost_turns_are_counted_by_reason() -> None:
    """Numbers in them differ each time and are left out."""
    made = table()
    for tid in (17, 18):
        made.lose("poller", RuntimeError(f"no thread {tid}"))
    assert made.circumstances().endswith("Turns lost: poller: no thread N (2).")


@pytest.mark.parametrize("key", ["machine", "start-idle", "start-hogs", "burst", "late", "drift", "steady", "jitter"])
def test_the_shipped_page_has_its_markers(key: str) -> None:
    """``make bench`` has somewhere to write to."""
    text = (ROOT / "docs/benchmarks.md").read_text()
    assert len(re.findall(rf"^<!-- bench {key} -->\n(?s:.*?)^<!-- end {key} -->$", text, re.MULTILINE)) == 1


def test_a_plot_shows_every_figure() -> None:
    """A dot for each, zero at the left edge, what never happened right of everything, more right of less."""
    tree = ET.fromstring(plot.svg(table()))
    dots = [float(dot.get("cx", "")) for dot in tree.iter("{http://www.w3.org/2000/svg}circle")]
    zero, five, never, small = dots
    assert zero < small < five < never


def test_cputune_says_the_whole_place() -> None:
    """It gets what the others get: vCPUs, emulator, iothreads, FIFO where it is wanted."""
    place = Place(frozenset({3}), frozenset({0, 1}), 1)
    text = cputune(place, 2, 1)
    assert "<vcpupin vcpu='1' cpuset='3'/>" in text
    assert "<emulatorpin cpuset='0,1'/><iothreadpin iothread='1' cpuset='0,1'/>" in text
    assert "<vcpusched vcpus='0-1' scheduler='fifo' priority='1'/>" in text
    assert "vcpusched" not in cputune(Place(place.vcpus, place.helpers), 1, 0)


def test_the_control_comes_first() -> None:
    """Steady guests belong to nobody, and the report begins with it."""
    assert ALL[0].name == "nothing"
    assert not ALL[0].cputune


def test_a_thread_of_no_guest_is_in_no_vcpu_cgroup() -> None:
    """What counts is the last part of the path, whole."""
    assert not in_cgroup("self", "vcpu1")

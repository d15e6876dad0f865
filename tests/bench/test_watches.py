"""The benchmarks would show a difference: their watches, and the whole harness, on real guests that are left alone."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.bench import PREFIX
from bench.burst import BurstWatch
from bench.burst import off_place as off_places
from bench.contenders import ALL as ALL_CONTENDERS
from bench.contenders import HOOK_FILE, Contender, cputune, remove_hook
from bench.guests import LateWatch, Place, StartWatch, first_time, off_place
from demo.guests import Lab, rounds, wait_for
from demo.stage import RT_RUNTIME, Interrupts, Stage, refusal

ROOT = Path(__file__).resolve().parents[2]
ALL = frozenset({0, 1})
ONE, ZERO = frozenset({1}), frozenset({0})

pytestmark = pytest.mark.live


def left_behind() -> set[str]:
    """Return what a benchmark could leave: guests, processes of its own, files, settings."""
    guests = subprocess.run(["virsh", "-r", "-q", "list", "--name"], capture_output=True, text=True, check=True)
    processes = subprocess.run(["pgrep", "-af", f"{PREFIX}-"], capture_output=True, text=True)
    files = [*Path("/tmp").glob(f"{PREFIX}-*"), *Path("/var/tmp").glob(f"{PREFIX}-*")]
    return {
        RT_RUNTIME.read_text(),
        HOOK_FILE.read_text() if HOOK_FILE.exists() else "",
        *(name for name in guests.stdout.split() if name.startswith(PREFIX)),
        *processes.stdout.splitlines(),
        *map(str, files),
    }


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """Skip where no benchmark can be, and compare the host before and after it."""
    reason = refusal(PREFIX)
    if reason:
        if os.environ.get("RTPIND_REQUIRE_LIVE") == "1":
            pytest.fail(f"RTPIND_REQUIRE_LIVE=1, but {reason}")
        pytest.skip(reason)
    before = left_behind()
    yield
    assert left_behind() == before


@pytest.fixture
def lab() -> Iterator[Lab]:
    """Starts guests, and ends them."""
    with Lab(PREFIX) as made:
        yield made


@pytest.fixture
def stage() -> Iterator[Stage]:
    """What contenders stand on; the signals of the tests are given back."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    handlers = [signal.getsignal(number) for number in numbers]
    made = Stage(contextlib.ExitStack(), Interrupts(), PREFIX)
    with made.undo:
        made.set_up()
        yield made
    for number, handler in zip(numbers, handlers, strict=True):
        signal.signal(number, handler)


@pytest.mark.parametrize("contender", ALL_CONTENDERS, ids=lambda one: one.name)
def test_every_contender_but_nothing_and_tuned_places_a_guest(stage: Stage, contender: Contender) -> None:
    """So a bad figure is the contender's, not for want of having been told. TuneD is undone by libvirt."""
    if contender.lacks():
        pytest.skip(contender.lacks())
    place = Place(ONE, ZERO)
    with contender.run(stage, place) as pid:
        assert bool(pid) == contender.process
        guest = stage.start("told", cputune=cputune(place, 1, 0) if contender.cputune else "")
        placed = first_time(lambda: all(map(place.holds, guest.vcpus())), 5)
    assert (placed is not None) == (contender.name not in ("nothing", "TuneD"))


@pytest.mark.parametrize(
    ("pins", "off"),
    [
        pytest.param("", True, id="left on every pCPU"),
        pytest.param("<vcpupin vcpu='0' cpuset='0'/>", True, id="pinned elsewhere"),
        pytest.param("<vcpupin vcpu='0' cpuset='1'/>", False, id="pinned to its place"),
    ],
)
def test_a_vcpu_left_off_its_place_is_counted(lab: Lab, pins: str, off: bool) -> None:
    """All its CPU time since the first instruction counts, or none."""
    with StartWatch(f"{PREFIX}-left", Place(ONE, ZERO), 0.3, ZERO) as watch:
        lab.start("left", boot="count", shared=True, firmware=False, cputune=pins)
        watch.finish(20)

    found = off_place(watch.samples)
    assert found.total > 10
    assert found.cpus == (found.total if off else 0)
    assert found.fifo == 0, "no FIFO was asked for"


def test_fifo_that_is_missing_is_counted(lab: Lab) -> None:
    """A vCPU on its pCPU that is not FIFO counts as without FIFO, and not as off its pCPU."""
    with StartWatch(f"{PREFIX}-fifo", Place(ONE, ZERO, 1), 0.3, ZERO) as watch:
        lab.start("fifo", boot="count", shared=True, firmware=False, cputune="<vcpupin vcpu='0' cpuset='1'/>")
        watch.finish(20)

    found = off_place(watch.samples)
    assert (found.cpus, found.fifo) == (0, found.total)


def test_a_watch_that_comes_too_late_says_so(lab: Lab) -> None:
    """What was not seen is not taken for nothing."""
    guest = lab.start("soon", boot="count", shared=True, firmware=False)
    with guest.memory() as memory:
        wait_for(lambda: rounds(memory), "it counts")
    watch = StartWatch(guest.name, Place(ONE, ZERO), 0.3, ZERO)
    with watch, pytest.raises(RuntimeError, match="before it was watched"):
        watch.finish(20)


def test_what_happens_before_the_first_instruction_is_not_counted(lab: Lab) -> None:
    """A guest that is placed while it is still paused was never off its place."""
    with StartWatch(f"{PREFIX}-wait", Place(ONE, ZERO), 0.3, ZERO) as watch:
        guest = lab.start("wait", boot="count", shared=True, firmware=False, paused=True)
        os.sched_setaffinity(guest.vcpus()[0].tid, ONE)
        guest.dom.resume()
        watch.finish(20)

    assert any(not sample.on_cpus for sample in watch.samples)
    found = off_place(watch.samples)
    assert found.total > 10
    assert found.cpus == 0


@pytest.mark.parametrize(
    ("place", "placed"), [pytest.param(ALL, True, id="right"), pytest.param(ONE, False, id="wrong")]
)
def test_a_late_thread_is_on_its_place_or_never(lab: Lab, place: frozenset[int], placed: bool) -> None:
    """A hot-plugged iothread, which libvirt leaves on every pCPU: at once where that is right, else never."""
    guest = lab.start("late", iothreads=1)
    with LateWatch(guest, "iothread2", place, 0.5, ZERO) as watch:
        guest.dom.addIOThread(2)
        watch.finish(20)

    assert (watch.took_ms is not None) == placed


def test_a_burst_is_watched_thread_by_thread(lab: Lab) -> None:
    """Iothreads that may be anywhere are right at once, the vCPU where it is pinned; what is off its place counts."""
    place = Place(ONE, ALL)
    with BurstWatch(f"{PREFIX}-burst", place, ZERO) as watch:
        pinned = lab.start("burst-a", iothreads=1, cputune="<vcpupin vcpu='0' cpuset='1'/>")
        free = lab.start("burst-b", iothreads=1)
        wait_for(lambda: len(watch.took_ms()) == 3, "all but one are on their place")
    assert watch.error is None

    assert max(watch.took_ms()) < 1000
    assert (off_places(pinned, place), off_places(free, place)) == (0, 1)


@pytest.mark.timeout(180)
@pytest.mark.parametrize(
    ("number", "until"),
    [
        pytest.param(signal.SIGTERM, "hook script", id="terminated after the hook script"),
        pytest.param(signal.SIGINT, "<cputune>", id="ctrl-c while the hook script is there"),
    ],
)
def test_a_signal_leaves_nothing_behind(tmp_path: Path, number: signal.Signals, until: str) -> None:
    """Stopped halfway it exits with 128 + signal and writes no page; the fixture looks at what is left."""
    page = tmp_path / "page.md"
    command = [sys.executable, "-u", "-m", "bench.run", "--page", str(page)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as run:
        assert run.stderr is not None
        try:
            shown = [""]
            while until not in shown[-1]:
                shown.append(run.stderr.readline())
                assert shown[-1], "".join(shown)
        finally:
            run.send_signal(number)
            rest = run.stderr.read()
    assert run.returncode == 128 + number, rest
    assert not page.exists()


def test_a_hook_script_that_is_there_stays() -> None:
    """An operator's own is neither replaced nor removed, and the contender is left out."""
    if HOOK_FILE.exists():
        pytest.skip(f"{HOOK_FILE} is there already")
    (hook,) = (one for one in ALL_CONTENDERS if one.name == "hook script")
    HOOK_FILE.parent.mkdir(exist_ok=True)
    HOOK_FILE.write_text("#!/bin/sh\n# the operator's\n")
    try:
        assert hook.lacks() == f"{HOOK_FILE} is there and stays as it is"
        remove_hook()
        assert HOOK_FILE.read_text().endswith("the operator's\n")
    finally:
        HOOK_FILE.unlink()
    assert hook.lacks() == ""

# SPDX-License-Identifier: GPL-2.0-or-later
"""Fixtures of the lab: a host for each shape, booted once and shared; rtpind is installed, and nothing runs yet.

Scenarios run with ``--lab`` or RTPIND_LAB=1 only. ``@pytest.mark.lab("small", "trixie-rt")`` names the shapes that one
runs on; RTPIND_LAB_TURNS=10 runs each so often. With pytest-xdist the scenarios of one shape stay together in one
worker. What a failing scenario saw is left in build/lab/.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import sys
from collections.abc import Generator, Iterator

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

from lab.host import RESULTS, LabHost
from lab.product import install
from lab.recipe import SHAPES, Shape
from lab.scene import Scene

#: The first scenario of a shape boots it, and may build its image.
TIMEOUT_S = 1800


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--lab", action="store_true", help="boot realtime hosts in virtual machines (slow)")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "smoke: one of the few lab scenarios that CI runs")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    marker = metafunc.definition.get_closest_marker("lab")
    if marker is None or "host" not in metafunc.fixturenames:
        return
    turns = int(os.environ.get("RTPIND_LAB_TURNS", "1"))
    if turns > 1:
        metafunc.fixturenames.append("turn")
        metafunc.parametrize("turn", range(turns))
    metafunc.parametrize("host", marker.args or ("bookworm-rt",), indirect=True, scope="session")


class ByShape(LoadScopeScheduling):
    """Keeps the scenarios of one shape together, but for one file: else one host has half of all there is to do.

    What xdist has for it, loadgroup, does not work with pytest 9.
    """

    def _split_scope(self, nodeid: str) -> str:
        shape = next((name for name in SHAPES if name in nodeid.partition("[")[2]), nodeid)
        return f"{shape}, apart" if "test_privilege" in nodeid else shape


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> ByShape:
    return ByShape(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    wanted = config.getoption("--lab", default=False) or os.environ.get("RTPIND_LAB") == "1"
    lab = [item for item in items if item.get_closest_marker("lab") is not None]
    for item in lab:
        if item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(TIMEOUT_S))
    if lab and not wanted:
        config.hook.pytest_deselected(items=lab)
        items[:] = [item for item in items if item not in lab]


def pytest_report_teststatus(report: pytest.TestReport | pytest.CollectReport) -> tuple[str, str, str] | None:
    """Show beside each scenario that passed how long it took."""
    mine = report.nodeid.startswith("tests/lab/")
    if mine and report.when == "call" and report.passed and not hasattr(report, "wasxfail"):
        return "passed", ".", f"PASSED in {report.duration:.0f} s"
    return None


FAILED = pytest.StashKey[str]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed:
        item.stash[FAILED] = report.longreprtext
    return report


@contextlib.contextmanager
def booted(shape: Shape, config: pytest.Config) -> Iterator[LabHost]:
    """Boot a lab host and install rtpind; its console is left in build/lab when that fails."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that it is shut down then, too
    made = LabHost(shape)
    _say(config, f"booting {shape.name} ...")
    try:
        with made:
            install(made)
            how = "continues" if made.continued else "has booted"
            _say(config, f"{shape.name} {how} after {made.boot_s:.0f} s")
            yield made
    except BaseException:
        RESULTS.mkdir(parents=True, exist_ok=True)
        (RESULTS / f"console-{shape.name}.log").write_text(made.console)
        raise


@pytest.fixture(scope="session")
def host(request: pytest.FixtureRequest) -> Iterator[LabHost]:
    """A booted lab host with rtpind installed; ended before the next shape boots."""
    with booted(SHAPES[request.param], request.config) as made:
        yield made


@pytest.fixture
def turn() -> int:
    """Which of RTPIND_LAB_TURNS repetitions this is."""
    return 0


@contextlib.contextmanager
def staged(host: LabHost, request: pytest.FixtureRequest) -> Iterator[Scene]:
    """Give a scenario its host, with no guest and no rtpind running; a failure leaves a dump in build/lab."""
    directory = RESULTS / re.sub(r"[^\w.-]+", "_", request.node.name) / host.shape.name
    shutil.rmtree(directory, ignore_errors=True)
    made = Scene(host)
    if host.used:
        made.clear()
    host.used = True
    yield made
    failure = request.node.stash.get(FAILED, "")
    if failure:
        host.dump(directory)
        (directory / "failure.txt").write_text(failure)
    if host.running():
        try:
            made.clear()
        except Exception:
            host.dump(directory / "clear")
            raise


@pytest.fixture
def scene(host: LabHost, request: pytest.FixtureRequest) -> Iterator[Scene]:
    """The scenario's host."""
    with staged(host, request) as made:
        yield made


def _say(config: pytest.Config, text: str) -> None:
    capture = config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        print(f"\nlab: {text}", file=sys.stderr, flush=True)

"""Rules of the structure that no linter knows; each is seen to fail on a planted violation."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in sorted((ROOT / "rtpind").rglob("*.py"))
}
TESTS = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in sorted((ROOT / "tests").rglob("*.py"))
}

#: Whatever changes how another thread is scheduled.
CHANGERS = frozenset(
    {"sched_setaffinity", "sched_setscheduler", "sched_setparam", "sched_setattr", "setpriority", "cpu_affinity"}
)


def changers(sources: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Yield (file, name) for each use of a call that changes a thread, but in host/sched.py."""
    for file, text in sources.items():
        for node in ast.walk(ast.parse(text)):
            name = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
            if name in CHANGERS and file != "rtpind/host/sched.py":
                yield file, name


def mocks(sources: Mapping[str, str]) -> Iterator[str]:
    """Yield each file that imports mock."""
    for file, text in sources.items():
        for node in ast.walk(ast.parse(text)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            module = node.module or "" if isinstance(node, ast.ImportFrom) else ""
            if any("mock" in name for name in (*names, module)):
                yield file


def test_only_sched_changes_a_thread() -> None:
    """No module but host/sched.py names a system call that changes a thread, and that one does."""
    assert list(changers(SOURCES)) == []
    assert "os.sched_setaffinity" in SOURCES["rtpind/host/sched.py"]


def test_nothing_is_mocked() -> None:
    """Tests use the real thing, or a small fake of their own."""
    assert list(mocks(TESTS)) == []


@pytest.mark.parametrize(
    "planted",
    ["import os\nos.sched_setaffinity(0, {0})", "from os import sched_setscheduler as s\ns = sched_setscheduler"],
)
def test_a_planted_change_is_found(planted: str) -> None:
    """The rule about system calls is not vacuous."""
    assert list(changers({"rtpind/host/proc.py": planted}))
    assert not list(changers({"rtpind/host/sched.py": planted}))


@pytest.mark.parametrize(
    "planted", ["from unittest import mock", "import unittest.mock", "from unittest.mock import patch"]
)
def test_a_planted_mock_is_found(planted: str) -> None:
    """The rule about mocks is not vacuous."""
    assert list(mocks({"tests/x.py": planted}))


@pytest.mark.parametrize(
    ("module", "planted", "contract"),
    [
        ("core/plan.py", "import logging", "the core decides and has no effects"),
        ("core/cpuset.py", "from rtpind.host import proc", "imports go one way"),
        ("host/proc.py", "from rtpind.daemon import inbox", "imports go one way"),
        ("daemon/service.py", "import libvirt", "only host.hypervisor imports libvirt"),
        ("ctl/show.py", "from systemd import journal", "only host.journal imports systemd-python"),
        ("host/sysfs.py", "from pyudev import Monitor", "only host.udev imports pyudev"),
        ("daemon/report.py", "import prometheus_client", "only host.metrics imports prometheus-client"),
    ],
)
def test_a_planted_import_breaks_its_contract(tmp_path: Path, module: str, planted: str, contract: str) -> None:
    """Each import contract of pyproject.toml fails on the import that it forbids."""
    for file, text in SOURCES.items():
        copy = tmp_path / file
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(text + (f"\n{planted}\n" if file == f"rtpind/{module}" else ""), encoding="utf-8")
    (tmp_path / "pyproject.toml").write_bytes((ROOT / "pyproject.toml").read_bytes())

    done = subprocess.run(
        [str(Path(sys.executable).parent / "lint-imports"), "--no-cache"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=60,
    )

    assert done.returncode == 1
    assert any(contract in line and "BROKEN" in line for line in done.stdout.splitlines())

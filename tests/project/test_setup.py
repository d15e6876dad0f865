"""The set-up: shell code that shellcheck accepts, targets that help lists, and a second run that changes nothing."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
VENV = ROOT / ".venv"


def make(*words: str) -> subprocess.CompletedProcess[str]:
    words = ("--no-print-directory", *words)  # inside make test it would say where it is
    return subprocess.run(["make", *words], cwd=ROOT, capture_output=True, text=True, stdin=subprocess.DEVNULL)


@pytest.mark.parametrize("script", ["tools/deb", "tools/setup", "tools/test", ".ci/run"])
def test_shell_code_is_clean(script: str) -> None:
    """Executable, and shellcheck has nothing to say."""
    assert (ROOT / script).stat().st_mode & 0o111
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run(["shellcheck", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_help_is_the_default_and_lists_every_target() -> None:
    """Every target that is not a file has a line."""
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert phony is not None
    listed = re.findall(r"^make (\S+) +\S", make().stdout, re.MULTILINE)
    assert sorted(listed) == sorted(phony[1].split())
    assert {"venv", "demo", "test", "lint", "clean"} <= set(listed)


def test_setup_run_again_changes_nothing() -> None:
    """`make venv` in a tree that is set up: no words, no time, not a file of .venv touched."""
    if not (VENV / ".rtpind-setup").exists() or Path(sys.prefix) != VENV:
        pytest.skip("these tests do not run in a .venv that make venv built")
    before = {path: path.stat().st_mtime_ns for path in (VENV, VENV / "bin", VENV / ".rtpind-setup")}
    began = time.monotonic()
    done = make("venv")
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert time.monotonic() - began < 10
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert (VENV / "bin/rtpind").exists()
    assert (VENV / "bin/rtpinctl").exists()


def test_setup_says_how_to_use_it() -> None:
    """A word it does not know is an error that names those it does."""
    done = subprocess.run([ROOT / "tools/setup", "everything"], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "setup: usage: tools/setup venv|demo|test\n"

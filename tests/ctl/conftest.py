"""What tests of the commands share: a daemon's side that answers what a test wants, and ways to run rtpinctl."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from documents import POLICY, Made, validate

from rtpind.core.model import Role
from rtpind.ctl.main import main
from rtpind.host.control import ControlServer

ROOT = Path(__file__).resolve().parents[2]
RTPINCTL = Path(sys.executable).with_name("rtpinctl")


@pytest.fixture
def made():
    """A hand-made host with its documents."""
    found = Made()
    assert {thread.role for thread in found.snapshot.threads()} == set(Role)
    return found


@pytest.fixture
def daemon(tmp_path):
    """Have the control socket in ``tmp_path`` give this answer; what was asked is in the list that is returned."""
    servers = []

    def start(answer):
        asked = []
        server = ControlServer(lambda request, _trusted: asked.append(request) or answer, tmp_path)
        server.start()
        servers.append(server)
        return asked

    yield start
    for server in servers:
        server.stop()


@pytest.fixture
def run(tmp_path, capsys):
    """Run rtpinctl in this process against the state in ``tmp_path``; return exit code, stdout and stderr."""

    def call(*words):
        try:
            code = main([words[0], "--state-dir", str(tmp_path), *map(str, words[1:])])
        except SystemExit as end:
            code = end.code
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture
def run_json(run):
    """Run rtpinctl with --json and check what it prints against the schema of that name."""

    def call(schema, *words):
        code, out, err = run(*words, "--json")
        document = json.loads(out)
        validate(schema, document)
        return code, document, err

    return call


@pytest.fixture
def command(tmp_path):
    """Run the installed rtpinctl from the project's folder, by a shell line in which CTL stands for it."""

    def call(line, **env):
        done = subprocess.run(
            ["bash", "-c", f'CTL() {{ {RTPINCTL} "$1" --state-dir \'{tmp_path}\' "${{@:2}}"; }}; {line}'],
            capture_output=True,
            text=True,
            env={name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"} | env,
            cwd=ROOT,
            timeout=60,
        )
        return done.returncode, done.stdout, done.stderr

    return call


@pytest.fixture
def policy(tmp_path):
    """A policy file that is good here and touches no guest."""
    path = tmp_path / "policy.yaml"
    path.write_text(POLICY)
    path.chmod(0o644)
    return path

"""Programs that would move what rtpind places: found by what runs and by what TuneD's profile says."""

import shutil
import subprocess
import sys

import pytest
from trees import make_tree, until

from rtpind.host.others import _running, _tuned, facts

ON = "!it moves qemu-system threads off their pCPUs; add ps_blacklist"
SCHEDULER = "[scheduler]\ngroup.qemu=0:f:1:*:.*qemu.*\n"
SPARED = SCHEDULER + "ps_blacklist=.*pmd.*;.*qemu-system.*\n"


def profile(name, text, directory="usr/lib/tuned/profiles"):
    return {f"{directory}/{name}/tuned.conf": text}


def tuned(root, active="mine", **files):
    make_tree(root, {"etc/tuned/active_profile": active} | files)
    return _tuned(True, root)


@pytest.mark.parametrize(
    ("files", "value"),
    [
        (profile("mine", "[main]\n[cpu]\ngovernor=x\n"), "off (mine)"),
        (profile("mine", SCHEDULER), "on (mine)" + ON),
        (profile("mine", SPARED), "on (mine)"),
        (profile("mine", "[mine]\ntype=scheduler\n"), "on (mine)" + ON),
        (profile("mine", "[scheduler]\nenabled=false\n"), "off (mine)"),
        (profile("mine", "[scheduler]\nenabled=0\n"), "off (mine)"),
        (profile("mine", "[scheduler]\ntype=sysctl\n"), "off (mine)"),
        (profile("mine", SCHEDULER, "etc/tuned"), "on (mine)" + ON),
        (profile("mine", SCHEDULER, "usr/lib/tuned"), "on (mine)" + ON),
        (profile("mine", "[main]\n", "etc/tuned/profiles") | profile("mine", SCHEDULER), "off (mine)"),
        ({}, "off (mine)"),  # a profile that is not there does nothing
    ],
)
def test_the_active_profile_says_whether_processes_are_moved(tmp_path, files, value):
    """The scheduler plugin counts where it is on; the administrator's directory stands before the system's."""
    assert tuned(tmp_path, **files) == value


@pytest.mark.parametrize(
    ("files", "value"),
    [
        (profile("mine", "[main]\ninclude=base\n") | profile("base", SCHEDULER), "on (mine)" + ON),
        (profile("mine", "[main]\ninclude=base\n") | profile("base", SPARED), "on (mine)"),
        (profile("mine", "[main]\ninclude=x, base\n[scheduler]\n") | profile("base", SPARED), "on (mine)"),
        (profile("mine", "[main]\ninclude=mine\n" + SCHEDULER), "on (mine)" + ON),
        (profile("mine", "[main]\ninclude=b\n") | profile("b", "[main]\ninclude=mine\n"), "off (mine)"),
        (profile("mine", "[main]\ninclude\n" + SCHEDULER), "on (mine)" + ON),
        (profile("mine", "[main]\ninclude=\n" + SCHEDULER), "on (mine)" + ON),
    ],
)
def test_included_profiles_count_too(tmp_path, files, value):
    """What a profile takes over from others is its own, and profiles that include each other come to an end."""
    assert tuned(tmp_path, **files) == value


@pytest.mark.parametrize(
    "text",
    [
        b"\xff\xfe\x00",
        b"no section\n",
        b"[unclosed\n",
        b"[main]\n[main]\n",
        b"",
        b"[scheduler]\nenabled\n",
        b"[main]\ninclude=../../../../etc/passwd,%(x)s,${f:y}\n",
    ],
)
def test_an_odd_profile_is_no_fault(tmp_path, text):
    """A damaged profile is passed over; status still has its other facts."""
    assert tuned(tmp_path, **profile("mine", text)).partition(" ")[0] in ("on", "off")


def test_several_profiles_may_be_active(tmp_path):
    """TuneD takes a list; the one with the plugin is named."""
    found = tuned(tmp_path, "one two\n", **profile("two", SPARED))

    assert found == "on (two)"


@pytest.mark.parametrize("active", [None, b"\xff\xfe"])
def test_an_unknown_profile_is_said(tmp_path, active):
    """TuneD that runs without a profile that can be read is unknown, not off."""
    if active is not None:
        make_tree(tmp_path, {"etc/tuned/active_profile": active})

    assert _tuned(True, tmp_path) == "unknown (no active profile)"
    assert _tuned(False, tmp_path) == "not running"


@pytest.fixture
def run(tmp_path):
    """Start a program under another name; ends it after the test."""
    children = []

    def start(*words):
        children.append(subprocess.Popen(words))
        return children[-1]

    yield start
    for child in children:
        child.kill()
        child.wait()


def test_the_real_programs_are_found_by_name_or_script(tmp_path, run):
    """On the real host: a program of that name, and a Python script of that name, run; reading about it does not."""
    script = tmp_path / "tuned"
    script.write_text("import time\ntime.sleep(60)\n")
    before = _running()
    if before:
        pytest.skip(f"{before} runs on this host")
    run("tail", "-qf", str(script), "/dev/null")
    reading = _running()

    shutil.copy(shutil.which("sleep"), tmp_path / "irqbalance")
    run(str(tmp_path / "irqbalance"), "60")
    run(sys.executable, "-Es", str(script), "-l")
    until(lambda: _running() == {"tuned", "irqbalance"}, "both are seen")
    found = facts(tmp_path)

    assert reading == set()
    assert found["TuneD scheduler plugin"] == "unknown (no active profile)"
    assert found["irqbalance"].startswith("running!")


def test_the_facts_are_always_two():
    """On the real host: both facts are there, whoever asks."""
    assert list(facts()) == ["TuneD scheduler plugin", "irqbalance"]

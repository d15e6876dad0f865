# SPDX-License-Identifier: GPL-2.0-or-later
"""The unit is one that systemd accepts and that lets the daemon work; the catalog explains every kind of record."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from rtpind import EXIT_CONFIG
from rtpind.core.audit import Kind

ROOT = Path(__file__).resolve().parents[2]
UNIT = ROOT / "systemd/rtpind.service"
PROC_EVENTS = ROOT / "systemd/proc-events.conf.example"
CATALOG = ROOT / "systemd/rtpind.catalog"

needs_systemd_analyze = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze")
needs_journalctl = pytest.mark.skipif(shutil.which("journalctl") is None, reason="no journalctl")


def settings() -> dict[str, list[str]]:
    """Return the values of each setting of the unit, in their order."""
    found: dict[str, list[str]] = {}
    for line in UNIT.read_text().splitlines():
        key, equals, value = line.partition("=")
        if equals and not line.startswith(("#", ";")):
            found.setdefault(key, []).append(value)
    return found


def rendered(directory: Path, text: str) -> Path:
    """Write the unit with programs that exist on any host, and return its path."""
    unit = directory / "rtpind.service"
    unit.write_text(re.sub(r"/usr/bin/rtpin(d|ctl)", shutil.which("true") or "", text))
    return unit


def entries() -> dict[str, tuple[dict[str, str], str]]:
    """Return MESSAGE_ID → (headers, text) of the catalog, by the format of journald's catalogs."""
    found: dict[str, tuple[dict[str, str], str]] = {}
    for part in re.split(r"^-- ", CATALOG.read_text(), flags=re.MULTILINE)[1:]:
        head, _, text = part.partition("\n\n")
        id_, *headers = head.splitlines()
        assert id_ not in found
        found[id_] = (dict(header.split(": ", 1) for header in headers), text)
    return found


@needs_systemd_analyze
def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    """A copy whose programs exist passes systemd-analyze verify without a word."""
    unit = rendered(tmp_path, UNIT.read_text())
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", str(unit)], capture_output=True, text=True)
    assert done.stderr.replace("\r", "") + done.stdout == ""
    assert done.returncode == 0


@needs_systemd_analyze
def test_the_rendered_copy_is_really_read(tmp_path: Path) -> None:
    """A setting that systemd does not know is told, so that silence means something."""
    unit = rendered(tmp_path, UNIT.read_text().replace("WatchdogSec=", "WatchdogSeconds="))
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", str(unit)], capture_output=True, text=True)
    assert "WatchdogSeconds" in done.stderr


@needs_systemd_analyze
def test_the_unit_stays_hardened(tmp_path: Path) -> None:
    """The exposure that systemd itself computes is 1.5 at most (10 is worst)."""
    unit = rendered(tmp_path, UNIT.read_text())
    assert exposed(unit, 15) == ""
    assert exposed(unit, 10) != ""  # so that silence means something


@needs_systemd_analyze
def test_the_proc_events_drop_in_costs_no_more_than_its_capability(tmp_path: Path) -> None:
    """With CAP_NET_ADMIN and netlink sockets the exposure is 1.7 at most."""
    unit = rendered(tmp_path, UNIT.read_text())
    drop_in(tmp_path, PROC_EVENTS.read_text())
    assert exposed(unit, 17) == ""
    assert exposed(unit, 15) != ""  # the drop-in is really read


def exposed(unit: Path, threshold: int) -> str:
    """Return what systemd-analyze says of a unit whose exposure is above ``threshold`` tenths; "" for no more."""
    command = ["systemd-analyze", "security", "--offline=true", f"--threshold={threshold}", "--no-pager", str(unit)]
    done = subprocess.run(command, capture_output=True, text=True)
    return "" if done.returncode == 0 else done.stdout + done.stderr


def drop_in(directory: Path, text: str) -> None:
    """Put a drop-in beside the rendered unit."""
    place = directory / "rtpind.service.d"
    place.mkdir(exist_ok=True)
    (place / "test.conf").write_text(text)


#: What the daemon would die under. Each is absent, and the unit says why; tests/lab/test_privilege.py shows it.
DEADLY = (
    "RestrictRealtime=",
    "SystemCallFilter=~@resources",
    "PrivateUsers=",
    "PrivateNetwork=",
    "ProtectProc=",
    "ProcSubset=",
)


@pytest.mark.parametrize("directive", DEADLY)
def test_what_the_daemon_would_die_under_is_absent_and_the_unit_says_why(directive: str) -> None:
    """Whoever hardens the unit further finds the reason where the directive would go."""
    key, _, value = directive.partition("=")
    assert not [found for found in settings().get(key, []) if value in found or not value]
    assert re.search(rf"^#   {re.escape(directive)}\s+\S+", UNIT.read_text(), re.MULTILINE)


def test_the_lab_shows_what_breaks_under_each_such_directive() -> None:
    """Each has its scenario, with the very setting in it."""
    scenario = (ROOT / "tests/lab/test_privilege.py").read_text()
    assert [directive for directive in DEADLY if f'"{directive}' not in scenario] == []


@pytest.mark.parametrize("key", ["Requires", "BindsTo", "Wants", "Requisite", "PartOf"])
def test_it_is_not_tied_to_libvirt(key: str) -> None:
    """It outlives libvirt's restarts, and starts no libvirt that the operator has stopped."""
    assert key not in settings()


@needs_systemd_analyze
def test_the_calls_that_place_threads_are_allowed() -> None:
    """The two calls are in @resources, which @system-service has, and in no set that is taken out."""
    taken_out = [value.removeprefix("~") for value in settings()["SystemCallFilter"] if value.startswith("~")]
    assert settings()["SystemCallFilter"][0] == "@system-service"

    def calls(*sets: str) -> set[str]:
        done = subprocess.run(["systemd-analyze", "syscall-filter", *sets], capture_output=True, text=True, check=True)
        return set(done.stdout.split())

    assert not {"sched_setaffinity", "sched_setscheduler", "@resources"} & calls(*taken_out)
    assert {"sched_setaffinity", "sched_setscheduler"} <= calls("@resources")


def test_it_has_one_capability_and_a_user_of_its_own() -> None:
    """CAP_SYS_NICE alone, also as the most that it could get; the state is that user's."""
    found = settings()
    assert (found["User"], found["Group"]) == (["rtpind"], ["rtpind"])
    assert found["AmbientCapabilities"] == found["CapabilityBoundingSet"] == ["CAP_SYS_NICE"]
    assert found["NoNewPrivileges"] == ["yes"]
    assert not [key for key, values in found.items() if key.startswith("Exec") and values[0][0] in "+!"]


def test_lifecycle_settings() -> None:
    """Type=notify with a watchdog, no restart on a bad policy, a checked reload, a state that outlives the daemon."""
    found = settings()
    assert found["Type"] == ["notify"]  # systemd 252 has no notify-reload
    assert found["RestartPreventExitStatus"] == [str(EXIT_CONFIG)]
    assert found["ExecReload"] == ["/usr/bin/rtpinctl check-config", "/bin/kill -HUP $MAINPID"]
    assert found["RuntimeDirectory"] == ["rtpind"]
    assert found["RuntimeDirectoryPreserve"] == ["yes"]
    assert found["LogRateLimitIntervalSec"] == ["0"]
    assert "WatchdogSec" in found
    after = " ".join(found["After"]).split()
    assert {"libvirtd.socket", "virtqemud.socket", "libvirtd.service", "virtqemud.service"} <= set(after)


def test_the_catalog_has_every_kind_of_record_and_no_other() -> None:
    """The MESSAGE_IDs of the catalog are those of the code."""
    assert set(entries()) == {kind.value for kind in Kind}


@pytest.mark.parametrize("kind", Kind, ids=lambda kind: kind.name)
def test_an_entry_is_well_formed(kind: Kind) -> None:
    """Headers that journald knows, a subject that fits a line, a text, and only fields that rtpind sends."""
    headers, text = entries()[kind.value]
    assert re.fullmatch(r"[0-9a-f]{32}", kind.value)
    assert headers.keys() == {"Subject", "Defined-By", "Support", "Documentation"}
    assert headers["Defined-By"] == "rtpind"
    assert len(headers["Subject"]) <= 80
    assert len(text.split()) > 20
    assert set(re.findall(r"@(\w+)@", headers["Subject"] + text)) <= sent_fields()
    assert text.count("@") % 2 == 0
    assert all(len(line) <= 100 for line in text.splitlines())


def sent_fields() -> set[str]:
    """Return the fields that the sources put into records."""
    sources = [ROOT / "rtpind/core/audit.py", ROOT / "rtpind/core/notices.py"]
    names = {name for source in sources for name in re.findall(r'"([A-Z][A-Z_]+)"', source.read_text())}
    return {f"RTPIND_{name}" for name in names | {"LINE"}}


@needs_journalctl
def test_journald_compiles_the_catalog(tmp_path: Path) -> None:
    """What journald uses takes the catalog, and gives each entry back."""
    place = tmp_path / "usr/lib/systemd/catalog"
    place.mkdir(parents=True)
    shutil.copy(CATALOG, place)
    done = subprocess.run(["journalctl", f"--root={tmp_path}", "--update-catalog"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    listed = subprocess.run(["journalctl", f"--root={tmp_path}", "--list-catalog"], capture_output=True, text=True)
    rows = dict(row.split(" ", 1) for row in listed.stdout.splitlines())
    assert rows == {id_: f"rtpind: {headers['Subject']}" for id_, (headers, _) in entries().items()}

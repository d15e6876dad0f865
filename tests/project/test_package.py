# SPDX-License-Identifier: GPL-2.0-or-later
"""The Debian package: what is in it, what it needs, and that installing and removing it surprises nobody."""

from __future__ import annotations

import argparse
import ast
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest

import rtpind
from rtpind.ctl.main import parser as ctl_parser
from rtpind.daemon.main import parser as daemon_parser

ROOT = Path(__file__).resolve().parents[2]
DEBIAN = ROOT / "debian"
MODULES = "usr/lib/python3/dist-packages"
UNIT = "usr/lib/systemd/system/rtpind.service"

#: Module → Debian package, for whatever the sources may import that is not Python's own.
PACKAGES = {
    "jsonschema": "python3-jsonschema",
    "libvirt": "python3-libvirt",
    "prometheus_client": "python3-prometheus-client",
    "psutil": "python3-psutil",
    "pyudev": "python3-pyudev",
    "rich": "python3-rich",
    "ruamel": "python3-ruamel.yaml",
    "systemd": "python3-systemd",
}
#: The packages above by their names in pyproject.toml.
DISTRIBUTIONS = {"libvirt-python": "python3-libvirt", "systemd-python": "python3-systemd"}

#: A remark of lintian's (no warning) that stays: an init script could give the daemon no watchdog, no notify socket and
#: no ambient capability. There is no override, because Debian 13's lintian does not know the tag (an error there).
REMARKS = {"package-supports-alternative-init-but-no-init.d-script"}

# Installing what the package is built with may take longer than a test usually may.
pytestmark = pytest.mark.timeout(600)


@dataclass(frozen=True, slots=True)
class Deb:
    """The built package, and its two halves unpacked."""

    file: Path
    control: Path
    tree: Path

    def field(self, name: str) -> str:
        """Return a field of the control file."""
        return output("dpkg-deb", "--field", str(self.file), name).strip()


def output(*words: str, **more: object) -> str:
    """Return what a command prints; it must succeed."""
    done = subprocess.run(words, capture_output=True, text=True, stdin=subprocess.DEVNULL, **more)  # type: ignore[call-overload]
    assert done.returncode == 0, done.stdout + done.stderr
    return str(done.stdout)


def why_not_buildable() -> str | None:
    """Return what keeps the package from being built here; None when nothing does, or tools/deb can see to it."""
    if shutil.which("apt-get") is None:
        return "not Debian"
    if os.environ.get("RTPIND_REQUIRE_LIVE") == "1" and os.geteuid() == 0:
        return None
    if shutil.which("lintian") is None or shutil.which("dpkg-checkbuilddeps") is None:
        return "lintian or dpkg-dev is not installed (make deb installs them)"
    done = subprocess.run(["dpkg-checkbuilddeps", str(DEBIAN / "control")], capture_output=True, text=True)
    return None if done.returncode == 0 else f"{done.stderr.strip()} (make deb installs them)"


@pytest.fixture(scope="module")
def deb(tmp_path_factory: pytest.TempPathFactory) -> Deb:
    """Build the package once."""
    why = why_not_buildable()
    if why is not None:
        pytest.skip(why)
    place = tmp_path_factory.mktemp("deb")
    output(str(ROOT / "tools/deb"), str(place / "built"))
    (file,) = (place / "built").iterdir()
    output("dpkg-deb", "--raw-extract", str(file), str(place / "tree"))
    (place / "tree/DEBIAN").rename(place / "control")
    return Deb(file, place / "control", place / "tree")


# --- what is in it ----------------------------------------------------------------------------------------------


def test_it_holds_what_it_should(deb: Deb) -> None:
    """The programs, every module of the sources, and all that surrounds them; nothing that was lying about."""
    found = {str(path.relative_to(deb.tree)) for path in deb.tree.rglob("*") if not path.is_dir()}
    sources = [path for kind in ("py", "json", "typed") for path in (ROOT / "rtpind").rglob(f"*.{kind}")]
    modules = {f"{MODULES}/{path.relative_to(ROOT)}" for path in sources}
    wanted = {
        "etc/rtpind.yaml",
        "usr/bin/rtpinctl",
        "usr/bin/rtpind",
        UNIT,
        "usr/lib/systemd/catalog/rtpind.catalog",
        "usr/lib/sysusers.d/rtpind.conf",
        "usr/lib/tmpfiles.d/rtpind.conf",
        "usr/share/bash-completion/completions/rtpinctl",
        "usr/share/bash-completion/completions/rtpind",
        "usr/share/doc/rtpind/README.Debian",
        "usr/share/doc/rtpind/README.md.gz",
        "usr/share/doc/rtpind/changelog.Debian.gz",
        "usr/share/doc/rtpind/changelog.gz",
        "usr/share/doc/rtpind/copyright",
        "usr/share/doc/rtpind/examples/metrics.conf.example",
        "usr/share/doc/rtpind/examples/proc-events.conf.example",
        "usr/share/man/man1/rtpinctl.1.gz",
        "usr/share/man/man5/rtpind.yaml.5.gz",
        "usr/share/man/man8/rtpind.8.gz",
        "usr/share/rtpind/rtpind.schema.json",
        "usr/share/rtpind/rtpind.yaml",
        "usr/share/zsh/vendor-completions/_rtpinctl",
    }
    told = {name for name in found if not name.startswith(f"{MODULES}/rtpind-")}  # pip's metadata
    assert told == wanted | modules


def test_root_owns_it_and_nobody_else_may_write(deb: Deb) -> None:
    """Every file belongs to root, may be read by all, and is written by its owner only."""
    for line in output("dpkg-deb", "--contents", str(deb.file)).splitlines():
        mode, owner = line.split()[:2]
        assert owner == "root/root", line
        assert re.fullmatch(r"d(rwxr-xr-x)|-rwxr-xr-x|-rw-r--r--|lrwxrwxrwx", mode), line


def test_the_policy_is_the_only_conffile_and_names_its_schema(deb: Deb) -> None:
    """An edited policy survives an upgrade. But for the path of its schema it is the shipped one, which observes."""
    assert (deb.control / "conffiles").read_text().split() == ["/etc/rtpind.yaml"]
    shipped = (ROOT / "etc/rtpind.yaml").read_text()
    installed = (deb.tree / "etc/rtpind.yaml").read_text()
    assert installed.replace("$schema=/usr/share/rtpind/", "$schema=") == shipped
    assert (deb.tree / "usr/share/rtpind/rtpind.yaml").read_text() == shipped
    match = re.search(r"\$schema=/(\S+)", installed)
    assert match is not None
    assert json.loads((deb.tree / match[1]).read_text())["title"].startswith("rtpind policy")
    assert "\nmode: observe " in installed


def test_one_version(deb: Deb) -> None:
    """The package, the program, pyproject.toml and the changelog agree."""
    assert deb.field("Version") == rtpind.__version__
    assert deb.file.name == f"rtpind_{rtpind.__version__}_all.deb"
    assert project()["version"] == rtpind.__version__


# --- what it needs ----------------------------------------------------------------------------------------------


def project() -> dict[str, object]:
    """Return [project] of pyproject.toml."""
    found: dict[str, object] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return found


def test_it_depends_on_what_the_sources_import(deb: Deb) -> None:
    """Every module that is not Python's own comes from a package that is a dependency, and no other is."""
    imported: set[str] = set()
    for path in (ROOT / "rtpind").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {name.name.partition(".")[0] for name in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
                imported.add(node.module.partition(".")[0])
    foreign = imported - sys.stdlib_module_names - {"rtpind"}
    needed = deb.field("Depends").split(", ")
    given = {word.partition(" ")[0] for word in needed} & {*PACKAGES.values()}
    assert {PACKAGES[name] for name in foreign} == given


def test_its_lower_bounds_are_those_of_pyproject(deb: Deb) -> None:
    """Each dependency of pyproject.toml is there with the same bound; so are Python's and what the unit calls."""
    needed = deb.field("Depends").split(", ")
    wanted = project()["dependencies"]
    assert isinstance(wanted, list)
    for word in wanted:
        name, _, bound = word.partition(">=")
        assert f"{DISTRIBUTIONS.get(name, f'python3-{name}')} (>= {bound})" in needed
    assert f"python3:any ({str(project()['requires-python']).replace('>=', '>= ')}~)" in needed
    assert {"polkitd", "procps"} <= set(needed)  # libvirt's read-only socket; /bin/kill


# --- what installing, upgrading and removing do -------------------------------------------------------------------


def parts(script: Path) -> tuple[str, str]:
    """Return what of a maintainer script was written by hand, and what debhelper added."""
    added = re.compile(r"# Automatically added by .*?# End automatically added section\n", re.DOTALL)
    text = script.read_text()
    return re.sub(r"\n{2,}", "\n\n", added.sub("", text)).strip(), "".join(added.findall(text))


def test_maintainer_scripts_are_debhelpers_and_what_is_written_by_hand_is_little(deb: Deb) -> None:
    """Beside debhelper's parts there are the stop at a removal and the purge of /run/rtpind."""
    scripts = {path.name for path in deb.control.iterdir()} - {"conffiles", "control", "md5sums"}
    assert scripts == {"postinst", "postrm", "prerm"}
    for name in scripts:
        source = DEBIAN / f"rtpind.{name}"
        text = source.read_text().replace("#DEBHELPER#", "") if source.exists() else "#!/bin/sh\nset -e\n"
        assert parts(deb.control / name)[0] == text.strip()


def test_an_install_starts_nothing_and_an_upgrade_restarts_only_what_runs(deb: Deb) -> None:
    """The unit is neither enabled nor started; an upgrade does try-restart; only a removal stops."""
    postinst = parts(deb.control / "postinst")[1]
    assert "systemd-sysusers" in postinst
    assert re.findall(r"deb-systemd-invoke (\S+)", postinst) == ["try-restart"]
    # "enable" only renews the links of a unit that the operator had enabled.
    before_enable = postinst.partition("deb-systemd-helper enable")[0]
    assert before_enable.rstrip().splitlines()[-2].strip().startswith("if deb-systemd-helper --quiet was-enabled")
    prerm = (deb.control / "prerm").read_text()
    assert re.findall(r"deb-systemd-invoke (\S+)", prerm) == ["stop"]
    assert '[ "$1" = remove ] && ' in prerm


def test_nothing_releases_a_guest(deb: Deb) -> None:
    """Neither a script nor the unit runs rtpinctl to put guests back, or stops with more than a signal."""
    assert all("rtpinctl" not in (deb.control / name).read_text() for name in ("postinst", "postrm", "prerm"))
    assert not re.search(r"^Exec(Stop|StopPost)=", (deb.tree / UNIT).read_text(), re.MULTILINE)


def test_a_removal_keeps_what_threads_had_and_a_purge_does_not(deb: Deb, tmp_path: Path) -> None:
    """Run the script as dpkg --root does."""
    state = tmp_path / "run/rtpind"
    state.mkdir(parents=True)
    (state / "ledger.json").write_text("{}")
    environment = {**os.environ, "DPKG_ROOT": str(tmp_path), "DPKG_MAINTSCRIPT_PACKAGE": "rtpind"}
    for how in ("remove", "upgrade"):
        output("sh", str(deb.control / "postrm"), how, env=environment)
        assert (state / "ledger.json").exists()
    output("sh", str(deb.control / "postrm"), "purge", env=environment)
    assert not state.exists()


def test_the_unit_has_the_user_that_it_names(deb: Deb, tmp_path: Path) -> None:
    """A user and group rtpind without a login are made, and the unit runs as no other."""
    if shutil.which("systemd-sysusers") is None:
        pytest.skip("no systemd-sysusers")
    (tmp_path / "etc").mkdir()
    output("systemd-sysusers", f"--root={tmp_path}", str(deb.tree / "usr/lib/sysusers.d/rtpind.conf"))
    users = [line.split(":") for line in (tmp_path / "etc/passwd").read_text().splitlines()]
    assert [(user[0], user[5], user[6]) for user in users] == [("rtpind", "/", "/usr/sbin/nologin")]
    found = re.findall(r"^(User|Group)=(.*)", (deb.tree / UNIT).read_text(), re.MULTILINE)
    assert found == [("User", "rtpind"), ("Group", "rtpind")]
    if shutil.which("systemd-tmpfiles") and os.geteuid() == 0:
        output("systemd-tmpfiles", f"--root={tmp_path}", "--create", str(deb.tree / "usr/lib/tmpfiles.d/rtpind.conf"))
        state = (tmp_path / "run/rtpind").stat()
        assert (state.st_uid, state.st_gid, state.st_mode & 0o777) == (int(users[0][2]), int(users[0][3]), 0o755)


def test_the_user_is_there_before_what_belongs_to_it(deb: Deb) -> None:
    """Postinst makes the user, then the directory, then touches the service; a purge leaves the user."""
    postinst = (deb.control / "postinst").read_text()
    places = [postinst.index(word) for word in ("systemd-sysusers", "systemd-tmpfiles", "try-restart")]
    assert places == sorted(places)
    assert "deluser" not in (deb.control / "postrm").read_text()


@pytest.mark.parametrize(("name", "key"), [("proc-events", "CapabilityBoundingSet="), ("metrics", "ReadWritePaths=")])
def test_systemd_accepts_a_shipped_drop_in(deb: Deb, tmp_path: Path, name: str, key: str) -> None:
    """The unit with it passes systemd-analyze verify without a word."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("no systemd-analyze")
    unit = tmp_path / "rtpind.service"
    unit.write_text(re.sub(r"/usr/bin/rtpin(d|ctl)", shutil.which("true") or "", (deb.tree / UNIT).read_text()))
    drop_ins = tmp_path / "rtpind.service.d"
    drop_ins.mkdir()
    drop_in = drop_ins / f"{name}.conf"
    shutil.copy(deb.tree / f"usr/share/doc/rtpind/examples/{name}.conf.example", drop_in)

    def verify() -> str:
        words = ["systemd-analyze", "verify", "--man=no", str(unit)]
        return subprocess.run(words, capture_output=True, text=True).stderr

    assert verify() == ""
    drop_in.write_text(drop_in.read_text().replace(f"\n{key}", "\nNoSuchSetting="))
    assert "NoSuchSetting" in verify()


# --- that it works ------------------------------------------------------------------------------------------------


def test_lintian_has_no_complaint(deb: Deb) -> None:
    """No error, no warning, and no remark but the known one."""
    told = output("lintian", "--allow-root", "--display-info", "--pedantic", "--fail-on=error,warning", str(deb.file))
    tags = {line.split()[2] for line in told.splitlines() if not line.startswith("N:")}
    assert tags <= REMARKS


def test_the_systems_python_runs_it(deb: Deb) -> None:
    """Every module can be imported from the package, and both programs answer."""
    path = [str(deb.tree / MODULES)]
    theirs = output("/usr/bin/python3", "-c", "import sys; print(*sys.version_info[:2], sep='.')").strip()
    if theirs == sysconfig.get_python_version():
        path.append(sysconfig.get_path("platlib"))  # the dependencies, where the distribution's are not installed
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path), "PYTHONDONTWRITEBYTECODE": "1"}
    missing = "import jsonschema, libvirt, prometheus_client, psutil, rich, ruamel.yaml, systemd.journal"
    if subprocess.run(["/usr/bin/python3", "-P", "-c", missing], env=environment, capture_output=True).returncode != 0:
        pytest.skip("/usr/bin/python3 is another version than this one, and lacks the dependencies")
    program = (
        "import importlib, pkgutil, rtpind\n"
        "for found in pkgutil.walk_packages(rtpind.__path__, 'rtpind.'):\n"
        "    if not found.name.endswith('__main__'):\n"
        "        print(importlib.import_module(found.name).__file__)\n"
    )
    files = output("/usr/bin/python3", "-P", "-c", program, env=environment).splitlines()
    assert len(files) > 30
    assert all(file.startswith(str(deb.tree)) for file in files)
    for name in ("rtpind", "rtpinctl"):
        file = deb.tree / "usr/bin" / name
        assert file.read_text().splitlines()[0] == "#!/usr/bin/python3"
        assert output(str(file), "--version", env=environment) == f"{name} {rtpind.__version__}\n"
    shipped = str(deb.tree / "etc/rtpind.yaml")
    told = output(str(deb.tree / "usr/bin/rtpinctl"), "check-config", shipped, env=environment)
    assert "good, mode observe, 0 rules" in told


# --- shell completion (of the sources) ----------------------------------------------------------------------------


def long_options(parser: argparse.ArgumentParser) -> set[str]:
    """Return the options of a parser in their long form."""
    return {word for action in parser._actions for word in action.option_strings if word.startswith("--")}


def commands() -> dict[str, argparse.ArgumentParser]:
    """Return rtpinctl's commands."""
    (found,) = (action for action in ctl_parser()._actions if isinstance(action, argparse._SubParsersAction))
    return dict(found.choices)


def completed(program: str, *words: str) -> set[str]:
    """Return what bash offers after these words."""
    script = (
        '_init_completion() { cword=$((${#COMP_WORDS[@]} - 1)); words=("${COMP_WORDS[@]}"); '
        "cur=${words[cword]}; prev=${words[cword - 1]}; }\n"
        f". {DEBIAN}/completions/{program}\n"
        f'COMP_WORDS=("$@"); _{program}; printf "%s\\n" "${{COMPREPLY[@]}}"\n'
    )
    return set(output("bash", "-c", script, "bash", program, *words).split())


def test_bash_completes_every_command_and_option() -> None:
    """No more and no less than the parsers know: after a change of rtpinctl, debian/completions want it too."""
    assert completed("rtpinctl", "") == commands().keys()
    assert completed("rtpinctl", "--") == long_options(ctl_parser())
    assert completed("rtpind", "--") == long_options(daemon_parser())
    for name, parser in commands().items():
        assert completed("rtpinctl", name, "--") == long_options(parser), name


def test_zsh_knows_every_command_and_option() -> None:
    """As far as that can be read off the file."""
    text = (DEBIAN / "completions/_rtpinctl").read_text()
    for name in commands():
        assert f"\n    '{name}:" in text
        assert re.search(rf"^ +(.* \| )?{name}( \| .*)?\) _arguments", text, re.MULTILINE), name
    options = set().union(*(long_options(parser) for parser in [ctl_parser(), daemon_parser(), *commands().values()]))
    assert options == set(re.findall(r"--[a-z][a-z-]*", text))
    if shutil.which("zsh"):
        output("zsh", "-n", str(DEBIAN / "completions/_rtpinctl"))

# SPDX-License-Identifier: GPL-2.0-or-later
"""Puts rtpind on a lab host: the Debian package when there is one to test, else the source tree."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from pathlib import Path

from lab.host import ROOT, LabHost

#: The package to test; None: the source tree.
PACKAGE = Path(os.environ["RTPIND_LAB_DEB"]) if os.environ.get("RTPIND_LAB_DEB") else None
#: Where packages are put on the lab host.
INBOX = "/root/dist"

_WRAPPER = '#!/bin/sh\nPYTHONPATH=/opt/rtpind exec /usr/bin/python3 -m {} "$@"\n'
_UNITS = {
    "rtpind.service": "etc/systemd/system/rtpind.service",
    "rtpind.sysusers.conf": "usr/lib/sysusers.d/rtpind.conf",
    "rtpind.tmpfiles.conf": "usr/lib/tmpfiles.d/rtpind.conf",
    "rtpind.catalog": "usr/lib/systemd/catalog/rtpind.catalog",
}


def install(host: LabHost) -> None:
    """Install the package that RTPIND_LAB_DEB names, or the source tree with the distribution's Python packages."""
    host.push({"opt/rtpind/demo": ROOT / "demo"})
    if PACKAGE is not None:
        install_package(host, PACKAGE)
    else:
        install_source(host)


def install_package(host: LabHost, package: Path) -> None:
    """Install a Debian package; its dependencies are in the image. dpkg takes two thirds of the time that apt does."""
    host.run(f"dpkg -i {push_package(host, package)}", timeout_s=300)


def push_package(host: LabHost, package: Path) -> str:
    """Put a package on the lab host, and no other; return where."""
    host.run(f"rm -rf {INBOX}")
    host.push({f"{INBOX}/{package.name}": package})
    return f"{INBOX}/{package.name}"


def newer(package: Path, directory: Path) -> Path:
    """Return the same package with a higher version, made in ``directory``."""
    with tempfile.TemporaryDirectory(dir=directory) as tree:
        subprocess.run(["dpkg-deb", "-R", package, tree], check=True)
        control = Path(tree, "DEBIAN/control")
        control.write_text(re.sub(r"^(Version: .*)$", r"\1+lab1", control.read_text(), flags=re.MULTILINE))
        made = directory / package.name.replace("_all", "+lab1_all")
        command = ["dpkg-deb", "--root-owner-group", "-b", tree, str(made)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return made


def install_source(host: LabHost) -> None:
    """Put the source tree where a package would; the programs run it with the distribution's Python."""
    files: dict[str, str | bytes | Path] = {
        "opt/rtpind/rtpind": ROOT / "rtpind",
        "usr/bin/rtpind": _WRAPPER.format("rtpind"),
        "usr/bin/rtpinctl": _WRAPPER.format("rtpind.ctl.main"),
        "etc/rtpind.yaml": ROOT / "etc/rtpind.yaml",
    }
    for name, target in _UNITS.items():
        if (ROOT / "systemd" / name).exists():
            files[target] = ROOT / "systemd" / name
    host.push(files)
    host.run("python3 -m compileall -q /opt/rtpind")
    host.run("systemd-sysusers && systemd-tmpfiles --create && systemctl daemon-reload", check=False)

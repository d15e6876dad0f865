# SPDX-License-Identifier: GPL-2.0-or-later
"""Writes the tables and the machine's description into a page, between markers, and plots beside it."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from bench import plot
from bench.contenders import Contender
from bench.results import Table


def write(page: Path, sections: Mapping[str, str]) -> None:
    """Replace what stands between ``<!-- bench KEY -->`` and ``<!-- end KEY -->``; all else in the page stays.

    Raises ValueError, and writes nothing, when the page has no such markers for one of the keys.
    """
    text = page.read_text()
    for key, section in sections.items():
        before, begin, rest = text.partition(f"<!-- bench {key} -->\n")
        _, end, after = rest.partition(f"<!-- end {key} -->\n")
        if not begin or not end:
            raise ValueError(f"{page} has no markers for {key}")
        text = f"{before}{begin}\n{section}\n\n{end}{after}"
    page.write_text(text)


def section(table: Table, page: Path, circumstances: str) -> str:
    """Return a table with what belongs to it; writes its plot beside the page, as bench-KEY.svg."""
    picture = page.with_name(f"bench-{table.key}.svg")
    picture.write_text(plot.svg(table))
    parts = (
        f"### {table.title}",
        table.text,
        markdown(table.rows()),
        f"{circumstances} {table.circumstances()}",
        f"![{table.title}]({picture.name})",
    )
    return "\n\n".join(parts)


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Return a table; the first row is its heading."""
    head, *rest = [[cell.replace("|", "\\|").replace("<", "&lt;") for cell in row] for row in rows]
    lines = [head, ["---"] * len(head), *rest]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def machine() -> str:
    """Describe this machine in one sentence."""
    info = Path("/proc/cpuinfo").read_text()
    model = re.search(r"^model name\s*: (.*)$", info, re.MULTILINE)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGESIZE") / 2**30
    virtual = "A virtual machine" if re.search(r"^flags.*\bhypervisor\b", info, re.MULTILINE) else "A bare machine"
    cgroups = "v2" if Path("/sys/fs/cgroup/cgroup.controllers").exists() else "v1"
    return (
        f"{virtual} with {os.cpu_count()} CPUs ({model[1] if model else platform.machine()}), {memory:.0f} GiB, "
        f"Linux {platform.release()}, cgroup {cgroups}, {_version('virsh', 'libvirt')}, "
        f"{_version('qemu-system-x86_64', 'QEMU')}, Python {platform.python_version()}"
    )


def commit(root: Path) -> str:
    """Name the last commit that touched rtpind itself, and say whether there were changes to it since."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(root), *words, "--", "rtpind"]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    return f"rtpind of commit {git('log', '-1', '--format=%h') or '?'}{' with changes' if git('diff', 'HEAD') else ''}"


def _version(program: str, name: str) -> str:
    done = subprocess.run([program, "--version"], capture_output=True, text=True, check=False)
    found = re.search(r"\d+\.\d+[\d.]*", done.stdout)
    return f"{name} {found[0] if found else '?'}"


def who(contenders: Sequence[Contender], absent: dict[str, str]) -> str:
    """Say who is compared, and who is not and why."""
    lines = [f"- **{one.name.replace('<', '&lt;')}**: {one.text}" for one in contenders]
    lines += [f"- {name.replace('<', '&lt;')} is left out: {reason}" for name, reason in absent.items()]
    return "\n".join(lines)

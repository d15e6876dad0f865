# SPDX-License-Identifier: GPL-2.0-or-later
"""Reads cgroups, version 1 and 2: in which one a thread is, who else is there, and what it allows. Writes nothing."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rtpind.core.cpuset import CpuListError, CpuSet
from rtpind.core.model import Kind, Limits
from rtpind.host.kernelfile import read

#: A node counts from this share of a guest's memory: interleaved over eight nodes each still does, and the heap of
#: QEMU or a few pages that went elsewhere do not.
_SHARE = 8
#: With less than this there is little else than QEMU's own heap (15 to 40 MiB), which says nothing of the guest.
_ENOUGH_BYTES = 64 * 1024 * 1024
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_ON_NODE = re.compile(r"\bN(\d{1,4})=(\d{1,18})\b", re.ASCII)

#: Version 1 hierarchies into which libvirt moves vCPU and iothread threads (virCgroupAddThread).
_THREADED = ("cpuset", "cpu", "cpuacct")


@dataclass(frozen=True, slots=True)
class Groups:
    """The cgroup paths of one thread by controller; "" is the version 2 hierarchy."""

    paths: Mapping[str, str]

    @property
    def path(self) -> str:
        """The path that decides affinity: of cpuset on version 1, else of version 2, else of cpu."""
        return next((self.paths[name] for name in ("cpuset", "", "cpu") if self.paths.get(name, "/") != "/"), "/")

    @property
    def leaf(self) -> str:
        """Last part of the path; "" unless every hierarchy that libvirt moves threads in agrees.

        libvirt moves a thread one hierarchy after the other; in between they differ, and FIFO would make the
        next move fail (RT_GROUP_SCHED, sched_rt_can_attach).
        """
        # Where both are version 1, version 2 is systemd's alone (hybrid layout): its leaf there is the scope.
        threaded = _THREADED if {"cpuset", "cpu"} <= self.paths.keys() else (*_THREADED, "")
        leaves = {self.paths[name].rpartition("/")[2] for name in threaded if self.paths.get(name, "/") != "/"}
        return leaves.pop() if len(leaves) == 1 else ""


def parse(raw: bytes) -> Groups:
    """Read the content of /proc/PID/cgroup."""
    paths: dict[str, str] = {}
    for line in raw.decode("utf-8", "replace").split(
        "\n"
    ):  # not splitlines(): a cgroup's name may hold what that takes for a line's end
        _, _, rest = line.partition(":")
        controllers, found, path = rest.partition(":")
        if not found:
            continue
        for name in controllers.split(","):
            paths[name] = path
    return Groups(paths)


class Cgroups:
    """The mounted cgroup hierarchies below ``root``."""

    def __init__(self, root: Path = Path("/")) -> None:
        self._root = root
        self._proc = str(root / "proc")
        self.mounts = _mounts(root)

    def of(self, pid: int, tid: int) -> Groups:
        """Return the cgroups of a thread. Raises OSError (ESRCH, ENOENT) when it is gone."""
        return parse(self.text(pid, tid))

    def text(self, pid: int, tid: int) -> bytes:
        """Return what :func:`parse` reads. Raises OSError when the thread is gone."""
        return read(f"{self._proc}/{pid}/task/{tid}/cgroup")

    def above(self, path: str) -> str | None:
        """Return the directory in which libvirt makes ``vcpuN`` and ``iothreadN``, from a guest's emulator cgroup."""
        parent, _, leaf = path.rpartition("/")
        found = (f"{self.mounts[name]}{parent}" for name in ("cpuset", "", "cpu") if name in self.mounts)
        return next((where for where in found if os.path.isdir(where)), None) if leaf == "emulator" else None

    def threads(self, groups: Groups) -> list[int]:
        """Return the tids in the same cgroup: ``tasks`` on version 1, ``cgroup.threads`` on 2; empty when gone."""
        for controller, name in (("cpuset", "tasks"), ("cpu", "tasks"), ("", "cgroup.threads")):
            mount, path = self.mounts.get(controller), groups.paths.get(controller, "/")
            if mount is None or path == "/":
                continue
            try:
                return [int(tid) for tid in read(f"{mount}{path}/{name}").split()]
            except OSError:
                continue
        return []

    def limits(self, pid: int, tid: int, kind: Kind = Kind.QEMU) -> Limits:
        """Return what a thread's cgroups allow it; ``pid`` is its guest's."""
        try:
            groups = self.of(pid if kind is Kind.QEMU else tid, tid)
        except OSError:
            return Limits()
        fence, fenced_by = self._fence(groups)
        return Limits(fence, fenced_by, self._budget(groups))

    def _fence(self, groups: Groups) -> tuple[CpuSet | None, str]:
        """Return the pCPUs of the cpuset, and the topmost cgroup that has no more than those."""
        for controller, name in (("cpuset", "cpuset.effective_cpus"), ("", "cpuset.cpus.effective")):
            mount, path = self.mounts.get(controller), groups.paths.get(controller, "/")
            if mount is None:
                continue
            fence: CpuSet | None = None
            where = ""
            while True:
                cpus = _cpus(f"{mount}{path.rstrip('/')}/{name}")
                if cpus is not None and fence is not None and cpus != fence:
                    break
                if cpus is not None:
                    fence, where = cpus, path or "/"
                if path in ("", "/"):
                    break
                path = path.rpartition("/")[0]
            if fence is not None:
                return fence, where
        return None, ""

    def _budget(self, groups: Groups) -> int | None:
        mount = self.mounts.get("cpu")
        text = _read(f"{mount}{groups.paths.get('cpu', '/')}/cpu.rt_runtime_us") if mount else None
        return None if text is None else int(text)

    def nodes(self, pid: int) -> CpuSet:
        """Return the NUMA nodes that the memory of the guest whose QEMU is ``pid`` is on; empty: little, or unknown.

        By its memory cgroup, which counts no hugetlb pages. Locked pages are not among the anonymous ones of version 1,
        shared ones not among those of version 2.
        """
        try:
            groups = self.of(pid, pid)
        except OSError:
            return CpuSet()
        found: dict[int, int] = {}
        version1, version2 = self.mounts.get("memory"), self.mounts.get("")
        path = groups.paths.get("memory", "/")
        if version1 is not None and path != "/":
            pages = _by_node(_read(f"{version1}{path}/memory.numa_stat") or "", ("anon", "unevictable"))
            found = {node: count * _PAGE_BYTES for node, count in pages.items()}
        elif version2 is not None:
            texts = (_read(f"{version2}{own}/memory.numa_stat") for own in _own(groups.paths.get("", "/")))
            found = _by_node(next((text for text in texts if text), ""), ("anon", "shmem"))
        total = sum(found.values())
        if total < _ENOUGH_BYTES:
            return CpuSet()
        return CpuSet(node for node, size in found.items() if size * _SHARE >= total)

    def isolated(self) -> CpuSet:
        """Return the pCPUs of isolated cpuset partitions (cgroup 2, cpuset.cpus.isolated since Linux 6.7)."""
        mount = self.mounts.get("")
        return (_cpus(f"{mount}/cpuset.cpus.isolated") if mount else None) or CpuSet()

    def rt_groups(self) -> bool:
        """Return whether a version 1 cpu controller has realtime budgets: RT_GROUP_SCHED is on."""
        mount = self.mounts.get("cpu")
        return mount is not None and os.path.exists(f"{mount}/cpu.rt_runtime_us")


def _mounts(root: Path) -> dict[str, str]:
    """Return mount points by controller, from mountinfo (proc(5)); "" is cgroup 2."""
    found: dict[str, str] = {}
    for line in (_read(str(root / "proc/self/mountinfo")) or "").split("\n"):
        before, _, after = line.partition(" - ")
        kind, _, options = [*after.split(" ", 2), "", ""][:3]
        if kind not in ("cgroup", "cgroup2"):
            continue
        point = str(root) + before.split(" ")[4].replace("\\040", " ") if str(root) != "/" else before.split(" ")[4]
        for name in [""] if kind == "cgroup2" else options.split(","):
            found.setdefault(name, point)
    return found


def _own(path: str) -> list[str]:
    """Return the cgroups of version 2 that are one guest's alone, the innermost first.

    libvirt's emulator, vcpuN … are threaded cgroups, which have no memory controller; it is with what is above them:
    ``NAME.scope/libvirt`` or the scope itself.
    """
    above, _, leaf = path.rpartition("/")
    if leaf != "emulator":
        return []
    scope, _, name = above.rpartition("/")
    return [path, above, scope] if name == "libvirt" else [path, above]


def _by_node(text: str, kinds: tuple[str, ...]) -> dict[int, int]:
    """Sum up lines of memory.numa_stat: ``anon N0=1 N1=2`` (version 2, bytes), ``anon=3 N0=1 N1=2`` (1, pages)."""
    found: dict[int, int] = {}
    for line in text.splitlines():
        kind, _, sizes = line.partition(" ")
        if kind.partition("=")[0] in kinds:
            for node, size in _ON_NODE.findall(sizes):
                found[int(node)] = found.get(int(node), 0) + int(size)
    return found


def _read(path: str) -> str | None:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return None


def _cpus(path: str) -> CpuSet | None:
    text = _read(path)
    try:
        return None if text is None or not text.strip() else CpuSet.parse(text)
    except CpuListError:
        return None

# SPDX-License-Identifier: GPL-2.0-or-later
"""Reads the host's facts: pCPUs, isolation, and what the kernel does with realtime threads. Changes nothing."""

from __future__ import annotations

import gzip
import os
import re
import zlib
from pathlib import Path

from rtpind.core.cpuset import CpuListError, CpuSet
from rtpind.core.model import Host
from rtpind.core.topology import Topology
from rtpind.host.cgroup import Cgroups
from rtpind.host.proc import Proc

_CAP_SYS_NICE = 23
_NODES = "sys/devices/system/node"
#: Below a FIFO vCPU that never sleeps, these starve and take the host with them (facts: priority lattice).
_GUARDS = ("rcuc", "ktimers", "ksoftirqd")


class HostFacts:
    """The facts of the host below ``root``. What cannot change while the kernel runs is read once."""

    def __init__(self, cgroups: Cgroups, proc: Proc, root: Path = Path("/"), release: str | None = None) -> None:
        self._root = root
        self._cgroups = cgroups
        self._proc = proc
        self._release = release if release is not None else os.uname().release
        version = re.match(r"(\d+)\.(\d+)", self._release)
        self._version = (int(version[1]), int(version[2])) if version else (0, 0)
        self._rt_group_sched = self._read_rt_group_sched()
        self._topology: tuple[CpuSet, Topology] = (CpuSet(), Topology())

    def read(self) -> Host:
        """Return the facts as they are now."""
        online = self._cpus("sys/devices/system/cpu/online")
        runtime = self._number("proc/sys/kernel/sched_rt_runtime_us")
        fair_server = self._fair_server(online)
        throttles = True if self._version < (6, 12) else self._rt_group_sched
        protected = (throttles is not False and runtime != -1) or fair_server is None or online <= fair_server
        return Host(
            online=online,
            possible=self._cpus("sys/devices/system/cpu/possible") or online,
            isolated=self._cpus("sys/devices/system/cpu/isolated") | self._cgroups.isolated(),
            topology=self._read_topology(online),
            rt_runtime_us=runtime,
            throttles=throttles,
            rt_group_sched=self._rt_group_sched,
            fair_server=fair_server,
            guards=None if protected else self._guards(online),
            nice_capable=self._nice_capable(),
            kernel=self._release,
        )

    def _text(self, path: str) -> str | None:
        try:
            with open(self._root / path, encoding="utf-8", errors="replace") as file:
                return file.read().strip()
        except OSError:
            return None

    def _number(self, path: str) -> int | None:
        text = self._text(path)
        return int(text) if text and text.lstrip("-").isdigit() else None

    def _cpus(self, path: str) -> CpuSet:
        try:
            return CpuSet.parse(self._text(path) or "")
        except CpuListError:  # such as "(null)", which some kernels print for an empty list
            return CpuSet()

    def _read_topology(self, online: CpuSet) -> Topology:
        """Return how the online pCPUs hang together: read anew when others are online, as an offline one shows none."""
        if self._topology[0] != online:
            made = Topology(
                cores=self._groups(online, "topology/thread_siblings_list"),
                caches=self._groups(online, "cache/index3/shared_cpu_list"),
                dies=self._groups(online, "topology/die_cpus_list"),
                sockets=self._groups(online, "topology/package_cpus_list"),
                nodes={node: self._cpus(f"{_NODES}/node{node}/cpulist") for node in self._cpus(f"{_NODES}/online")},
            )
            self._topology = (online, made)
        return self._topology[1]

    def _groups(self, online: CpuSet, name: str) -> dict[int, CpuSet]:
        """Return pCPU → the list in a file of its directory; only where there is one."""
        found = {cpu: self._cpus(f"sys/devices/system/cpu/cpu{cpu}/{name}") for cpu in online}
        return {cpu: cpus for cpu, cpus in found.items() if cpu in cpus}

    def _read_rt_group_sched(self) -> bool | None:
        if self._cgroups.rt_groups():
            return True
        config = self._config()
        if config is None:
            return None
        if "CONFIG_RT_GROUP_SCHED=y" not in config:
            return False
        words = (self._text("proc/cmdline") or "").split()
        default = "CONFIG_RT_GROUP_SCHED_DEFAULT_DISABLED=y" not in config
        chosen = [word.partition("=")[2] for word in words if word.startswith("rt_group_sched=")]
        return chosen[-1] in ("1", "on", "y") if chosen else default

    def _config(self) -> str | None:
        try:
            return gzip.decompress((self._root / "proc/config.gz").read_bytes()).decode("utf-8", "replace")
        except (OSError, EOFError, zlib.error):
            return self._text(f"boot/config-{self._release}")

    def _fair_server(self, online: CpuSet) -> CpuSet | None:
        """Return the pCPUs with a fair server (Linux 6.12); None when debugfs cannot be read."""
        if self._version < (6, 12):
            return CpuSet()
        found: list[int] = []
        for cpu in online:
            runtime = self._number(f"sys/kernel/debug/sched/fair_server/cpu{cpu}/runtime")
            if runtime is None:
                return None
            if runtime > 0:
                found.append(cpu)
        return CpuSet(found)

    def _guards(self, online: CpuSet) -> dict[int, int]:
        threads = self._proc.kernel_threads
        found = ((cpu, threads.lowest_priority(cpu, _GUARDS)) for cpu in online)
        return {cpu: lowest for cpu, lowest in found if lowest is not None}

    def _nice_capable(self) -> bool:
        """Return whether CAP_SYS_NICE is there and reaches the host's threads: in a user namespace it does not."""
        mapped = (self._text("proc/self/uid_map") or "").split()
        if mapped and mapped != ["0", "0", str(0xFFFFFFFF)]:
            return False
        match = re.search(r"^CapEff:\s*([0-9a-f]+)", self._text("proc/self/status") or "", re.MULTILINE)
        return bool(int(match[1], 16) >> _CAP_SYS_NICE & 1) if match else True

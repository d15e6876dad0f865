"""Fake /proc, /sys and /run trees, and a poll with a deadline. What a tree shows is a test's own choice."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path

# include/linux/sched.h
PF_USER_WORKER = 0x00004000
PF_KTHREAD = 0x00200000
PF_NO_SETAFFINITY = 0x04000000

V1 = """\
22 1 0:20 / /proc rw - proc proc rw
25 1 0:22 / /sys/fs/cgroup/cpuset rw shared:1 - cgroup cgroup rw,cpuset
26 1 0:23 / /sys/fs/cgroup/cpu,cpuacct rw shared:2 - cgroup cgroup rw,cpu,cpuacct
27 1 0:24 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,xattr,name=systemd
"""
V2 = """\
22 1 0:20 / /proc rw - proc proc rw
25 1 0:22 / /sys/fs/cgroup rw shared:1 - cgroup2 cgroup2 rw,nsdelegate
"""
HYBRID = V1 + "28 1 0:25 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n"


def make_tree(root: Path, files: Mapping[str, str | bytes]) -> Path:
    """Write ``files`` (path below ``root`` → content), with the folders they need; return ``root``."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


def stat_line(
    tid: int,
    comm: str | bytes = "qemu-system-x86",
    *,
    parent: int = 1,
    flags: int = 0,
    start: int = 500,
    priority: int = 0,
    policy: int = 0,
) -> bytes:
    """Return a line of /proc/PID/stat with all its 52 fields (proc(5))."""
    name = comm if isinstance(comm, bytes) else comm.encode()
    fields = ["0"] * 53
    fields[3:5] = ["S", str(parent)]
    fields[9], fields[22], fields[40], fields[41] = str(flags), str(start), str(priority), str(policy)
    return b"%d (%b) %b\n" % (tid, name, " ".join(fields[3:]).encode())


def process(pid: int, threads: Mapping[int, bytes], groups: Mapping[int, str] | str = "") -> dict[str, str | bytes]:
    """Return the files of one process: ``threads`` tid → stat line, ``groups`` its cgroup text, or tid → text."""
    files: dict[str, str | bytes] = {f"proc/{pid}/stat": threads[pid]}
    for tid, line in threads.items():
        files[f"proc/{pid}/task/{tid}/stat"] = line
        files[f"proc/{pid}/task/{tid}/cgroup"] = groups if isinstance(groups, str) else groups[tid]
    return files


def until(condition: Callable[[], object], what: str, timeout_s: float = 10.0) -> None:
    """Poll until ``condition`` is true; TimeoutError names ``what`` was waited for."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {timeout_s:g} s: {what}")
        time.sleep(0.005)

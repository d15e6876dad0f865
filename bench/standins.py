# SPDX-License-Identifier: GPL-2.0-or-later
"""Stand-in guests: real processes of eight threads, named as QEMU names them, that hold a pid file and do nothing.

Each holds the lock on its pid file as QEMU does, and its threads are in cgroups of the names that libvirt gives, so
that all of rtpind's own reads work on them. They are made by a small C program, as a thousand Pythons would be too
large, and end with it, which ends with this process.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Self

#: Of each guest, beside its main thread.
THREADS = ("CPU 0/KVM", "CPU 1/KVM", "CPU 2/KVM", "CPU 3/KVM", "IO iothread1", "IO mon_iothread", "worker")
_LEAVES = dict(zip(THREADS, ("vcpu0", "vcpu1", "vcpu2", "vcpu3", "iothread1"), strict=False))

_SOURCE = """
#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <unistd.h>

static void *run(void *name) {
    prctl(PR_SET_NAME, name);
    for (;;) pause();
}

static void guest(const char *path, int threads, char **names) {
    struct flock whole = {.l_type = F_WRLCK, .l_whence = SEEK_SET};
    int fd = open(path, O_RDWR | O_CREAT, 0644);
    pthread_attr_t small;
    pthread_t thread;
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    prctl(PR_SET_NAME, "qemu-system-x86");
    pthread_attr_init(&small);
    pthread_attr_setstacksize(&small, 64 * 1024);
    if (fd < 0 || fcntl(fd, F_SETLK, &whole)) exit(1);
    for (int i = 0; i < threads; i++)
        if (pthread_create(&thread, &small, run, names[i])) exit(1);
    char line[32];
    if (write(1, line, snprintf(line, sizeof line, "%d\\n", getpid())) < 0) exit(1);
    for (;;) pause();
}

int main(int argc, char **argv) { /* DIRECTORY GUESTS THREAD... */
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    for (int n = 0; n < atoi(argv[2]); n++) {
        char path[4096];
        snprintf(path, sizeof path, "%s/standin-%d.pid", argv[1], n);
        if (fork() == 0) guest(path, argc - 3, argv + 3);
    }
    return getchar() == EOF ? 0 : 1;
}
"""


class StandIns:
    """A number of stand-in guests; a context manager that ends them and removes what it made."""

    def __init__(self, count: int) -> None:
        self.dir = Path(tempfile.mkdtemp(prefix="rtpind-bench-"))
        self.domains = {f"00000000-0000-0000-0000-{number:012d}": f"standin-{number}" for number in range(count)}
        self._groups = _hierarchy() / f"rtpind-bench-{os.getpid()}-{count}"
        self._maker: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        program = self.dir / "standins"
        command = ["gcc", "-O1", "-pthread", "-x", "c", "-", "-o", str(program)]
        subprocess.run(command, input=_SOURCE, text=True, check=True)
        count = str(len(self.domains))
        self._maker = subprocess.Popen(
            [str(program), str(self.dir), count, *THREADS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._maker.stdout is not None
        try:
            _make(self._groups)
            for _ in self.domains:
                self._group(int(self._maker.stdout.readline()))
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def _group(self, pid: int) -> None:
        """Move the threads of one stand-in into cgroups as libvirt would."""
        home = self._groups / f"machine-qemu-{pid}"
        _make(home)
        _join(_make(home / "emulator"), pid, whole=True)
        found = {tid: Path(f"/proc/{pid}/task/{tid}/comm") for tid in map(int, os.listdir(f"/proc/{pid}/task"))}
        while True:  # until each has its name
            names = {tid: path.read_text().rstrip("\n") for tid, path in found.items()}
            if set(THREADS) <= set(names.values()):
                break
        for tid, name in names.items():
            if name in _LEAVES:
                _join(_make(home / _LEAVES[name]), tid)

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        if self._maker is not None:
            self._maker.kill()  # the kernel ends its children with it
            self._maker.communicate()
        for path in [Path(name) for name, _, _ in os.walk(self._groups, topdown=False)]:
            while path.is_dir():  # until the last thread is gone
                with contextlib.suppress(OSError):
                    path.rmdir()
        shutil.rmtree(self.dir)


def _hierarchy() -> Path:
    """Return the cgroup hierarchy to use: that of cpuset on version 1, else version 2."""
    first = Path("/sys/fs/cgroup/cpuset")
    return first if first.is_dir() else Path("/sys/fs/cgroup")


def _make(path: Path) -> Path:
    """Make a cgroup that threads can be moved into."""
    path.mkdir()
    if (path / "cpuset.cpus").exists() and not (path / "cgroup.type").exists():
        for name in ("cpuset.cpus", "cpuset.mems"):
            (path / name).write_text((path.parent / name).read_text())
    elif path.parent.name.startswith("machine-qemu-"):
        (path / "cgroup.type").write_text("threaded")
    return path


def _join(path: Path, tid: int, *, whole: bool = False) -> None:
    version1 = (path / "tasks").exists()
    (path / ("cgroup.procs" if whole else "tasks" if version1 else "cgroup.threads")).write_text(str(tid))

# SPDX-License-Identifier: GPL-2.0-or-later
"""A booted lab host: commands, files, a look at guests' threads, reboot, and a dump when something went wrong.

Nothing that happens on the host outlives it. QEMU ends with the process that started it.
"""

from __future__ import annotations

import contextlib
import io
import shlex
import shutil
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from uuid import uuid4

from lab import saved
from lab.channel import Channel, ChannelError, Reply, connect
from lab.image import Built, get
from lab.recipe import IMAGES, Shape

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "build/lab"
BOOT_S = 300.0


class LabError(Exception):
    """The lab host could not be started, or a command failed that should not."""


@dataclass(frozen=True, slots=True)
class Done:
    """What became of a command."""

    code: int
    out: str
    err: str

    def __str__(self) -> str:
        return f"exit {self.code}\n{self.out}{self.err}"


class LabHost:
    """One virtual machine of a shape, from boot to :meth:`close`."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self.boot_s = 0.0
        self.continued = False
        self.used = False  # whether a scenario has begun to use it, and what that left is still there
        self._dir = Path(tempfile.mkdtemp(prefix=f"rtpind-lab-{shape.name}-", dir="/var/tmp"))
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: Channel | None = None

    def __enter__(self) -> Self:
        try:
            self.boot()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    @property
    def console(self) -> str:
        """What the kernel wrote to the console."""
        with contextlib.suppress(OSError):
            return (self._dir / "console.log").read_text(errors="replace")
        return ""

    def boot(self) -> None:
        """Start QEMU and wait until libvirt answers on the lab host; one that booted before goes on from there.

        Raises LabError.
        """
        began = time.monotonic()
        image, disk = get(IMAGES[self.shape.image]), self._dir / "disk.qcow2"
        agent = [_file("agent.py"), _file("inside.py")]
        (self._dir / "agent.tar").write_bytes(archive({file.name: file for file in agent}))
        kept = saved.saved(self.shape.name, self._command(image, Path("disk"), Path("dir")), agent)
        if kept.exists():
            command = [*self._command(image, kept.disk, self._dir), "-incoming", f"exec:zstd -q -d -c {kept.memory}"]
        else:
            saved.overlay(image.disk, disk)
            command = self._command(image, disk, self._dir)
        with (self._dir / "qemu.log").open("wb") as log:
            self._process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._channel = connect(self._dir / "agent.sock")
        if kept.exists():
            self.channel.greet(BOOT_S)
            self.continued = True
        else:
            self._wait_until_up("")
            self.run("systemctl is-system-running --wait", check=False, timeout_s=BOOT_S)
            self.run("sync")
            saved.save(kept, self.shape.name, self._dir / "monitor.sock", disk)
        self.boot_s = time.monotonic() - began

    def _command(self, image: Built, disk: Path, directory: Path) -> list[str]:
        shape = self.shape
        command = ["qemu-system-x86_64", "-name", f"rtpind-lab-{shape.name}"]
        command += ["-nodefaults", "-no-user-config", "-display", "none"]
        command += ["-accel", "tcg,thread=multi,tb-size=512", "-cpu", shape.cpu, "-smp", shape.smp]
        command += ["-m", f"{shape.memory_mib}M"]
        for number, cpus in enumerate(shape.nodes):
            size = shape.memory_mib // len(shape.nodes)
            command += ["-object", f"memory-backend-ram,id=m{number},size={size}M"]
            command += ["-numa", f"node,nodeid={number},cpus={cpus},memdev=m{number}"]
        command += ["-kernel", str(image.kernel), "-initrd", str(image.initrd), "-append", shape.command_line()]
        snapshot = "off" if disk.parent == directory else "on"  # what was saved stays as it is
        command += ["-drive", f"file={disk},if=virtio,format=qcow2,snapshot={snapshot},cache=unsafe"]
        command += ["-drive", f"file={directory}/agent.tar,if=virtio,format=raw,readonly=on"]
        command += ["-chardev", f"socket,id=agent,path={directory}/agent.sock,server=on,wait=off"]
        command += ["-device", "virtio-serial-pci", "-device", "virtserialport,chardev=agent,name=lab.agent"]
        command += ["-qmp", f"unix:{directory}/monitor.sock,server=on,wait=off"]
        if shape.peer:
            ends = "local.type=unix,local.path={0}/cable.sock,remote.type=unix,remote.path={0}/peer.sock"
            command += ["-netdev", f"dgram,id=cable,{ends.format(directory)}"]
            number = sorted((shape.name, shape.peer)).index(shape.name) + 1
            command += ["-device", f"virtio-net-pci,netdev=cable,romfile=,mac=52:54:00:00:00:{number:02x}"]
        command += ["-device", "virtio-rng-pci", "-serial", f"file:{directory}/console.log"]
        return command

    def _wait_until_up(self, last_boot: str) -> None:
        deadline = time.monotonic() + BOOT_S
        while not self.channel.wait_for_boot(last_boot, 1.0):
            if not self.running():
                raise LabError(f"QEMU ended: {(self._dir / 'qemu.log').read_text(errors='replace')}")
            if time.monotonic() > deadline:
                raise LabError(f"no agent within {BOOT_S:g} s:\n{self.console[-3000:]}")
        self.wait_for(lambda: self.run("virsh -r version", check=False).code == 0, "libvirt answers", BOOT_S)

    @property
    def channel(self) -> Channel:
        """The connection to the agent."""
        assert self._channel is not None, "not booted"
        return self._channel

    def running(self) -> bool:
        """Return whether QEMU runs."""
        return self._process is not None and self._process.poll() is None

    def run(
        self,
        command: str | Sequence[str],
        *,
        check: bool = True,
        timeout_s: float = 180.0,
        stdin: str | bytes = b"",
        env: Mapping[str, str] | None = None,
    ) -> Done:
        """Run a command as root; text is for the shell. Raises LabError when it fails (``check``) or is too slow."""
        argv = ["/bin/sh", "-c", command] if isinstance(command, str) else list(command)
        payload = stdin.encode() if isinstance(stdin, str) else stdin
        request = {"op": "run", "argv": argv, "timeout": timeout_s, "env": dict(env or {})}
        text = command if isinstance(command, str) else shlex.join(command)
        reply, output = self._ask(text, timeout_s + 30, payload, **request)
        out, err = output[: int(reply["out"])], output[int(reply["out"]) :]
        done = Done(int(reply["code"]), out.decode(errors="replace"), err.decode(errors="replace"))
        if reply["late"]:
            raise LabError(f"not within {timeout_s:g} s: {text}\n{done}")
        if check and done.code != 0:
            raise LabError(f"{text}: {done}")
        return done

    def call(self, function: str, timeout_s: float = 300.0, **arguments: Any) -> Any:
        """Call a function of :mod:`lab.inside` on the lab host."""
        text = f"{function} {arguments}"
        return self._ask(text, timeout_s, op="call", function=function, arguments=arguments)[0]["result"]

    def _ask(self, text: str, timeout_s: float, payload: bytes = b"", **request: Any) -> Reply:
        """Ask the agent, and note in build/lab what that took: where a slow scenario spends its time."""
        began = time.monotonic()
        try:
            return self.channel.ask(timeout_s, payload, **request)
        finally:
            RESULTS.mkdir(parents=True, exist_ok=True)
            with (RESULTS / f"commands-{self.shape.name}.log").open("a") as log:
                log.write(f"{time.strftime('%H:%M:%S')} {time.monotonic() - began:6.2f} s  {text}\n")

    def push(self, files: Mapping[str, str | bytes | Path], directory: str = "/") -> None:
        """Write files (name below ``directory`` → content, or a file or tree to copy) on the lab host."""
        self.channel.ask(120, archive(files), op="push", directory=directory)

    def read(self, path: str) -> str:
        """Return the text of a file."""
        return self.run(["cat", path]).out

    def wait_for(
        self, condition: Callable[[], object], what: str, timeout_s: float = 300.0, *, every_s: float = 0.3
    ) -> None:
        """Poll until ``condition`` is true; TimeoutError names ``what`` was waited for, and what was there instead.

        Polling takes CPU time of the lab host: ``every_s`` spares one that has none.
        """
        deadline = time.monotonic() + timeout_s
        while not (found := condition()):
            if time.monotonic() > deadline:
                raise TimeoutError(f"not within {timeout_s:g} s: {what} (at last: {found!r})")
            time.sleep(every_s)

    def plug(self, peer: LabHost) -> None:
        """Connect its network cable with its peer's; each has a name and a UUID of its own, and its libvirt listens."""
        for number, (one, other) in enumerate(((self, peer), (peer, self)), 1):
            end = one._dir / "peer.sock"
            end.unlink(missing_ok=True)
            end.symlink_to(other._dir / "cable.sock")
            one.run(
                f"hostname {one.shape.name} && busybox ip addr add 10.0.0.{number}/24 dev eth0"
                " && busybox ip link set eth0 up"
                f' && printf \'host_uuid = "{uuid4()}"\\nauth_tcp = "none"\\n\' >>/etc/libvirt/libvirtd.conf'
                f" && printf '10.0.0.1 {self.shape.name}\\n10.0.0.2 {peer.shape.name}\\n' >>/etc/hosts"
                " && systemctl stop libvirtd.service libvirtd.socket libvirtd-ro.socket libvirtd-admin.socket"
                " && systemctl start libvirtd-tcp.socket && systemctl start libvirtd"
            )

    def reboot(self) -> None:
        """Restart the lab host and wait until libvirt answers again."""
        boot = self.channel.boot
        with contextlib.suppress(ChannelError):
            self.run(["systemctl", "--no-block", "reboot"])
        self._wait_until_up(boot)

    def dump(self, directory: Path) -> None:
        """Write journal, console and state to ``directory``, as far as the lab host still answers."""
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "console.log").write_text(self.console)
        commands = {
            "journal.txt": "journalctl -b --no-pager -o short-precise",
            "journal-of-the-boot-before.txt": "journalctl -b -1 --no-pager -o short-precise | tail -n 1000",
            "rtpind.txt": "journalctl -b --no-pager -o verbose -t rtpind",
            "threads.txt": "ps -eLo pid,tid,cls,rtprio,psr,stat,wchan:20,comm,args; for p in $(pgrep qemu-system);"
            " do echo; taskset -apc $p; cat /proc/$p/task/*/cgroup; done",
            "status.txt": "rtpinctl status; virsh list --all; systemctl status --no-pager rtpind; cat /etc/rtpind.yaml",
            "cgroups.txt": "cd /sys/fs/cgroup && find machine* -name 'cpuset.cpus*' -exec grep -H . {} +",
            "host.txt": "uname -a; cat /proc/cmdline; grep . /sys/devices/system/cpu/{online,isolated,nohz_full}"
            " /proc/sys/kernel/sched_rt_*; systemctl --failed --no-pager; dmesg | tail -n 100",
        }
        for name, command in commands.items():
            try:
                text = str(self.run(["bash", "-c", command], check=False, timeout_s=60))
            except (ChannelError, LabError) as error:
                text = f"{error}\n"
            (directory / name).write_text(text)

    def close(self) -> None:
        """Shut the lab host down, kill it when it does not go, and remove what it left."""
        if self._channel is not None:
            if self.running():
                with contextlib.suppress(ChannelError, LabError):
                    self.run("systemctl --no-block poweroff --force", timeout_s=10)
            self._channel.close()
            self._channel = None
        if self._process is not None:
            try:
                self._process.wait(timeout=30)
            except (subprocess.TimeoutExpired, KeyboardInterrupt):
                self._process.kill()
                self._process.wait()
            self._process = None
        shutil.rmtree(self._dir, ignore_errors=True)


def archive(files: Mapping[str, str | bytes | Path]) -> bytes:
    """Return a tar archive of files: name → content, or a file or tree to copy."""
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as tar:
        for name, content in files.items():
            if isinstance(content, Path):
                tar.add(content, name.lstrip("/"), filter=_plain)
                continue
            data = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name.lstrip("/"))
            info.size, info.mtime = len(data), int(time.time())
            info.mode = 0o755 if data.startswith(b"#!") else 0o644
            tar.addfile(info, io.BytesIO(data))
    return made.getvalue()


def _plain(info: tarfile.TarInfo) -> tarfile.TarInfo | None:
    if "__pycache__" in info.name or info.name.endswith(".pyc"):
        return None
    info.uid = info.gid = 0
    info.uname = info.gname = "root"
    info.mode |= 0o444
    return info


def _file(name: str) -> Path:
    return Path(__file__).with_name(name)

# SPDX-License-Identifier: GPL-2.0-or-later
"""What a lab host is made of, as data: the images and the shapes of machine that they boot on."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass

#: Raise it when :mod:`lab.image` makes something else of the same recipe.
BUILD = 2

#: Everything of Debian that rtpind, the guests and the scenarios use. No network tools: a lab host has no network.
PACKAGES = (
    "dbus",
    "init",
    "initramfs-tools",
    "kmod",
    "libvirt-clients",
    "libvirt-daemon-driver-qemu",
    "libvirt-daemon-system",
    "polkitd",
    "procps",
    "python3",
    "python3-jsonschema",
    "python3-libvirt",
    "python3-prometheus-client",
    "python3-psutil",
    "python3-pyudev",
    "python3-rich",
    "python3-ruamel.yaml",
    "python3-systemd",
    "qemu-system-x86",
    "seabios",
    "strace",
    "systemd",
    "systemd-container",
    "systemd-sysv",
    "udev",
    "util-linux",
    "zstd",
)

#: Units that cost time at boot or at shutdown, or change something while a scenario looks.
MASKED = (
    "apt-daily-upgrade.timer",
    "apt-daily.timer",
    "dpkg-db-backup.timer",
    "e2scrub_all.timer",
    "e2scrub_reap.service",
    "fstrim.timer",
    "getty@tty1.service",
    "libvirt-guests.service",  # waits 300 s for the guests at shutdown
    "man-db.timer",
    "netplan-configure.service",
    "networking.service",
    "serial-getty@ttyS0.service",
    "systemd-networkd-wait-online.service",
    "systemd-pcrphase-sysinit.service",
    "systemd-pcrphase.service",
    "systemd-timesyncd.service",
)

#: Makes the initial RAM disk small: TCG unpacks slowly.
INITRAMFS = {
    "/etc/initramfs-tools/conf.d/lab": "MODULES=list\nCOMPRESS=zstd\nCOMPRESSLEVEL=1\nRESUME=none\nFSTYPE=ext4\n",
    "/etc/initramfs-tools/modules": "virtio_pci\nvirtio_blk\next4\ncrc32c_generic\n",
}

#: The second disk is a tar archive: what starts the agent comes with each boot, not with the image.
FILES = {
    "/etc/systemd/system/lab-agent.service": """\
[Unit]
Description=Lab agent
DefaultDependencies=no
After=systemd-remount-fs.service systemd-udevd.service
Conflicts=shutdown.target

[Service]
ExecStartPre=/bin/mkdir -p /run/lab
ExecStartPre=/bin/tar -xf /dev/vdb -C /run/lab
ExecStart=/usr/bin/python3 -u /run/lab/agent.py
Restart=always
RestartSec=1
OOMScoreAdjust=-1000
KillMode=process

[Install]
WantedBy=sysinit.target
""",
    "/etc/systemd/journald.conf.d/lab.conf": "[Journal]\nStorage=persistent\nRateLimitIntervalSec=0\n",
    "/etc/systemd/system.conf.d/lab.conf": "[Manager]\nDefaultTimeoutStartSec=300s\nDefaultTimeoutStopSec=30s\n",
    "/etc/modules-load.d/lab.conf": "virtio_console\n",
    "/etc/hostname": "rt-host\n",
    "/etc/hosts": "127.0.0.1 localhost rt-host\n",
}

#: Not in the image; what is installed on a booted host comes whole.
EXCLUDED = ("/usr/share/man/*", "/usr/share/locale/*", "/usr/share/doc/*", "/usr/share/info/*")


@dataclass(frozen=True, slots=True)
class Image:
    """One root file system with its kernel."""

    name: str
    suite: str
    kernel: str = "linux-image-rt-amd64"
    extra: tuple[str, ...] = ()
    packages: tuple[str, ...] = PACKAGES
    size_mib: int = 4096

    def digest(self) -> str:
        """Return a hash of everything that decides what is in the image, but the archive's state."""
        parts = [BUILD, asdict(self), MASKED, INITRAMFS, FILES, EXCLUDED]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Shape:
    """One machine: an image and the processors that it sees."""

    name: str
    image: str
    smp: str
    isolated: str
    #: pCPUs of each NUMA node
    nodes: tuple[str, ...]
    memory_mib: int = 2048

    def command_line(self) -> str:
        """Return the kernel's command line."""
        cpus = self.isolated
        words = [
            "root=/dev/vda rw rootfstype=ext4 console=ttyS0 loglevel=4 fsck.mode=skip net.ifnames=0 panic=-1",
            f"isolcpus=managed_irq,domain,{cpus} nohz_full={cpus} rcu_nocbs={cpus}",
            "mitigations=off audit=0 nowatchdog rcupdate.rcu_cpu_stall_suppress=1 systemd.show_status=no",
        ]
        return " ".join(words)


IMAGES = {
    image.name: image
    for image in (
        Image("bookworm-rt", "bookworm"),
        Image("trixie-rt", "trixie"),
    )
}

SHAPES = {
    shape.name: shape
    for shape in (
        Shape("bookworm-rt", "bookworm-rt", "8,sockets=2,cores=4,threads=1", "2-3,5-7", ("0-3", "4-7")),
        Shape("trixie-rt", "trixie-rt", "8,sockets=2,cores=4,threads=1", "2-3,5-7", ("0-3", "4-7")),
        Shape("smt", "bookworm-rt", "8,sockets=2,cores=2,threads=2", "2-3,6-7", ("0-3", "4-7")),
        Shape("small", "bookworm-rt", "4,sockets=1,cores=4,threads=1", "1-3", ("0-3",)),
    )
}

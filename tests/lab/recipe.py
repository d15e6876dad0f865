# SPDX-License-Identifier: GPL-2.0-or-later
"""What a lab host is made of, as data: the images and the shapes of machine that they boot on."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass

from lab import initrd

#: Raise it when :mod:`lab.image` makes something else of the same recipe.
BUILD = 3

#: Everything of Debian that rtpind, the guests and the scenarios use. No network tools: a
#: lab host has a cable to its peer at most.
PACKAGES = (
    "busybox-static",
    "dbus",
    "init",
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
    "modprobe@configfs.service",
    "modprobe@dm_mod.service",
    "modprobe@drm.service",
    "modprobe@efi_pstore.service",
    "modprobe@fuse.service",
    "modprobe@loop.service",
    "netplan-configure.service",
    "networking.service",
    "proc-sys-fs-binfmt_misc.automount",
    "serial-getty@ttyS0.service",
    "sys-fs-fuse-connections.mount",
    "sys-kernel-config.mount",
    "systemd-binfmt.service",
    "systemd-networkd-wait-online.service",
    "systemd-pcrphase-sysinit.service",
    "systemd-pcrphase.service",
    "systemd-timesyncd.service",
    "systemd-update-utmp-runlevel.service",
    "systemd-update-utmp.service",
)

#: Shell, run on the building machine with the tree as $1: puts packages of libvirt there that are newer by version
#: and otherwise the same, so that a host without a network can upgrade.
UPGRADE = """\
set -e
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
names=$(dpkg-query --admindir="$1/var/lib/dpkg" -W -f '${source:Package} ${Package}\\n' | sed -n 's/^libvirt //p')
APT_CONFIG=$MMDEBSTRAP_APT_CONFIG apt-get -q download $names
mkdir -p "$1/var/lib/lab/upgrade"
for file in *.deb; do
    version=$(dpkg-deb -f "$file" Version)
    dpkg-deb -R "$file" tree
    sed -i "s/$version/$version+lab1/g" tree/DEBIAN/control
    dpkg-deb --root-owner-group -Znone -b tree "$1/var/lib/lab/upgrade" >/dev/null
    rm -r tree
done
"""

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
        parts = [BUILD, asdict(self), MASKED, UPGRADE, FILES, EXCLUDED, initrd.INIT, initrd.MODULES]
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
    #: QEMU's model: an AMD one without topoext, which TCG has not, shows no SMT siblings to Linux 6.1
    cpu: str = "EPYC"
    #: The shape at the other end of its network cable; "": it has none.
    peer: str = ""

    def command_line(self) -> str:
        """Return the kernel's command line."""
        cpus = self.isolated
        words = [
            "root=/dev/vda rw rootfstype=ext4 console=ttyS0 loglevel=4 fsck.mode=skip net.ifnames=0 panic=-1",
            f"isolcpus=managed_irq,domain,{cpus} nohz_full={cpus} rcu_nocbs={cpus}",
            # RCU above a FIFO vCPU, wherever that lands; the agent raises the other kernel threads.
            "rcutree.kthread_prio=4",
            # Else Linux takes the HPET for its clock: emulated, and without a vDSO each look at it is a system call.
            "tsc=reliable clocksource=tsc",
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
        Shape("smt", "bookworm-rt", "8,sockets=2,cores=2,threads=2", "2-3,6-7", ("0-3", "4-7"), cpu="Haswell-noTSX"),
        Shape("small", "bookworm-rt", "4,sockets=1,cores=4,threads=1", "1-3", ("0-3",)),
        Shape("here", "bookworm-rt", "2,sockets=1,cores=2,threads=1", "1", ("0-1",), 1024, peer="there"),
        Shape("there", "bookworm-rt", "2,sockets=1,cores=2,threads=1", "1", ("0-1",), 1024, peer="here"),
    )
}

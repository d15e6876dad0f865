# SPDX-License-Identifier: GPL-2.0-or-later
"""Makes the initial RAM disk of a lab image: a static busybox that loads the disk's modules and mounts the disk.

Debian's own starts udev first, which costs 20 s of each boot under TCG.
"""

from __future__ import annotations

import lzma
from collections.abc import Iterator
from pathlib import Path

#: What the disk needs; what of it is built into the kernel is left out.
MODULES = ("virtio_pci", "virtio_blk", "crc32c_generic", "ext4")

INIT = """\
#!/bin/busybox sh
/bin/busybox mount -t devtmpfs dev /dev
for module in /modules/*; do /bin/busybox insmod $module; done
until [ -b /dev/vda ]; do /bin/busybox usleep 20000; done
/bin/busybox mount -t ext4 /dev/vda /root
/bin/busybox mount --move /dev /root/dev
exec /bin/busybox switch_root /root /sbin/init
"""

_DIRECTORY, _PROGRAM, _FILE = 0o040755, 0o100755, 0o100644


def make(root: Path) -> bytes:
    """Return the archive for the kernel and busybox of a root file system."""
    (tree,) = (root / "usr/lib/modules").iterdir()
    parts = [_entry(name, _DIRECTORY) for name in ("bin", "dev", "modules", "root")]
    parts.append(_entry("bin/busybox", _PROGRAM, (root / "usr/bin/busybox").read_bytes()))
    parts.append(_entry("init", _PROGRAM, INIT.encode()))
    for number, path in enumerate(order((tree / "modules.dep").read_text())):
        data = (tree / path).read_bytes()
        parts.append(_entry(f"modules/{number:02}.ko", _FILE, lzma.decompress(data) if path.endswith(".xz") else data))
    parts.append(_entry("TRAILER!!!", 0))
    return b"".join(parts)


def order(dependencies: str) -> list[str]:
    """Return the files of MODULES and of what they need, in the order to load them, from a modules.dep."""
    needs = {path: needed.split() for path, _, needed in (line.partition(":") for line in dependencies.splitlines())}
    files = {Path(path).name.partition(".")[0].replace("-", "_"): path for path in needs}

    def with_needs(path: str) -> Iterator[str]:
        for needed in needs[path]:
            yield from with_needs(needed)
        yield path

    wanted = (path for module in MODULES if module in files for path in with_needs(files[module]))
    return list(dict.fromkeys(wanted))


def _entry(name: str, mode: int, data: bytes = b"") -> bytes:
    """Return one entry of a cpio archive in the form "newc"."""
    fields = [0, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name) + 1, 0]
    head = b"070701" + b"".join(b"%08X" % field for field in fields) + name.encode() + b"\0"
    return head + b"\0" * (-len(head) % 4) + data + b"\0" * (-len(data) % 4)

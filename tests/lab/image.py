# SPDX-License-Identifier: GPL-2.0-or-later
"""Builds lab images from Debian's packages: mmdebstrap for the tree, mke2fs -d for the disk. No loop devices.

``python -m lab.image [NAME…]`` builds those named (all by default) unless the cache has them. An image is known by the
hash of its recipe. It takes root, as mmdebstrap keeps the packages' owners.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lab import initrd
from lab.recipe import EXCLUDED, FILES, IMAGES, MASKED, UPGRADE, Image

MIRROR = "http://deb.debian.org/debian"
SECURITY = "http://deb.debian.org/debian-security"


class BuildError(Exception):
    """An image could not be built."""


@dataclass(frozen=True, slots=True)
class Built:
    """The files of one image."""

    directory: Path

    @property
    def disk(self) -> Path:
        """The root file system, without partitions."""
        return self.directory / "root.img"

    @property
    def kernel(self) -> Path:
        """The kernel."""
        return self.directory / "vmlinuz"

    @property
    def initrd(self) -> Path:
        """The initial RAM disk."""
        return self.directory / "initrd.img"


def cache() -> Path:
    """Return the directory that images are kept in."""
    return Path(os.environ.get("RTPIND_LAB_CACHE") or Path.home() / ".cache/rtpind-lab")


def find(image: Image) -> Built | None:
    """Return the image when the cache has it."""
    built = Built(cache() / f"{image.name}-{image.digest()[:16]}")
    return built if built.initrd.exists() else None


def get(image: Image) -> Built:
    """Return the image; builds it when the cache has none of this recipe. Raises BuildError."""
    found = find(image)
    if found is not None:
        return found
    cache().mkdir(parents=True, exist_ok=True)
    with _locked(cache() / f"{image.name}.lock"):
        return find(image) or _build(image)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _build(image: Image) -> Built:
    if os.geteuid() != 0:
        raise BuildError("building an image takes root")
    began = time.monotonic()
    final = cache() / f"{image.name}-{image.digest()[:16]}"
    work = cache() / f".{image.name}.new"
    _remove(work)
    (work / "out").mkdir(parents=True)
    root = work / "root"
    try:
        _say(image, "installing packages (1 to 3 minutes)", began)
        _mmdebstrap(image, root, work / "build.log", began)
        out = work / "out"
        (kernel,) = (root / "boot").glob("vmlinuz-*-rt-*")
        kernel.rename(out / "vmlinuz")
        for unused in (root / "boot").glob("initrd.img-*"):
            unused.unlink()
        versions = _run(["dpkg-query", "--admindir", str(root / "var/lib/dpkg"), "-W"], work / "build.log")
        (out / "packages.txt").write_text(versions)
        (out / "image.json").write_text(json.dumps({"name": image.name, "digest": image.digest()}) + "\n")
        _say(image, "making the file system", began)
        options = ["-q", "-F", "-t", "ext4", "-m", "0", "-L", "lab", "-E", "lazy_itable_init=1", "-O", "^has_journal"]
        size = f"{image.size_mib}M"
        _run(["mke2fs", *options, "-d", str(root), str(out / "root.img"), size], work / "build.log")
        (out / "initrd.img").write_bytes(initrd.make(root))
        _remove(final)
        out.rename(final)
    finally:
        _remove(work)
    for stale in cache().glob(f"{image.name}-*"):
        if stale != final and re.fullmatch(rf"{re.escape(image.name)}-[0-9a-f]{{16}}", stale.name):
            _remove(stale)
    used = sum(file.stat().st_blocks * 512 for file in final.iterdir()) // 2**20
    _say(image, f"ready: {final} ({used} MiB)", began)
    return Built(final)


def _mmdebstrap(image: Image, root: Path, log: Path, began: float) -> None:
    mirror, security = sources()
    suites = [f"deb {mirror} {suite} main" for suite in (image.suite, f"{image.suite}-updates")]
    suites.append(f"deb {security} {image.suite}-security main")
    command = ["mmdebstrap", "--mode=root", "--variant=minbase", "--format=directory", "--architectures=amd64"]
    command += [f"--include={','.join([*image.packages, *image.extra, image.kernel])}"]
    command += [f"--dpkgopt=path-exclude={pattern}" for pattern in EXCLUDED]
    command += ['--aptopt=APT::Install-Recommends "false"', '--aptopt=Acquire::Retries "3"']
    command += [f"--aptopt={option}" for option in apt_options()]
    enabled = 'systemctl --root="$1" -q enable lab-agent.service'
    masked = f'systemctl --root="$1" -q mask {" ".join(MASKED)}'
    identity = f'echo {image.digest()[:32]} >"$1/etc/machine-id"; mkdir -p "$1/var/log/journal"'
    clean = 'rm -rf "$1"/etc/apt/apt.conf.d/99mmdebstrap "$1"/etc/dpkg/dpkg.cfg.d/99mmdebstrap "$1"/var/lib/apt/lists/*'
    for hook in (_writing(FILES), enabled, masked, identity, UPGRADE, clean):
        command += [f"--customize-hook={hook}"]
    process = subprocess.Popen(
        [*command, image.suite, str(root), *suites],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "INITRD": "No"},  # Debian's kernel package makes none then
    )
    assert process.stdout is not None
    with process.stdout, log.open("w") as file:
        for line in process.stdout:
            file.write(line)
            if line.startswith("I: ") and "-hook in shell" not in line:
                _say(image, line[3:].strip(), began)
    if process.wait() != 0:
        raise BuildError(f"mmdebstrap failed:\n{_tail(log)}")


def _writing(files: dict[str, str]) -> str:
    """Return shell that writes files below "$1"."""
    lines = []
    for path, text in files.items():
        quoted = text.replace("'", "'\\''")
        lines.append(f"mkdir -p \"$1{os.path.dirname(path)}\"; printf '%s' '{quoted}' >\"$1{path}\"")
    return "; ".join(lines)


def sources() -> tuple[str, str]:
    """Return the archive and the security archive that this machine's apt uses; Debian's own where it tells none."""
    form = "$(LABEL)|$(REPO_URI)"
    try:
        done = subprocess.run(
            ["apt-get", "indextargets", "--format", form, "Created-By: Packages"], capture_output=True, text=True
        )
        found = dict(line.split("|", 1) for line in reversed(done.stdout.splitlines()))
    except OSError:
        found = {}
    return found.get("Debian", MIRROR).rstrip("/"), found.get("Debian-Security", SECURITY).rstrip("/")


def apt_options() -> list[str]:
    """Return what this machine's apt is told about fetching (proxies, certificates, dates)."""
    try:
        done = subprocess.run(["apt-config", "dump"], capture_output=True, text=True)
    except OSError:
        return []
    wanted = re.compile(r'Acquire::(?:(?:https?|ftp)::|Check-|Proxy)[^ ]* "[^"]+";')
    return [line for line in done.stdout.splitlines() if wanted.fullmatch(line)]


def _run(command: Sequence[str], log: Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    with log.open("a") as file:
        file.write(done.stderr)
    if done.returncode != 0:
        raise BuildError(f"{command[0]} failed:\n{_tail(log)}")
    return done.stdout


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-30:])


def _remove(path: Path) -> None:
    """Remove a tree that an interrupted build may have left mounts in."""
    mounts = [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()]
    for point in sorted((point for point in mounts if point.startswith(f"{path}/")), reverse=True):
        subprocess.run(["umount", "-l", point], check=True)
    if path.exists():
        shutil.rmtree(path)


def _say(image: Image, text: str, began: float) -> None:
    print(f"lab: {image.name}: {time.monotonic() - began:4.0f} s: {text}", file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> int:
    """Build the images named."""
    made = argparse.ArgumentParser(prog="python -m lab.image", description=(__doc__ or "").splitlines()[0])
    made.add_argument("name", nargs="*", help=f"of {', '.join(IMAGES)} (default: all)")
    options = made.parse_args(argv)
    unknown = sorted(set(options.name) - set(IMAGES))
    if unknown:
        made.error(f"no image is called {', '.join(unknown)}")
    for name in options.name or IMAGES:
        try:
            print(get(IMAGES[name]).directory)
        except BuildError as error:
            print(f"lab: {name}: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

# SPDX-License-Identifier: GPL-2.0-or-later
"""Other programs that move threads or interrupts: TuneD's scheduler plugin and irqbalance. Reads only."""

from __future__ import annotations

import configparser
from pathlib import Path

import psutil

_TUNED_DIRS = ("etc/tuned/profiles", "etc/tuned", "usr/lib/tuned/profiles", "usr/lib/tuned")
_SECTIONS = frozenset({"scheduler"})


def facts(root: Path = Path("/")) -> dict[str, str]:
    """Return two status facts; a value may end in ``!`` and a warning."""
    names = _running()
    return {"TuneD scheduler plugin": _tuned("tuned" in names, root), "irqbalance": _irqbalance("irqbalance" in names)}


def _running() -> set[str]:
    """Return the names of the two daemons that run; tuned is a Python program, so by its command line."""
    found: set[str] = set()
    for process in psutil.process_iter(["name", "cmdline"]):
        name = process.info["name"] or ""
        words = [Path(word).name for word in (process.info["cmdline"] or [])[:3]]
        if words and not words[0].startswith("python"):
            del words[1:]  # "man tuned" is not tuned
        found |= {daemon for daemon in ("tuned", "irqbalance") if name == daemon or daemon in words}
    return found


def _irqbalance(running: bool) -> str:
    return (
        "running!check that it bans the vCPUs' pCPUs (isolated ones it does by default)" if running else "not running"
    )


def _tuned(running: bool, root: Path) -> str:
    if not running:
        return "not running"
    try:
        active = (root / "etc/tuned/active_profile").read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError):
        return "unknown (no active profile)"
    for profile in active:
        blacklist = _scheduler_blacklist(profile, root)
        if blacklist is None:
            continue
        spared = "qemu-system" in blacklist
        return f"on ({profile})" + ("" if spared else "!it moves qemu-system threads off their pCPUs; add ps_blacklist")
    return f"off ({' '.join(active)})"


def _scheduler_blacklist(profile: str, root: Path, seen: frozenset[str] = frozenset()) -> str | None:
    """Return the scheduler plugin's ps_blacklist as a profile and those it includes set it; None: no such plugin."""
    if profile in seen:
        return None
    for directory in _TUNED_DIRS:
        parser = configparser.ConfigParser(interpolation=None, strict=False, allow_no_value=True)
        try:
            with open(root / directory / profile / "tuned.conf", encoding="utf-8") as file:
                parser.read_file(file)
        except (OSError, configparser.Error, UnicodeDecodeError):
            continue
        included = parser.get("main", "include", fallback=None) or ""
        inherited = [_scheduler_blacklist(name.strip(), root, seen | {profile}) for name in included.split(",")]
        found = [value for value in inherited if value is not None]
        for section in parser.sections():
            kind = parser.get(section, "type", fallback=section)
            if kind in _SECTIONS and parser.get(section, "enabled", fallback="true") not in ("false", "0"):
                found.append(parser.get(section, "ps_blacklist", fallback="") or "")
        return " ".join(found) if found else None
    return None

# SPDX-License-Identifier: GPL-2.0-or-later
"""``rtpinctl capacity``: how many guests of each size fit under each class, and what limits them."""

from __future__ import annotations

import argparse
import re
import sys
from dataclasses import replace

from rtpind import EXIT_CONFIG, POLICY_FILE
from rtpind.core.capacity import Shape, made_up_host, table
from rtpind.core.cpuset import CpuListError, CpuSet
from rtpind.core.ledger import Ledger
from rtpind.core.memory import Memory
from rtpind.core.model import Host, Snapshot
from rtpind.core.placement import place
from rtpind.ctl import show
from rtpind.ctl.checkconfig import print_problems
from rtpind.ctl.look import look
from rtpind.daemon import policysource, report

_SHAPE = re.compile(r"([1-9]\d{0,2})x([1-9]\d{0,2})(?:x([1-8]))?((?:,(?:l3|dies|nodes)=[1-9]\d{0,2})*)", re.ASCII)
_PARTS = {"l3": "caches", "dies": "dies", "nodes": "nodes"}
_GUEST = re.compile(r"([a-z][a-z0-9_-]{0,31}):([1-9]\d{0,3})(?:\+(\d{1,3}))?(?:x([1-8]))?", re.ASCII)
_MOST_CPUS = 8192
_MOST_VCPUS = 710  # what libvirt and QEMU allow at most, and then some


def shape(text: str) -> Host:
    """Read ``SOCKETSxCORESxTHREADS[,l3=N][,dies=N][,nodes=N]``, the parts of each socket; argparse's type."""
    match = _SHAPE.fullmatch(text)
    if match is None:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not SOCKETSxCORESxTHREADS[,l3=N][,dies=N][,nodes=N], such as 2x8x2 or 1x64x2,l3=8,nodes=4"
        )
    sockets, cores, threads = (int(part or 1) for part in match.groups()[:3])
    parts = {_PARTS[name]: int(number) for name, number in (word.split("=") for word in match[4].split(",")[1:])}
    if sockets * cores * threads > _MOST_CPUS:
        raise argparse.ArgumentTypeError(f"{text!r} is more than {_MOST_CPUS} pCPUs")
    if any(cores % number for number in parts.values()):
        raise argparse.ArgumentTypeError(f"{text!r}: the {cores} cores of a socket do not come in so many equal parts")
    return made_up_host(sockets, cores, threads, parts=parts)


def guest_shape(text: str) -> tuple[str, Shape]:
    """Read ``CLASS:VCPUS[+IOTHREADS][xTHREADS]``; argparse's type."""
    match = _GUEST.fullmatch(text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not CLASS:VCPUS[+IOTHREADS][xTHREADS], such as realtime:2+1")
    name, vcpus, iothreads, threads = match.groups()
    return name, Shape(vcpus=int(vcpus), iothreads=int(iothreads or 0), threads=int(threads or 1))


def cpu_list(text: str) -> CpuSet:
    """Read a CPU list; argparse's type."""
    try:
        return CpuSet.parse(text)
    except CpuListError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def sizes(text: str) -> list[int]:
    """Read a list of numbers of vCPUs; argparse's type."""
    found = list(cpu_list(text))
    if not found or found[0] < 1 or found[-1] > _MOST_VCPUS:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers from 1 to {_MOST_VCPUS}")
    return found


def capacity(options: argparse.Namespace) -> int:
    """Show how many guests fit: on this host, as it would be empty or as it is, or on one of another shape."""
    looked = look(options.config, options.state_dir)
    policy, problems, snapshot = looked.policy, list(looked.problems), Snapshot(host=looked.host())
    memory, ledger, there = Memory(), Ledger(), None
    path = options.config or POLICY_FILE
    if options.shape is not None:
        host = options.shape
        if options.isolated is not None:
            host = replace(host, isolated=options.isolated & host.online)
        policy, problems = policysource.read(path, host, strict=True)
        snapshot = Snapshot(host=host)
    elif options.running and looked.view is not None:
        snapshot, memory, ledger = looked.view.snapshot, looked.reconciler.memory, looked.reconciler.ledger
        there = looked.view.decision
    elif looked.view is not None:
        snapshot = replace(looked.view.snapshot, guests=())
    if policy is None:
        if problems:
            print_problems(problems, path, sys.stderr)
        else:
            show.error(f"{path}: there is no policy file")
        return EXIT_CONFIG
    found = table(policy, options.vcpus, snapshot, memory, ledger, iothreads=options.iothreads, there=there)
    held = there or place(policy, snapshot, memory, ledger)
    document = report.capacity(found, report.blocked(snapshot.host, policy, held))
    if options.json:
        show.as_json(document)
        return 0
    if not document["rows"]:
        show.line("the policy has no class")
        return 0
    counted = ("running", "realtime") if there is not None else ()
    columns = ("class", "vCPUs", *counted, "more guests" if counted else "guests", "realtime vCPUs", "limited by")
    rows = [
        (
            row["class"],
            str(row["vcpus"]),
            *((str(row["running"]), str(row["running_realtime_vcpus"])) if counted else ()),
            "any" if row["guests"] is None else str(row["guests"]),
            str(row["realtime_vcpus"]),
            row["limited_by"],
        )
        for row in document["rows"]
    ]
    show.table(columns, rows)
    for cpus, who in show.blocked(document["blocked"]):
        show.line(f"{cpus} not given out: {who}")
    return 0

# SPDX-License-Identifier: GPL-2.0-or-later
"""A command's own look at the host, for when no daemon answers. Reads only."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

from rtpind import POLICY_FILE
from rtpind.core.document import Problem
from rtpind.core.model import Host
from rtpind.core.policy import Policy
from rtpind.daemon import policysource
from rtpind.daemon.observe import Observer
from rtpind.daemon.reconcile import Reconciler, View
from rtpind.host import pidfile
from rtpind.host.hypervisor import describe_once, list_once
from rtpind.host.ledgerfile import LedgerFile

URI = "qemu:///system"


@dataclass(frozen=True, slots=True)
class Looked:
    """What a look found; ``view`` is None without a policy, and ``problems`` says what is wrong with the file."""

    reconciler: Reconciler
    policy: Policy | None
    problems: tuple[Problem, ...]
    view: View | None

    def host(self) -> Host:
        """Return the host's facts, with or without a policy."""
        return self.view.snapshot.host if self.view is not None else self.reconciler.observer.host()


def running(observer: Observer, uri: str = URI) -> dict[str, str]:
    """Return UUID → name of the running guests: from libvirt or, when it does not answer, from its pid files.

    The observer is told what libvirt says of each beside that.
    """
    domains = list_once(uri)
    if domains is not None:
        # Who a guest is now; if it still is when it is looked at, what libvirt said in between is about it.
        processes = {domain.uuid: observer.process_of(domain.name) for domain in domains}
        for uuid, told in describe_once(uri, [domain.uuid for domain in domains]).items():
            process = processes[uuid]
            if process is not None:
                observer.describe(uuid, process, told)
        return {domain.uuid: domain.name for domain in domains}
    found = {}
    for name, pid in pidfile.running().items():
        uuid = observer.proc.uuid(pid)
        if uuid:  # else it is a helper that libvirt keeps a pid file of there, such as virtiofsd
            found[uuid] = name
    return found


def look(config: Path | None, state_dir: Path) -> Looked:
    """Look at the host with the policy in ``config`` (None: the host's own, if there is one)."""
    observer = Observer()
    path = config or POLICY_FILE
    policy: Policy | None = None
    problems: list[Problem] = []
    if config is not None or path.exists():
        policy, problems = policysource.read(path, observer.host(), strict=True)
    reconciler = Reconciler(observer, LedgerFile(state_dir), lambda _record: None)
    with contextlib.suppress(OSError):  # who may not read it sees no hands-off, and all else
        reconciler.ledger, _ = reconciler.file.read()
    reconciler.policy = policy
    reconciler.domains = running(observer, policy.uri if policy else URI)
    view = reconciler.view() if policy else None
    return Looked(reconciler, policy, tuple(problems), view)

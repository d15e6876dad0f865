# SPDX-License-Identifier: GPL-2.0-or-later
"""The only module that imports libvirt: which guests run, and a word when one changes. Read-only, never waited for.

Three threads of its own: one runs libvirt's default event loop (a native loop, in which Python's signal handlers
would not run), one makes the calls that can block, and one asks for the guests' definitions, which can block while
libvirt is busy with a guest (:mod:`.details`). Callbacks only post; the daemon's loop never calls libvirt.
"""

from __future__ import annotations

import contextlib
import errno
import threading
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import libvirt

from rtpind.core.ledger import Process
from rtpind.core.model import Traits
from rtpind.host.details import Definition, Described, Details, read

#: Back-off between two attempts to connect. A prompt retry would start a socket-activated daemon in an upgrade.
_BACKOFF_S = (1.0, 2.0, 5.0, 10.0, 30.0)
#: Ping every 5 s, give up after 3 without an answer: notices a daemon that hangs.
_KEEPALIVE = (5, 3)
#: What a :class:`Changed` says when nothing but the definition has changed.
METADATA = "metadata"
#: And when it ended.
STOPPED = "stopped"


@dataclass(frozen=True, slots=True)
class Domain:
    """A running domain as libvirt names it."""

    uuid: str
    name: str


@dataclass(frozen=True, slots=True)
class Listed:
    """libvirt's answer to "who runs"; ``fresh``: right after connecting."""

    domains: tuple[Domain, ...]
    fresh: bool = False


@dataclass(frozen=True, slots=True)
class Changed:
    """Something happened to one domain: look at it again. ``redefined``: its definition may be another now."""

    domain: Domain
    what: str
    redefined: bool = False


@dataclass(frozen=True, slots=True)
class Lost:
    """libvirt is away, or does not let us in; ``cure``: what helps, "" where that is to wait."""

    why: str
    cure: str = ""


Post = Callable[[Listed | Changed | Lost | Described], None]


class Hypervisor:
    """A read-only connection to ``uri`` that lasts: connects, listens, and connects again."""

    def __init__(self, uri: str, post: Post) -> None:
        self._uri = uri
        self._post = post
        self._wake = threading.Event()
        self._stop = False
        self._closed = False
        self._conn: libvirt.virConnect | None = None
        self._callbacks: list[int] = []
        self._timer = -1
        self._details = Details(self._definition, post)

    def start(self) -> None:
        """Start all threads; returns at once."""
        libvirt.registerErrorHandler(lambda *_: None, None)  # else libvirt prints every error to stderr too
        libvirt.virEventRegisterDefaultImpl()
        self._timer = libvirt.virEventAddTimeout(-1, lambda *_: None, None)
        threading.Thread(target=self._run_events, name="libvirt-events", daemon=True).start()
        threading.Thread(target=self._run_calls, name="libvirt-calls", daemon=True).start()
        self._details.start()

    def relist(self) -> None:
        """Ask for a new list of domains; it is posted when libvirt answers."""
        self._wake.set()

    def describe(self, uuid: str, process: Process) -> None:
        """Ask for the definition of a guest that is this process now; it is posted when libvirt answers.

        When there is no connection, or no such domain, there is no answer.
        """
        self._details.ask(uuid, process)

    def stop(self) -> None:
        """Ask all threads to end; does not wait for a call that hangs."""
        self._stop = True
        self._details.stop()
        self._wake.set()
        libvirt.virEventUpdateTimeout(self._timer, 0)

    def _run_events(self) -> None:
        while not self._stop:
            try:
                libvirt.virEventRunDefaultImpl()
            except libvirt.libvirtError:
                self._pause(0.2)  # whatever it is, do not spin on it

    def _run_calls(self) -> None:
        failures = 0
        said = Lost("")
        while not self._stop:
            try:
                if self._conn is None:
                    self._connect()
                    failures, said = 0, Lost("")
                elif self._closed or not self._conn.isAlive():
                    raise libvirt.libvirtError("the connection was closed")
                else:
                    self._list(fresh=False)
            except Exception as error:  # whatever it is: without this thread rtpind would never hear of libvirt again
                lost = Lost(str(error), _cure(error))
                if failures == 0 or lost.cure not in ("", said.cure):
                    self._post(lost)
                    said = lost
                self._disconnect()
                pause = _BACKOFF_S[min(failures, len(_BACKOFF_S) - 1)]
                failures += 1
                self._pause(pause)
            else:
                self._wake.wait()
                self._wake.clear()

    def _pause(self, seconds: float) -> None:
        """Wait out a back-off; only stopping cuts it short."""
        waited = threading.Event()
        while seconds > 0 and not self._stop:
            waited.wait(min(seconds, 0.2))
            seconds -= 0.2

    def _connect(self) -> None:
        self._closed = False
        self._conn = libvirt.openReadOnly(self._uri)
        with contextlib.suppress(libvirt.libvirtError):
            self._conn.setKeepAlive(*_KEEPALIVE)  # a driver inside this process has none
        self._conn.registerCloseCallback(self._on_close, None)
        self._register("LIFECYCLE", self._on_lifecycle)
        callbacks: dict[str, Callable[..., None]] = {
            "REBOOT": self._on_other,
            "TUNABLE": self._on_tunable,
            "DEVICE_ADDED": self._on_other,
            "DEVICE_REMOVED": self._on_other,
            "VCPU_REMOVED": self._on_other,
            "METADATA_CHANGE": self._on_metadata,
        }
        for event, callback in callbacks.items():
            with contextlib.suppress(libvirt.libvirtError, AttributeError):  # VCPU_REMOVED is of libvirt 12.4
                self._register(event, callback)
        self._list(fresh=True)  # after registering: what changes from here on is told

    def _register(self, event: str, callback: Callable[..., None]) -> None:
        assert self._conn is not None
        number = getattr(libvirt, f"VIR_DOMAIN_EVENT_ID_{event}")
        self._callbacks.append(self._conn.domainEventRegisterAny(None, number, callback, event.lower()))

    def _list(self, *, fresh: bool) -> None:
        assert self._conn is not None
        found = self._conn.listAllDomains(libvirt.VIR_CONNECT_LIST_DOMAINS_ACTIVE)
        self._post(Listed(tuple(sorted((_domain(dom) for dom in found), key=lambda dom: dom.uuid)), fresh))

    def _definition(self, uuid: str) -> Definition | None:
        """Return how a domain is defined; None when there is none, or nobody to ask. Raises libvirtError."""
        conn = self._conn
        if conn is None:
            return None
        try:
            return _definition(conn.lookupByUUIDString(uuid))
        except libvirt.libvirtError as error:
            # After a loss of the connection everything is asked for anew.
            if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN or conn is not self._conn or not conn.isAlive():
                return None
            raise

    def _disconnect(self) -> None:
        conn, self._conn = self._conn, None
        callbacks, self._callbacks = self._callbacks, []
        if conn is None:
            return
        for number in callbacks:  # the binding keeps the connection alive until each is gone
            with contextlib.suppress(libvirt.libvirtError):
                conn.domainEventDeregisterAny(number)
        with contextlib.suppress(libvirt.libvirtError):
            conn.unregisterCloseCallback()
        with contextlib.suppress(libvirt.libvirtError):
            conn.close()

    # Callbacks: on the event thread, where an exception would be printed and lost. They only post.

    def _on_close(self, *_: Any) -> None:
        self._closed = True
        self._wake.set()

    def _on_lifecycle(self, _conn: Any, dom: libvirt.virDomain, event: int, *_: Any) -> None:
        if event in (libvirt.VIR_DOMAIN_EVENT_DEFINED, libvirt.VIR_DOMAIN_EVENT_UNDEFINED):
            return  # a configuration, not a guest that runs
        what = STOPPED if event == libvirt.VIR_DOMAIN_EVENT_STOPPED else "lifecycle"
        begins = event in (libvirt.VIR_DOMAIN_EVENT_STARTED, libvirt.VIR_DOMAIN_EVENT_RESUMED)
        self._post(Changed(_domain(dom), what, redefined=begins))

    def _on_tunable(self, _conn: Any, dom: libvirt.virDomain, values: dict[str, Any], *_: Any) -> None:
        # Shares, quotas and the throttling of disks come this way too.
        pinned = any(name.startswith("cputune.vcpupin") for name in values)
        self._post(Changed(_domain(dom), "tunable", redefined=pinned))

    def _on_metadata(self, _conn: Any, dom: libvirt.virDomain, *_: Any) -> None:
        self._post(Changed(_domain(dom), METADATA, redefined=True))

    def _on_other(self, _conn: Any, dom: libvirt.virDomain, *rest: Any) -> None:
        self._post(Changed(_domain(dom), str(rest[-1])))  # a device changes nothing that Traits hold


def _cure(error: Exception) -> str:
    """Return what helps where libvirt refuses us; "" for everything else.

    libvirt asks polkit, over D-Bus, about every user that is not root; its error says who of the two failed.
    """
    if not isinstance(error, libvirt.libvirtError):
        return ""
    match error.get_error_domain():
        case libvirt.VIR_FROM_DBUS:
            return (
                "libvirt asks polkit about a user that is not root, and finds none: install polkitd, and restart "
                "libvirt if D-Bus was not there when it started"
            )
        case libvirt.VIR_FROM_POLKIT:
            return "polkit's rules forbid it: allow org.libvirt.unix.monitor to rtpind's user, see rtpind(8)"
    if error.get_int1() == errno.EACCES:
        return "libvirt's read-only socket is closed to rtpind: see unix_sock_ro_perms, or the unit's SocketMode="
    return ""


def _domain(dom: libvirt.virDomain) -> Domain:
    """Return what a domain object holds itself; asks libvirt nothing."""
    return Domain(dom.UUIDString(), dom.name())


def _definition(domain: libvirt.virDomain) -> Definition:
    """Return how a domain is defined. Raises libvirtError.

    Readers may ask both. libvirt tells the NUMA parameters from what it keeps: without a job, and without QEMU.
    """
    xml, nodeset = domain.XMLDesc(0), ""
    with contextlib.suppress(libvirt.libvirtError):
        nodeset = str(domain.numaParameters(0).get(libvirt.VIR_DOMAIN_NUMA_NODESET) or "")
    return Definition(xml, nodeset)


def list_once(uri: str, timeout_s: float = 5.0) -> tuple[Domain, ...] | None:
    """Return the running domains, for a command; None when libvirt does not answer in time."""
    found: list[tuple[Domain, ...]] = []

    def ask(conn: libvirt.virConnect) -> None:
        found.append(tuple(_domain(dom) for dom in conn.listAllDomains(libvirt.VIR_CONNECT_LIST_DOMAINS_ACTIVE)))

    _in_time(uri, ask, timeout_s)
    return found[0] if found else None


def describe_once(uri: str, uuids: Collection[str], timeout_s: float = 5.0) -> dict[str, Traits | str]:
    """Return the traits of those domains whose definition libvirt tells in time, or why they cannot be read."""
    found: dict[str, Traits | str] = {}

    def ask(conn: libvirt.virConnect) -> None:
        for uuid in uuids:
            with contextlib.suppress(libvirt.libvirtError):
                found[uuid] = read(_definition(conn.lookupByUUIDString(uuid)))

    _in_time(uri, ask, timeout_s)
    return dict(found)


def _in_time(uri: str, ask: Callable[[libvirt.virConnect], None], timeout_s: float) -> None:
    """Ask something over a connection of its own, and wait for no longer than that."""

    def run() -> None:
        libvirt.registerErrorHandler(lambda *_: None, None)
        with contextlib.suppress(libvirt.libvirtError):
            conn = libvirt.openReadOnly(uri)
            ask(conn)
            conn.close()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(timeout_s)

# SPDX-License-Identifier: GPL-2.0-or-later
"""A live domain's XML → :class:`~rtpind.core.model.Traits`: what rules and placements ask of a guest's definition.

Of the many elements only those that Traits names are read; what they hold that makes no sense is a ValueError for the
whole, because traits that were read by half would be believed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from xml.etree import ElementTree as ET

from rtpind.core.cpuset import NO_CPUS, CpuSet
from rtpind.core.model import Traits

#: A guest with a thousand disks has half of it; libvirt's protocol would carry four times as much.
MAX_CHARS = 1024 * 1024

_NOVA = ("http://openstack.org/xmlns/libvirt/nova/1.1", "http://openstack.org/xmlns/libvirt/nova/1.0")
_REALTIME = ("fifo", "rr")
_NUMBER = re.compile(r"[0-9]{1,4}")


def parse(xml: str, nodeset: str = "") -> Traits:
    """Read what ``virDomainGetXMLDesc`` returns for a running domain. Raises ValueError, and nothing else.

    ``nodeset``: of ``virDomainGetNumaParameters``, which also tells what libvirt chose itself (``placement='auto'``).
    """
    domain = _root(xml)
    realtime = dict(_realtime(domain))
    backing = {child.tag for child in domain.findall("memoryBacking/*")}
    flavor, project, project_id = _nova(domain)
    return Traits(
        flavor=flavor,
        project=project,
        project_id=project_id,
        has=frozenset(backing & {"hugepages", "locked"}) | ({"vcpusched"} if realtime else set()),
        partition=domain.findtext("resource/partition", "").strip(),
        threads=_threads(domain),
        pins=dict(_pins(domain)),
        realtime=realtime,
        nodes=_nodes(domain) or _list(nodeset),
    )


def _root(xml: str) -> ET.Element:
    if len(xml) > MAX_CHARS:
        raise ValueError(f"more than {MAX_CHARS} characters")
    # libvirt writes neither; without a document type there are no entities to expand, and nothing else to fetch.
    if "<!DOCTYPE" in xml or "<!ENTITY" in xml:
        raise ValueError("a document type")
    try:
        root = ET.fromstring(xml)  # noqa: S314  # see above
    except ET.ParseError as error:
        raise ValueError(f"not XML: {error}") from None
    if root.tag != "domain":
        raise ValueError("not a domain")
    return root


def _nova(domain: ET.Element) -> tuple[str, str, str]:
    """Return the names of flavor and project and the project's id, of the newest namespace that is there."""
    for namespace in _NOVA:
        instance = domain.find(f"metadata/{{{namespace}}}instance")
        if instance is None:
            continue
        flavor = instance.find(f"{{{namespace}}}flavor")
        project = instance.find(f"{{{namespace}}}owner/{{{namespace}}}project")
        return (
            "" if flavor is None else flavor.get("name", ""),
            "" if project is None else (project.text or "").strip(),
            "" if project is None else project.get("uuid", ""),
        )
    return "", "", ""


def _threads(domain: ET.Element) -> int:
    topology = domain.find("cpu/topology")
    return 1 if topology is None else max(_number(topology.get("threads", "1")), 1)


def _pins(domain: ET.Element) -> Iterator[tuple[int, CpuSet]]:
    for pin in domain.findall("cputune/vcpupin"):
        yield _number(pin.get("vcpu", "")), _list(pin.get("cpuset", ""))


def _realtime(domain: ET.Element) -> Iterator[tuple[int, int]]:
    """Yield (vCPU, priority). libvirt 9.0 writes an element for each vCPU, whatever lists of vCPUs it was given."""
    for sched in domain.findall("cputune/vcpusched"):
        if sched.get("scheduler") in _REALTIME:
            priority = _number(sched.get("priority", ""))
            if not 1 <= priority <= 99:
                raise ValueError(f"a realtime priority of {priority}")
            for vcpu in _list(sched.get("vcpus", "")):
                yield vcpu, priority


def _nodes(domain: ET.Element) -> CpuSet:
    """Return the nodes of <numatune>: of its cells where each of the guest's has one, else also the general ones.

    Whatever the mode: ``preferred`` and ``interleave`` too say where the memory is to be. Without a nodeset
    (placement='auto') nothing is known.
    """
    cells = {cell.get("id") for cell in domain.findall("cpu/numa/cell")}
    bound = {node.get("cellid"): _list(node.get("nodeset", "")) for node in domain.findall("numatune/memnode")}
    found = NO_CPUS
    for nodes in bound.values():
        found |= nodes
    general = domain.find("numatune/memory")
    if general is not None and not (cells and cells <= bound.keys()):
        found |= _list(general.get("nodeset", ""))
    return found


def _list(text: str) -> CpuSet:
    """Read libvirt's list: the kernel's, and ``^3`` takes out of what stands before it."""
    found = NO_CPUS
    for item in text.split(","):
        if item.strip().startswith("^"):
            found -= CpuSet([_number(item.strip()[1:])])
        else:
            found |= CpuSet.parse(item)
    return found


def _number(text: str) -> int:
    if _NUMBER.fullmatch(text) is None:
        raise ValueError(f"{text[:20]!r} is not a number")
    return int(text)

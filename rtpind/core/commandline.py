# SPDX-License-Identifier: GPL-2.0-or-later
"""QEMU's command line → the NUMA nodes that it binds the guest's memory to.

libvirt binds memory by ``host-nodes`` of memory backends, which its XML does not tell where it chose them itself
(``placement='auto'``), and the memory cgroup counts none of where the guest has huge pages. A process can overwrite
what the kernel shows of its command line: what is read here chooses among the pCPUs that the guest may have anyway.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from itertools import pairwise

from rtpind.core.cpuset import CpuListError, CpuSet

#: MAX_NUMNODES of the kernel, at its largest configuration.
_MAX_NODES = 1024
_KEY = re.compile(r"host-nodes(\.\d+)?", re.ASCII)


def bound_nodes(words: Sequence[str]) -> CpuSet:
    """Return the nodes of all memory backends (``-object``), whatever their policy; empty where none is bound.

    Both forms are read: JSON, and ``memory-backend-ram,id=x,host-nodes=0-1,policy=bind``. What makes no sense is as
    good as not there.
    """
    found: set[int] = set()
    for option, value in pairwise(words):
        if option == "-object":
            found |= {node for node in (_of_json if value.startswith("{") else _of_keys)(value) if node < _MAX_NODES}
    return CpuSet(found)


def _of_json(text: str) -> Iterator[int]:
    try:
        made = json.loads(text)
    except (ValueError, RecursionError):
        return
    nodes = made.get("host-nodes", ())
    if str(made.get("qom-type")).startswith("memory-backend-") and isinstance(nodes, list):
        yield from (node for node in nodes if type(node) is int and node >= 0)


def _of_keys(text: str) -> Iterator[int]:
    kind, *rest = text.replace(",,", "\0").split(",")  # a comma in a value is written twice
    if not kind.removeprefix("qom-type=").startswith("memory-backend-"):
        return
    for item in rest:
        key, _, value = item.partition("=")
        if _KEY.fullmatch(key):
            try:
                yield from CpuSet.parse(value)
            except CpuListError:
                continue

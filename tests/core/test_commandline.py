# SPDX-License-Identifier: GPL-2.0-or-later
"""What QEMU's command line says of the nodes of its guest's memory: as libvirt writes it, and odd and hostile lines."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rtpind.core.commandline import bound_nodes

HUGE = {  # as libvirt 9.0 writes it for <memnode cellid='0' mode='strict' nodeset='1'/> with huge pages
    "qom-type": "memory-backend-file",
    "id": "ram-node0",
    "mem-path": "/dev/hugepages/libvirt/qemu/1-rt",
    "prealloc": True,
    "size": 1073741824,
    "host-nodes": [1],
    "policy": "bind",
}


def line(*objects):
    words = ["/usr/bin/qemu-system-x86_64", "-name", "guest=rt", "-m", "size=1048576k"]
    for one in objects:
        words += ["-object", one if isinstance(one, str) else json.dumps(one)]
    return [*words, "-numa", "node,nodeid=0,cpus=0-1,memdev=ram-node0", ""]


@pytest.mark.parametrize(
    ("objects", "nodes"),
    [
        ([], ""),
        ([HUGE], "1"),
        ([HUGE, HUGE | {"host-nodes": [0, 3], "policy": "interleave"}], "0-1,3"),
        ([{key: value for key, value in HUGE.items() if key != "host-nodes"}], ""),
        (["memory-backend-ram,id=ram-node0,size=1073741824,host-nodes=0-1,policy=bind"], "0-1"),
        (["memory-backend-ram,id=a,host-nodes=0,host-nodes=2,policy=preferred"], "0,2"),
        (["qom-type=memory-backend-memfd,id=a,host-nodes.0=1,host-nodes.1=3"], "1,3"),
        (["memory-backend-file,id=a,mem-path=/a,,host-nodes=5,host-nodes=1"], "1"),
        (["iothread,id=a,host-nodes=1", {"qom-type": "iothread", "host-nodes": [1]}], ""),
    ],
)
def test_the_nodes_are_those_of_all_memory_backends(objects, nodes):
    """Of both forms, each with several nodes or none; of no other object."""
    assert str(bound_nodes(line(*objects))) == nodes


@pytest.mark.parametrize(
    "odd",
    [
        "",
        "{",
        "[]",
        "{" * 100_000,
        '{"a":' * 100_000,
        json.dumps(HUGE | {"host-nodes": 1}),
        json.dumps(HUGE | {"host-nodes": [-1, True, 1.0, "1", None, 1024, 10**30]}),
        json.dumps({"host-nodes": [1]}),
        "memory-backend-ram,host-nodes=x,host-nodes=3-1,host-nodes=,host-nodes=1024-1025",
        "memory-backend-ram,hostnodes=1,xhost-nodes=1,host-nodes.x=1,host-nodes",
    ],
)
def test_what_makes_no_sense_is_as_good_as_not_there(odd):
    """A process writes its own command line: whatever stands there, the rest counts, and it costs nothing."""
    assert str(bound_nodes(line(odd))) == ""
    assert str(bound_nodes(line(odd, HUGE))) == "1"


def test_a_line_that_ends_early_binds_nothing():
    """The value may be missing, and so may everything."""
    assert not bound_nodes([])
    assert not bound_nodes(["-object"])


@settings(deadline=None, max_examples=50)
@given(st.lists(st.sampled_from(["-object", "memory-backend-ram,", "host-nodes=0-9,", "{", '"', ",,", "x"])))
def test_nothing_is_raised(words):
    """Whatever the words are."""
    assert bound_nodes([*words, "".join(words)]) is not None

# SPDX-License-Identifier: GPL-2.0-or-later
"""How pCPUs hang together."""

from factories import cpus

from rtpind.core.topology import Topology


def test_a_made_up_host_is_numbered_as_the_kernel_does():
    """Two sockets of two cores with two threads: siblings are as far apart as there are cores."""
    made = Topology.built(2, 2, 2)

    assert [str(made.siblings(cpu)) for cpu in range(8)] == ["0,4", "1,5", "2,6", "3,7", "0,4", "1,5", "2,6", "3,7"]
    assert {node: str(found) for node, found in made.nodes.items()} == {0: "0-1,4-5", 1: "2-3,6-7"}
    assert str(made.sockets[7]) == "2-3,6-7"


def test_domains_are_the_smallest_kind_first():
    """L3 caches, then nodes, then sockets, each kind by its lowest pCPU."""
    made = Topology.built(2, 4, caches=2)

    assert [[str(domain) for domain in kind] for kind in made.domains] == [
        ["0-1", "2-3", "4-5", "6-7"],
        ["0-3", "4-7"],
        ["0-3", "4-7"],
    ]


def test_what_is_not_known_is_alone():
    """On a host that tells nothing, a pCPU has no sibling, no node and no domain."""
    empty = Topology()

    assert (empty.siblings(3), empty.domains) == (cpus("3"), ())
    assert Topology.built(1, 2).of_nodes(cpus("0,5")) == cpus("0-1")

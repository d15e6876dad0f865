# SPDX-License-Identifier: GPL-2.0-or-later
"""How pCPUs hang together."""

import pytest
from factories import cpus

from rtpind.core.topology import Topology


def test_a_made_up_host_is_numbered_as_the_kernel_does():
    """Two sockets of two cores with two threads: siblings are as far apart as there are cores."""
    made = Topology.built(2, 2, 2)

    assert [str(made.siblings(cpu)) for cpu in range(8)] == ["0,4", "1,5", "2,6", "3,7", "0,4", "1,5", "2,6", "3,7"]
    assert {node: str(found) for node, found in made.nodes.items()} == {0: "0-1,4-5", 1: "2-3,6-7"}
    assert str(made.sockets[7]) == "2-3,6-7"


@pytest.mark.parametrize(
    ("made", "domains"),
    [
        (Topology.built(2, 4, caches=2), [["0-1", "2-3", "4-5", "6-7"], ["0-3", "4-7"]]),
        (Topology.built(1, 8, caches=4, dies=2), [["0-1", "2-3", "4-5", "6-7"], ["0-3", "4-7"], ["0-7"]]),
        (Topology.built(1, 8, caches=4, nodes=2), [["0-1", "2-3", "4-5", "6-7"], ["0-3", "4-7"], ["0-7"]]),
        (Topology.built(1, 8, nodes=2), [["0-3", "4-7"], ["0-7"]]),  # two nodes of one L3 cache
        (Topology.built(1, 8, dies=4, nodes=2), [["0-1", "2-3", "4-5", "6-7"], ["0-3", "4-7"], ["0-7"]]),
        (Topology.built(4, 1, 2), []),
        (Topology.built(1, 3, 2, caches=3), [["0-5"]]),
        (Topology(caches={0: cpus("0-3")}, dies={cpu: cpus(str(cpu)) for cpu in range(4)}), [["0-3"]]),
    ],
)
def test_domains_are_the_smallest_kind_first(made, domains):
    """Each kind by its lowest pCPU, and once; no part is one core, such as the dies of kernels that know of none."""
    assert [[str(domain) for domain in kind] for kind in made.domains] == domains


def test_the_nodes_of_pcpus_and_the_pcpus_of_nodes():
    """As far as there are any."""
    made = Topology.built(2, 4, nodes=2)

    assert {node: str(found) for node, found in made.nodes.items()} == {0: "0-1", 1: "2-3", 2: "4-5", 3: "6-7"}
    assert str(made.of_nodes(cpus("1,3,9"))) == "2-3,6-7"
    assert str(made.nodes_of(cpus("1-2,99"))) == "0-1"


def test_what_is_not_known_is_alone():
    """On a host that tells nothing, a pCPU has no sibling, no node and no domain."""
    empty = Topology()

    assert (empty.siblings(3), empty.domains) == (cpus("3"), ())
    assert Topology.built(1, 2).of_nodes(cpus("0,5")) == cpus("0-1")

# SPDX-License-Identifier: GPL-2.0-or-later
"""What libvirt's definition says of real guests: asked once, told of the process that runs, changed by events."""

from __future__ import annotations

import subprocess

import libvirt
import pytest
from trees import until

from demo.guests import Lab
from rtpind.core.commandline import bound_nodes
from rtpind.core.cpuset import CpuSet
from rtpind.core.memory import Memory
from rtpind.core.model import Traits
from rtpind.core.traits import parse
from rtpind.ctl.look import running
from rtpind.daemon.observe import Observer
from rtpind.host.details import Described
from rtpind.host.hypervisor import Changed, Hypervisor, Listed, _definition
from rtpind.host.proc import Proc

PINNED = "<vcpupin vcpu='0' cpuset='0'/><vcpupin vcpu='1' cpuset='0-1'/>"
NOVA = (
    "<instance><flavor name='rt.small'/><owner><project uuid='512866f9994f4ad8916d8539a7cdeec9'>plant</project></owner>"
    "</instance>"
)


def virsh(*words: str) -> None:
    subprocess.run(["virsh", "-q", *words], check=True, capture_output=True, timeout=30)


def test_a_command_sees_the_traits_of_the_guests_that_run(lab: Lab) -> None:
    """Pins and the partition that libvirt gives each; metadata that is set while it runs is seen at the next look."""
    guest = lab.start("traits", vcpus=2, cputune=PINNED)
    observer = Observer()

    def traits() -> Traits | None:
        domains = running(observer)
        found = observer.look({guest.uuid: domains[guest.uuid]}, Memory()).guests
        return found[0].traits

    assert traits() == Traits(partition="/machine", pins={0: CpuSet([0]), 1: CpuSet([0, 1])})

    uri = "http://openstack.org/xmlns/libvirt/nova/1.1"
    virsh("metadata", guest.uuid, uri, "--live", "--key", "nova", "--set", NOVA)
    found = traits()

    assert found is not None
    assert (found.flavor, found.projects) == ("rt.small", ("plant", "512866f9994f4ad8916d8539a7cdeec9"))


@pytest.mark.parametrize("shared", [False, True])
def test_where_memory_is_bound_is_told_by_libvirt_and_by_qemu(lab: Lab, shared: bool) -> None:
    """By the XML, by the NUMA parameters alone, and by the command line, each over what any user may read."""
    guest = lab.start("bound", numatune="<numatune><memory mode='strict' nodeset='0'/></numatune>", shared=shared)
    conn = libvirt.openReadOnly("qemu:///system")
    definition = _definition(conn.lookupByUUIDString(guest.uuid))
    conn.close()

    assert definition.nodeset == "0"
    assert parse("<domain/>", definition.nodeset).nodes == CpuSet([0])
    assert parse(definition.xml).nodes == CpuSet([0])
    assert bound_nodes(Proc().cmdline(guest.pid)) == CpuSet([0])


@pytest.mark.parametrize("change", ["pin", "metadata"])
def test_a_change_of_the_definition_is_told(lab: Lab, change: str) -> None:
    """A live pin and new metadata say that the definition is another, and it then is."""
    guest = lab.start("changed", cputune="<vcpupin vcpu='0' cpuset='0'/>")
    posts: list[object] = []
    hypervisor = Hypervisor("qemu:///system", posts.append)
    hypervisor.start()
    try:
        until(lambda: any(isinstance(post, Listed) for post in posts), "connected")
        if change == "pin":
            virsh("vcpupin", guest.uuid, "0", "1", "--live")
        else:
            virsh("metadata", guest.uuid, "urn:x", "--live", "--key", "x", "--set", "<x/>")
        until(
            lambda: any(
                isinstance(post, Changed) and post.domain.uuid == guest.uuid and post.redefined for post in posts
            ),
            "the change is told",
        )
        hypervisor.describe(guest.uuid, (1, 2))
        until(lambda: any(isinstance(post, Described) for post in posts), "it is described")
        (described,) = (post for post in posts if isinstance(post, Described))

        assert (described.uuid, described.process) == (guest.uuid, (1, 2))
        assert described.traits is not None
        assert described.traits.pins == {0: CpuSet([1 if change == "pin" else 0])}
    finally:
        hypervisor.stop()

# SPDX-License-Identifier: GPL-2.0-or-later
"""The parts of the lab that can be wrong without a host being booted."""

from __future__ import annotations

from dataclasses import replace

from lab.initrd import order
from lab.recipe import IMAGES, SHAPES
from lab.scene import Thread, cpus, violations_among

DEPENDENCIES = """\
kernel/fs/ext4/ext4.ko.xz: kernel/lib/crc16.ko.xz kernel/fs/jbd2/jbd2.ko.xz
kernel/fs/jbd2/jbd2.ko.xz:
kernel/lib/crc16.ko.xz:
kernel/drivers/virtio/virtio_pci.ko.xz: kernel/drivers/virtio/virtio.ko.xz kernel/drivers/virtio/virtio_ring.ko.xz
kernel/drivers/virtio/virtio.ko.xz: kernel/drivers/virtio/virtio_ring.ko.xz
kernel/drivers/virtio/virtio_ring.ko.xz:
kernel/net/unused.ko.xz:
"""


def test_modules_are_loaded_after_what_they_need() -> None:
    """Each once, what it needs before it; a module that the kernel has built in is left out."""
    names = [path.rpartition("/")[2].removesuffix(".ko.xz") for path in order(DEPENDENCIES)]

    assert names == ["virtio_ring", "virtio", "virtio_pci", "crc16", "jbd2", "ext4"]


def test_an_image_is_known_by_its_recipe() -> None:
    """What goes into an image changes its name in the cache."""
    image = IMAGES["bookworm-rt"]

    digests = {image.digest(), IMAGES["trixie-rt"].digest(), replace(image, extra=("tuned",)).digest()}

    assert len(digests) == 3


def test_each_shape_has_an_image_and_a_pcpu_for_its_host() -> None:
    """No shape isolates every pCPU, and each pCPU belongs to one NUMA node."""
    for shape in SHAPES.values():
        total = set(range(int(shape.smp.partition(",")[0])))
        assert shape.image in IMAGES
        assert set(cpus(shape.isolated)) < total
        assert sorted(cpu for node in shape.nodes for cpu in cpus(node)) == sorted(total)


def test_the_lab_sees_who_shares_a_pcpu_with_fifo() -> None:
    """A helper beside a FIFO vCPU is a violation, and so is another guest's; not FIFO above it of the same guest."""
    vcpu = Thread(1, "CPU 0/TCG", (2,), 0x40000001, 1, 0, "")
    helper = Thread(2, "worker", (0, 2), 0, 0, 0, "")
    above = replace(helper, policy=1, priority=2)

    assert violations_among([("one", vcpu), ("one", helper)])
    assert violations_among([("one", vcpu), ("two", above)])
    assert violations_among([("one", vcpu), ("one", above)]) == []
    assert violations_among([("one", replace(vcpu, policy=0)), ("one", helper)]) == []

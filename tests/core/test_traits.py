# SPDX-License-Identifier: GPL-2.0-or-later
"""What a live domain's XML says of a guest, from Nova, oVirt, SEAPATH and hostile hands."""

from pathlib import Path

import pytest
from factories import cpus
from hypothesis import given, settings
from hypothesis import strategies as st

from rtpind.core.model import Traits
from rtpind.core.traits import MAX_CHARS, parse

DOMAINS = Path(__file__).parent / "domains"
NOVA = "http://openstack.org/xmlns/libvirt/nova/1."


def recorded(name: str) -> Traits:
    return parse((DOMAINS / f"{name}.xml").read_text(encoding="utf-8"))


def domain(*parts: str) -> Traits:
    return parse(f"<domain type='kvm' id='1'>{''.join(parts)}</domain>")


def tune(text: str) -> Traits:
    return domain(f"<cputune>{text}</cputune>")


def test_a_nova_guest_with_realtime_vcpus() -> None:
    """Flavor, project, pins, FIFO for all but vCPU 0, locked huge pages on node 1, sibling pairs.

    Nova gave libvirt one <vcpusched> for vCPUs 1-3, and libvirt made three of it.
    """
    assert recorded("nova-realtime") == Traits(
        flavor="rt.4c8g",
        project="plant-north",
        project_id="512866f9994f4ad8916d8539a7cdeec9",
        has=frozenset({"hugepages", "locked", "vcpusched"}),
        threads=2,
        pins={0: cpus("26"), 1: cpus("27"), 2: cpus("28"), 3: cpus("29")},
        realtime={1: 1, 2: 1, 3: 1},
        nodes=cpus("1"),
    )


def test_a_nova_guest_with_a_pcpu_for_its_emulator() -> None:
    """With hw:emulator_threads_policy=isolate the pCPU of the emulator is no vCPU's, and not realtime."""
    assert recorded("nova-isolate") == Traits(
        flavor="rt-isolate.4c8g",
        project="plant-north",
        project_id="512866f9994f4ad8916d8539a7cdeec9",
        has=frozenset({"hugepages", "locked", "vcpusched"}),
        threads=2,
        pins={0: cpus("10"), 1: cpus("11"), 2: cpus("12"), 3: cpus("13")},
        realtime={1: 1, 2: 1, 3: 1},
        nodes=cpus("0"),
    )


def test_a_nova_guest_that_is_not_pinned() -> None:
    """The pCPUs of the whole guest are no pins of its vCPUs; libvirt adds the partition when it starts a guest."""
    assert recorded("nova-shared") == Traits(
        flavor="m1.small",
        project="plant-north",
        project_id="512866f9994f4ad8916d8539a7cdeec9",
        partition="/machine",
    )


def test_an_ovirt_guest() -> None:
    """Pins and huge pages on both nodes; oVirt's own metadata is not Nova's."""
    assert recorded("ovirt") == Traits(
        has=frozenset({"hugepages"}),
        partition="/machine",
        pins={0: cpus("2"), 1: cpus("3"), 2: cpus("18"), 3: cpus("19")},
        nodes=cpus("0-1"),
    )


def test_a_seapath_guest() -> None:
    """FIFO in an element for each vCPU, and the slice of realtime guests."""
    assert recorded("seapath") == Traits(
        has=frozenset({"vcpusched"}),
        partition="/machine/rt",
        pins={0: cpus("2"), 1: cpus("3")},
        realtime={0: 1, 1: 1},
    )


def test_a_guest_that_says_nothing_has_no_traits() -> None:
    """Every part may be missing."""
    assert domain() == Traits()
    assert domain("<metadata/>", "<cputune/>", "<numatune/>", "<memoryBacking/>", "<cpu/>", "<resource/>") == Traits()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1-4,^2", "1,3-4"),
        ("0-7, ^0 ,^7", "1-6"),
        ("^2,1-4", "1-4"),  # a ^ takes out of what stands before it alone
        ("3", "3"),
        ("0,2,4-5", "0,2,4-5"),
        ("", ""),
    ],
)
def test_lists_are_read_as_libvirt_reads_them(text: str, expected: str) -> None:
    """Ranges, and ^ for all but one."""
    assert tune(f"<vcpupin vcpu='5' cpuset='{text}'/>").pins == {5: cpus(expected)}
    assert domain(f"<numatune><memory mode='strict' nodeset='{text}'/></numatune>").nodes == cpus(expected)


@pytest.mark.parametrize(
    ("text", "realtime"),
    [
        ("<vcpusched vcpus='0-4,^3' scheduler='fifo' priority='1'/>", {0: 1, 1: 1, 2: 1, 4: 1}),
        ("<vcpusched vcpus='1' scheduler='rr' priority='99'/>", {1: 99}),
        (
            "<vcpusched vcpus='0' scheduler='fifo' priority='2'/><vcpusched vcpus='1' scheduler='fifo' priority='3'/>",
            {0: 2, 1: 3},
        ),
        ("<vcpusched vcpus='0' scheduler='batch'/><vcpusched vcpus='1' scheduler='idle'/>", {}),
        ("<vcpusched vcpus='0'/>", {}),
        ("<iothreadsched iothreads='1' scheduler='fifo' priority='1'/>", {}),
        ("<emulatorsched scheduler='fifo' priority='1'/>", {}),
    ],
)
def test_realtime_vcpus_are_those_with_fifo_or_rr(text: str, realtime: dict[int, int]) -> None:
    """By vCPU; ``has: vcpusched`` is whether there is any."""
    found = tune(text)

    assert found.realtime == realtime
    assert found.has == ({"vcpusched"} if realtime else set())


@pytest.mark.parametrize(
    ("tuned", "cells", "nodes"),
    [
        ("<memory mode='strict' nodeset='0-1'/>", 0, "0-1"),
        ("<memory mode='preferred' nodeset='2'/>", 0, "2"),
        ("<memory mode='strict' placement='auto'/>", 0, ""),
        ("<memory mode='strict' nodeset='0-1'/><memnode cellid='0' mode='strict' nodeset='1'/>", 1, "1"),
        ("<memory mode='strict' nodeset='0'/><memnode cellid='0' mode='strict' nodeset='1'/>", 2, "0-1"),
        ("<memory mode='strict' nodeset='0'/><memnode cellid='0' mode='strict' nodeset='1'/>", 0, "0-1"),
        ("<memnode cellid='0' mode='strict' nodeset='3'/><memnode cellid='1' mode='strict' nodeset='5'/>", 2, "3,5"),
    ],
)
def test_nodes_are_where_the_cells_are_bound(tuned: str, cells: int, nodes: str) -> None:
    """The general nodeset counts for cells that have none of their own."""
    numa = "".join(f"<cell id='{number}' cpus='{number}' memory='1'/>" for number in range(cells))

    assert domain(f"<cpu><numa>{numa}</numa></cpu><numatune>{tuned}</numatune>").nodes == cpus(nodes)


def nova(version: int, inner: str) -> str:
    return f"<nova:instance xmlns:nova='{NOVA}{version}'>{inner}</nova:instance>"


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        (nova(1, "<nova:flavor/><nova:owner><nova:project/></nova:owner>"), ("", "", "")),
        (nova(1, ""), ("", "", "")),
        (nova(1, "<nova:owner/>"), ("", "", "")),
        (
            nova(0, "<nova:flavor name='old'/><nova:owner><nova:project uuid='u'>p</nova:project></nova:owner>"),
            ("old", "p", "u"),
        ),
        (nova(0, "<nova:flavor name='old'/>") + nova(1, "<nova:flavor name='new'/>"), ("new", "", "")),
        (nova(1, "<nova:owner><nova:project uuid='u'> a&amp;b </nova:project></nova:owner>"), ("", "a&b", "u")),
        (nova(2, "<nova:flavor name='x'/>"), ("", "", "")),  # a namespace that nobody knows yet
        ("<instance><flavor name='x'/></instance>", ("", "", "")),
        ("<other>" + nova(1, "<nova:flavor name='x'/>") + "</other>", ("", "", "")),
    ],
)
def test_metadata_is_novas_own_or_nothing(metadata: str, expected: tuple[str, str, str]) -> None:
    """Only what stands where Nova puts it counts, in a namespace of Nova's."""
    found = domain(f"<metadata>{metadata}</metadata>")

    assert (found.flavor, found.project, found.project_id) == expected
    assert found.projects == tuple(word for word in expected[1:] if word)


@pytest.mark.parametrize(("threads", "expected"), [("2", 2), ("1", 1), ("0", 1), (None, 1)])
def test_threads_are_those_of_the_guests_own_cores(threads: str | None, expected: int) -> None:
    """Without a topology a core has one."""
    attribute = "" if threads is None else f" threads='{threads}'"

    assert domain(f"<cpu><topology sockets='1' cores='2'{attribute}/></cpu>").threads == expected


BOMB = "<!DOCTYPE d [<!ENTITY a 'aaaaaaaaaa'><!ENTITY b '&a;&a;&a;&a;&a;&a;'>]><domain><name>&b;</name></domain>"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\0",
        "\ud800",
        "no XML",
        "<domain>",
        "<domain/><domain/>",
        "<domain>&unknown;</domain>",
        "<domainstatus/>",
        "<domain xmlns='urn:x'/>",
        BOMB,
        "<!DOCTYPE domain SYSTEM 'file:///etc/passwd'><domain/>",
        "<domain/>" + " " * MAX_CHARS,
        *(
            f"<domain><cputune>{one}</cputune></domain>"
            for one in (
                "<vcpupin/>",
                "<vcpupin vcpu='0' cpuset='x'/>",
                "<vcpupin vcpu='0' cpuset='4-1'/>",
                "<vcpupin vcpu='0' cpuset='^'/>",
                "<vcpupin vcpu='0' cpuset='0-4,^2-3'/>",
                "<vcpupin vcpu='0' cpuset='0-99999999999'/>",
                "<vcpupin vcpu='-1' cpuset='1'/>",
                "<vcpupin vcpu='٣' cpuset='1'/>",
                f"<vcpupin vcpu='{'9' * 5000}' cpuset='1'/>",
                "<vcpusched vcpus='0' scheduler='fifo'/>",
                "<vcpusched vcpus='0' scheduler='fifo' priority='0'/>",
                "<vcpusched vcpus='0' scheduler='fifo' priority='100'/>",
                "<vcpusched vcpus='0' scheduler='fifo' priority='1.5'/>",
                "<vcpusched vcpus='all' scheduler='fifo' priority='1'/>",
            )
        ),
        "<domain><cpu><topology threads='two'/></cpu></domain>",
        "<domain><numatune><memory nodeset='all'/></numatune></domain>",
        "<domain><numatune><memnode cellid='0' nodeset='1-'/></numatune></domain>",
    ],
)
def test_what_makes_no_sense_is_one_error(text: str) -> None:
    """Odd and hostile input is a ValueError for the whole, and its message is short."""
    with pytest.raises(ValueError) as raised:  # noqa: PT011  # that it is nothing else is the point
        parse(text)

    assert len(str(raised.value)) < 200


@pytest.mark.parametrize(
    ("numatune", "nodeset", "nodes"),
    [
        ("", "", ""),
        ("<numatune><memory mode='strict' placement='auto'/></numatune>", "1", "1"),
        ("<numatune><memory mode='strict' nodeset='0'/></numatune>", "0", "0"),
        ("<numatune><memnode cellid='0' mode='strict' nodeset='3'/></numatune>", "0-3", "3"),
    ],
)
def test_the_nodes_that_libvirt_chose_stand_in_for_those_of_the_xml(numatune: str, nodeset: str, nodes: str) -> None:
    """With placement='auto' the XML names none; where it does, it says more than the parameters: nodes of cells too."""
    assert str(parse(f"<domain>{numatune}</domain>", nodeset).nodes) == nodes


def test_deep_nesting_is_no_fault() -> None:
    """A hundred thousand brackets are passed over."""
    assert domain("<a>" * 100_000 + "</a>" * 100_000) == Traits()


MARKUP = st.sampled_from(
    ["<domain>", "</domain>", "<cputune>", "<vcpupin vcpu='", "' cpuset='", "'/>", "^", "0-3", ","]
)


@settings(deadline=None)  # on a busy machine one call may take long
@given(st.lists(MARKUP | st.text(max_size=5)).map("".join))
def test_nothing_but_a_value_error_is_raised(text: str) -> None:
    """Whatever the text is."""
    try:
        assert isinstance(parse(text), Traits)
        assert isinstance(parse(f"<domain><cputune>{text}</cputune></domain>"), Traits)
    except ValueError:
        pass

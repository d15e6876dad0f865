# SPDX-License-Identifier: GPL-2.0-or-later
"""CpuSet reads and prints the kernel's CPU list format, and is a set."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rtpind.core.cpuset import MAX_CPU, NO_CPUS, CpuListError, CpuSet

CPUS = st.frozensets(st.integers(0, 300), max_size=40)

GOOD = [
    ("", set()),
    ("  \n", set()),
    ("0", {0}),
    ("0\n", {0}),
    ("3,1", {1, 3}),
    ("0-3,8", {0, 1, 2, 3, 8}),
    ("5-5", {5}),
    ("1,1,0-2", {0, 1, 2}),
    (" 0-1 , 4 ", {0, 1, 4}),
    ("007", {7}),
    ("8191", {MAX_CPU}),
    ("0-7:1/2", {0, 2, 4, 6}),
    ("1-8:2/4", {1, 2, 5, 6}),
    ("0-3:4/4", {0, 1, 2, 3}),
    ("0-3:1/9999999999", {0}),
    ("0-2,4-8:1/4,20", {0, 1, 2, 4, 8, 20}),
]

HOSTILE = [
    (",", "an empty item between commas"),
    ("0,,1", "an empty item between commas"),
    ("0,", "an empty item between commas"),
    (",0", "an empty item between commas"),
    ("0, ,1", "an empty item between commas"),
    ("3-1", "the range '3-1' runs backwards"),
    ("8192", "'8192' goes beyond pCPU 8191"),
    ("0-8192", "'0-8192' goes beyond pCPU 8191"),
    ("0-999999999999999999", "'0-999999999999999999' goes beyond pCPU 8191"),
    ("9999999999999999999", "'9999999999999999999' is not a pCPU number or range"),
    ("-1", "'-1' is not a pCPU number or range"),
    ("1-", "'1-' is not a pCPU number or range"),
    ("0--3", "'0--3' is not a pCPU number or range"),
    ("0-1-2", "'0-1-2' is not a pCPU number or range"),
    ("0 1", "'0 1' is not a pCPU number or range"),
    ("0 - 1", "'0 - 1' is not a pCPU number or range"),
    ("0x3", "'0x3' is not a pCPU number or range"),
    ("1.5", "'1.5' is not a pCPU number or range"),
    ("+1", "'+1' is not a pCPU number or range"),
    ("1_0", "'1_0' is not a pCPU number or range"),
    ("all", "'all' is not a pCPU number or range"),
    ("0-N", "'0-N' is not a pCPU number or range"),
    ("^1", "'^1' is not a pCPU number or range"),
    ("٣", "'٣' is not a pCPU number or range"),
    ("²", "'²' is not a pCPU number or range"),
    ("1\n2", "'1\\n2' is not a pCPU number or range"),
    ("1\0", "'1\\x00' is not a pCPU number or range"),
    ("3:1/2", "'3:1/2' is not a pCPU number or range"),
    ("0-7:1", "'0-7:1' is not a pCPU number or range"),
    ("0-7:1/", "'0-7:1/' is not a pCPU number or range"),
    ("0-7:0/2", "'0-7:0/2': of USED/GROUP, USED must be 1 to GROUP"),
    ("0-7:3/2", "'0-7:3/2': of USED/GROUP, USED must be 1 to GROUP"),
    ("0-7:0/0", "'0-7:0/0': of USED/GROUP, USED must be 1 to GROUP"),
    ("7-0:1/2", "the range '7-0:1/2' runs backwards"),
]

PRINTED = [
    ((), ""),
    ((0,), "0"),
    ((8191,), "8191"),
    ((0, 1), "0-1"),
    ((1, 3, 5), "1,3,5"),
    ((9, 0, 1, 2, 8), "0-2,8-9"),
    (range(64), "0-63"),
]


@pytest.mark.parametrize(("text", "cpus"), GOOD)
def test_reads_the_kernels_lists(text, cpus):
    """Every form that the kernel prints or takes is read."""
    read = CpuSet.parse(text)

    assert set(read) == cpus


@pytest.mark.parametrize(("text", "message"), HOSTILE)
def test_refuses_what_is_no_list(text, message):
    """A text that is not a CPU list is refused, and the message says which part and why."""
    with pytest.raises(CpuListError) as refusal:
        CpuSet.parse(text)

    assert str(refusal.value) == message


@pytest.mark.parametrize(("cpus", "text"), PRINTED)
def test_prints_as_the_kernel_does(cpus, text):
    """Neighbours are printed as a range, and the empty set as the empty text."""
    made = CpuSet(cpus)

    assert str(made) == text
    assert repr(made) == f"CpuSet({text!r})"


@given(CPUS)
def test_what_is_printed_reads_back(cpus):
    """A printed set reads back as itself."""
    made = CpuSet(cpus)

    assert CpuSet.parse(str(made)) == made


@given(st.text(alphabet="0123456789-,:/^ x\n٣", max_size=30) | st.text(max_size=30))
def test_any_text_is_read_or_refused(text):
    """Any text is a set within the kernel's bound, or a CpuListError."""
    try:
        made = CpuSet.parse(text)
    except CpuListError:
        return

    assert all(0 <= cpu <= MAX_CPU for cpu in made)
    assert CpuSet.parse(str(made)) == made


@given(st.integers(0, 200), st.integers(0, 200), st.integers(1, 50), st.integers(1, 50))
def test_strides_take_the_first_of_each_group(first, more, one, other):
    """``A-B:USED/GROUP`` is the first USED of every GROUP pCPUs."""
    used, group = sorted((one, other))
    last = first + more
    made = CpuSet.parse(f"{first}-{last}:{used}/{group}")

    wanted = {cpu for start in range(first, last + 1, group) for cpu in range(start, min(start + used, last + 1))}

    assert set(made) == wanted


@given(CPUS, CPUS, st.integers(0, 310))
def test_agrees_with_frozenset(left, right, cpu):
    """Every operation gives what the same one on a frozenset gives."""
    a, b = CpuSet(left), CpuSet(right)

    assert set(a & b) == left & right
    assert set(a | b) == left | right
    assert set(a - b) == left - right
    assert (a <= b) == (left <= right)
    assert (a < b) == (left < right)
    assert (a == b) == (left == right)
    assert (cpu in a) == (cpu in left)
    assert len(a) == len(left)
    assert bool(a) == bool(left)
    assert list(a) == sorted(left)


@given(CPUS, st.randoms(use_true_random=False))
def test_order_of_making_does_not_matter(cpus, shuffle):
    """Equal sets are equal and hash alike, however they were made."""
    shuffled = [*cpus, *cpus]
    shuffle.shuffle(shuffled)
    a, b = CpuSet(cpus), CpuSet(shuffled)

    assert a == b
    assert hash(a) == hash(b)
    assert CpuSet.of_mask(a.mask) == a


@given(CPUS.filter(bool))
def test_first_is_the_lowest(cpus):
    """``first`` is the lowest pCPU."""
    assert CpuSet(cpus).first() == min(cpus)


def test_an_empty_set_has_no_first():
    """``first`` of the empty set is a ValueError, not a wrong pCPU."""
    with pytest.raises(ValueError, match="has no first pCPU"):
        NO_CPUS.first()


def test_does_not_change():
    """A set that somebody holds cannot be changed."""
    made = CpuSet([1])

    with pytest.raises(AttributeError, match="immutable"):
        made.mask = 3
    assert set(made) == {1}


def test_is_equal_to_no_other_kind():
    """A set is not equal to its mask, its text, or Python's set."""
    made = CpuSet([0, 1])

    assert made not in (3, "0-1", frozenset({0, 1}), None)

"""Cgroups of both versions: in which one a thread is, who else is there, and what keeps it from a pCPU."""

import os
import subprocess
from pathlib import Path

import pytest
from trees import HYBRID, V1, V2, make_tree, until

from rtpind.core.cpuset import CpuSet
from rtpind.core.model import Kind, Limits
from rtpind.host.cgroup import Cgroups, parse

SCOPE = "/machine.slice/machine-qemu\\x2d1\\x2drt.scope"
VCPU = f"{SCOPE}/libvirt/vcpu0"
V1_ROOT = Path("/sys/fs/cgroup/cpuset")


def v1(cpuset="/", cpu="/", *more):
    return "\n".join([f"9:cpuset:{cpuset}", f"8:cpu,cpuacct:{cpu}", "1:name=systemd:/init.scope", *more, ""])


def limits_of(root, text, kind=Kind.QEMU):
    owner = 7 if kind is Kind.QEMU else 8
    make_tree(root, {f"proc/{owner}/task/8/cgroup": text})
    return Cgroups(root).limits(7, 8, kind)


@pytest.mark.parametrize(
    ("text", "path", "leaf"),
    [
        (f"0::{VCPU}\n", VCPU, "vcpu0"),
        (v1(VCPU, VCPU), VCPU, "vcpu0"),
        (v1("/machine/rt/vcpu0", VCPU), "/machine/rt/vcpu0", "vcpu0"),  # paths may differ, the leaf decides
        (f"8:cpu,cpuacct:{VCPU}\n0::/\n", VCPU, "vcpu0"),  # no cpuset controller
        (v1(VCPU, f"{SCOPE}/libvirt/emulator"), VCPU, ""),  # half moved
        (f"9:cpuset:{VCPU}\n8:cpu:{VCPU}\n7:cpuacct:{SCOPE}/libvirt/emulator\n", VCPU, ""),
        (v1(VCPU, VCPU, f"0::{SCOPE}"), VCPU, "vcpu0"),  # hybrid: systemd alone uses version 2
        (f"9:cpuset:{VCPU}\n0::{SCOPE}/libvirt/emulator\n", VCPU, ""),  # cpu is on version 2: half moved
        (v1(), "/", ""),
        ("0::/\n", "/", ""),
        ("", "/", ""),
    ],
)
def test_a_leaf_is_what_every_hierarchy_agrees_on(text, path, leaf):
    """The cpuset decides the path; the leaf is empty while libvirt moves the thread from one to the next."""
    groups = parse(text.encode())

    assert (groups.path, groups.leaf) == (path, leaf)


@pytest.mark.parametrize("odd", ["\n", "garbage\n", "1:2\n", "::\n", "\0\n", "5:hugetlb:/x:y\n"])
def test_an_odd_line_is_passed_over(odd):
    """Lines that are no cgroup lines change nothing about the others."""
    groups = parse((odd + v1(VCPU, VCPU) + odd).encode())

    assert (groups.path, groups.leaf) == (VCPU, "vcpu0")


@pytest.mark.parametrize("end", ["\x0b", "\x0c", "\x1c", "\x85", "\u2028"])
def test_a_cgroup_cannot_pretend_to_be_another(end):
    """A name that holds what other programs take for the end of a line is one name."""
    forged = f"/user/x{end}9:cpuset:{VCPU}"
    groups = parse(v1(forged, forged).encode())

    assert (groups.path, groups.leaf) == (forged, "vcpu0")
    assert groups.paths["cpu"] == forged


@pytest.mark.parametrize(
    ("mountinfo", "points"),
    [
        (V1, {"cpuset": "cpuset", "cpu": "cpu,cpuacct", "cpuacct": "cpu,cpuacct", "": None}),
        (V2, {"": "", "cpuset": None}),
        (HYBRID, {"cpuset": "cpuset", "": "unified"}),
        ("garbage\n\n1 2 3\n - \n" + V2, {"": ""}),
        ("1 1 0:1 / /mnt/with\\040blank rw - cgroup c rw,cpuset\n", {"cpuset": "../../../mnt/with blank"}),
        ("", {"cpuset": None, "": None}),
    ],
)
def test_mounts_are_found_by_controller(tmp_path, mountinfo, points):
    """Each controller's first mount is known, below the root; a host without any has none."""
    mounts = Cgroups(make_tree(tmp_path, {"proc/self/mountinfo": mountinfo})).mounts

    for controller, point in points.items():
        expected = None if point is None else os.path.normpath(tmp_path / "sys/fs/cgroup" / point)
        assert mounts.get(controller) == expected


@pytest.mark.parametrize(
    ("mountinfo", "file", "text"),
    [
        (V1, f"sys/fs/cgroup/cpuset{VCPU}/tasks", v1(VCPU, VCPU)),
        (V1, f"sys/fs/cgroup/cpu,cpuacct{VCPU}/tasks", v1("/", VCPU)),
        (HYBRID, f"sys/fs/cgroup/cpuset{VCPU}/tasks", v1(VCPU, VCPU, f"0::{SCOPE}")),
        (V2, f"sys/fs/cgroup{VCPU}/cgroup.threads", f"0::{VCPU}\n"),
    ],
)
def test_the_threads_of_a_cgroup_are_listed(tmp_path, mountinfo, file, text):
    """Both versions name everybody in the cgroup, of whatever process."""
    root = make_tree(tmp_path, {"proc/self/mountinfo": mountinfo, file: "12\n7\n900\n"})

    assert Cgroups(root).threads(parse(text.encode())) == [12, 7, 900]


def test_a_cgroup_that_is_gone_has_no_threads(tmp_path):
    """Neither a removed cgroup nor the root (which is nobody's) has threads to speak of."""
    cgroups = Cgroups(make_tree(tmp_path, {"proc/self/mountinfo": V1, "sys/fs/cgroup/cpuset/tasks": "1\n"}))

    assert cgroups.threads(parse(v1(VCPU, VCPU).encode())) == []
    assert cgroups.threads(parse(v1().encode())) == []


V1_CPUS = "sys/fs/cgroup/cpuset{}/cpuset.effective_cpus"
V2_CPUS = "sys/fs/cgroup{}/cpuset.cpus.effective"


@pytest.mark.parametrize(
    ("mountinfo", "pattern", "text"), [(V1, V1_CPUS, v1(VCPU, VCPU)), (V2, V2_CPUS, f"0::{VCPU}\n")]
)
@pytest.mark.parametrize(
    ("levels", "fence", "by"),
    [
        ({"": "0-7", "/machine.slice": "0-7", SCOPE: "0-7", f"{SCOPE}/libvirt": "0-7", VCPU: "2"}, "2", VCPU),
        ({"": "0-7", "/machine.slice": "0-7", SCOPE: "2-3", f"{SCOPE}/libvirt": "2-3", VCPU: "2-3"}, "2-3", SCOPE),
        ({"": "0-7", "/machine.slice": "4", SCOPE: "4", VCPU: "4"}, "4", "/machine.slice"),
        ({"": "0-7", VCPU: ""}, "0-7", "/"),  # on version 2 an empty file is no limit of its own
        ({"": "0-7", SCOPE: "1,3", VCPU: "nonsense"}, "1,3", SCOPE),
        ({"": "0-7"}, "0-7", "/"),  # no cpuset controller further down
    ],
)
def test_the_fence_is_named_by_the_level_that_made_it(tmp_path, mountinfo, pattern, text, levels, fence, by):
    """The limit is the leaf's, and the cgroup named is the topmost that has no more than it."""
    files = {pattern.format(level): cpus + "\n" for level, cpus in levels.items()}
    root = make_tree(tmp_path, {"proc/self/mountinfo": mountinfo, **files})

    found = limits_of(root, text)

    assert (found.fence, found.fenced_by) == (CpuSet.parse(fence), by)


def test_a_host_without_cpusets_has_no_fence(tmp_path):
    """Where no cpuset can be read nothing is claimed."""
    assert limits_of(make_tree(tmp_path, {"proc/self/mountinfo": V1}), v1(VCPU, VCPU)) == Limits()


MIB = 1024 * 1024
PAGES = 256  # of 4 KiB in a MiB


def nodes_of(root, mountinfo, text, **files):
    files = {name: content for name, content in files.items() if content is not None}
    make_tree(root, {"proc/self/mountinfo": mountinfo, "proc/7/task/7/cgroup": text, **files})
    return str(Cgroups(root).nodes(7))


def stat2(**kinds):
    """Return a memory.numa_stat of version 2, with sizes by node in MiB."""
    lines = {"anon": [], "file": [], "shmem": [], "unevictable": []} | kinds
    return "".join(
        f"{kind} {' '.join(f'N{node}={size * MIB}' for node, size in enumerate(sizes))}\n"
        for kind, sizes in lines.items()
    )


def stat1(**kinds):
    """Return one of version 1, in pages."""
    lines = {"total": [9999], "file": [], "anon": [], "unevictable": []} | kinds
    lines |= {f"hierarchical_{kind}": [8888] for kind in lines}
    return "".join(
        f"{kind}={sum(sizes) * PAGES} {' '.join(f'N{node}={size * PAGES}' for node, size in enumerate(sizes))}\n"
        for kind, sizes in lines.items()
    )


@pytest.mark.parametrize(
    ("sizes", "nodes"),
    [
        ([1024, 0], "0"),
        ([30, 1024], "1"),
        ([512, 512], "0-1"),
        ([128] * 8, "0-7"),
        ([1000, 142, 0, 0], "0"),
        ([896, 128, 0, 0], "0-1"),  # an eighth counts
        ([63, 0], ""),  # too little to say anything
        ([64, 0], "0"),
        ([], ""),
    ],
)
def test_nodes_are_those_with_a_share_of_the_memory(tmp_path, sizes, nodes):
    """An eighth of it, once there is more than QEMU's own; the same by either version."""
    emulator = f"{SCOPE}/libvirt/emulator"
    where2, where1 = f"sys/fs/cgroup{SCOPE}/libvirt/memory.numa_stat", f"sys/fs/cgroup/memory{SCOPE}/memory.numa_stat"
    v1_ = V1 + "30 1 0:26 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"

    assert nodes_of(tmp_path / "2", V2, f"0::{emulator}\n", **{where2: stat2(anon=sizes, file=[9000])}) == nodes
    assert nodes_of(tmp_path / "1", v1_, v1(VCPU, VCPU, f"4:memory:{SCOPE}"), **{where1: stat1(anon=sizes)}) == nodes


def test_locked_and_shared_memory_count(tmp_path):
    """Version 1 has locked pages in a line of their own, version 2 the shared ones."""
    v1_ = V1 + "30 1 0:26 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
    text1 = stat1(anon=[20, 0], unevictable=[0, 2000])
    text2 = stat2(anon=[20, 0], shmem=[0, 2000], unevictable=[5000, 0])

    where = f"sys/fs/cgroup/memory{SCOPE}/memory.numa_stat"
    assert nodes_of(tmp_path / "1", v1_, v1(VCPU, VCPU, f"4:memory:{SCOPE}"), **{where: text1}) == "1"
    where = f"sys/fs/cgroup{SCOPE}/memory.numa_stat"
    assert nodes_of(tmp_path / "2", V2, f"0::{SCOPE}/libvirt/emulator\n", **{where: text2}) == "1"


@pytest.mark.parametrize(
    ("mountinfo", "text"),
    [
        (V2, f"0::{SCOPE}/emulator\n"),  # the slice is everybody's
        (V2, "0::/machine.slice\n"),
        (V2, "0::/\n"),
        (V1, v1(VCPU, VCPU)),
        (V1 + "30 1 0:26 / /sys/fs/cgroup rw - cgroup cgroup rw,memory\n", v1(VCPU, VCPU, "4:memory:/")),
        ("", f"0::{SCOPE}/libvirt/emulator\n"),
    ],
)
def test_memory_of_others_says_nothing(tmp_path, mountinfo, text):
    """What stands above the guest's own cgroups is not read; nor does a host without a memory controller tell."""
    files = {f"sys/fs/cgroup{path}/memory.numa_stat": stat2(anon=[1024]) for path in ("", "/machine.slice")}

    assert nodes_of(tmp_path, mountinfo, text, **files) == ""
    assert str(Cgroups(tmp_path).nodes(8)) == ""


@pytest.mark.parametrize("text", ["", "anon\n", "anon N0\n", "anon N0=x N=1 Nx=2\n", "\0\n\n", "anon N0=" + "9" * 30])
def test_an_odd_count_is_none(tmp_path, text):
    """Lines that make no sense are passed over."""
    where = f"sys/fs/cgroup{SCOPE}/libvirt/memory.numa_stat"

    assert nodes_of(tmp_path, V2, f"0::{SCOPE}/libvirt/emulator\n", **{where: text}) == ""


def test_a_thread_that_ended_has_no_limits(tmp_path):
    """The thread may be gone by the time it is asked."""
    assert Cgroups(make_tree(tmp_path, {"proc/self/mountinfo": V1})).limits(7, 8) == Limits()


@pytest.mark.parametrize("kind", list(Kind))
def test_limits_are_read_where_the_thread_is_listed(tmp_path, kind):
    """A thread of QEMU is found under QEMU's pid, any other under its own."""
    root = make_tree(tmp_path, {"proc/self/mountinfo": V2, V2_CPUS.format(VCPU): "5\n"})

    assert limits_of(root, f"0::{VCPU}\n", kind).fence == CpuSet([5])


@pytest.mark.parametrize("budget", [0, 950000, -1])
def test_the_realtime_budget_is_the_cpu_cgroups(tmp_path, budget):
    """The budget stands in the thread's own cgroup of the cpu controller; a host with such files has RT groups."""
    where = "sys/fs/cgroup/cpu,cpuacct"
    files = {f"{where}/cpu.rt_runtime_us": "1\n", f"{where}{VCPU}/cpu.rt_runtime_us": f"{budget}\n"}
    root = make_tree(tmp_path, {"proc/self/mountinfo": V1, **files})

    assert limits_of(root, v1("/elsewhere", VCPU)).rt_budget_us == budget
    assert Cgroups(root).rt_groups() is True


@pytest.mark.parametrize("mountinfo", [V1, V2, ""])
def test_a_kernel_without_realtime_budgets_says_so(tmp_path, mountinfo):
    """Without the file, and on version 2, there is no budget to run out of."""
    root = make_tree(tmp_path, {"proc/self/mountinfo": mountinfo})

    assert limits_of(root, v1(VCPU, VCPU)).rt_budget_us is None
    assert Cgroups(root).rt_groups() is False


@pytest.mark.parametrize(
    ("mountinfo", "file", "text", "isolated"),
    [
        (V2, "sys/fs/cgroup/cpuset.cpus.isolated", "2-3\n", "2-3"),
        (V2, "sys/fs/cgroup/cpuset.cpus.isolated", "\n", ""),
        (V2, "sys/fs/cgroup/cpuset.cpus.isolated", "?\n", ""),
        (V2, "sys/fs/cgroup/other", "", ""),
        (V1, "sys/fs/cgroup/cpuset/cpuset.cpus.isolated", "2-3\n", ""),
        (HYBRID, "sys/fs/cgroup/unified/cpuset.cpus.isolated", "1\n", "1"),
    ],
)
def test_isolated_partitions_are_version_2s(tmp_path, mountinfo, file, text, isolated):
    """The root of version 2 says what partitions isolate; nothing is isolated where it does not say."""
    root = make_tree(tmp_path, {"proc/self/mountinfo": mountinfo, file: text})

    assert Cgroups(root).isolated() == CpuSet.parse(isolated)


def test_this_process_has_the_cgroups_that_the_kernel_shows():
    """On the real host: the paths are those of /proc, and the fence holds what this thread may run on."""
    cgroups = Cgroups()
    found = cgroups.of(os.getpid(), os.getpid())

    assert all(f":{path}\n" in Path("/proc/self/cgroup").read_text() for path in found.paths.values())
    limits = cgroups.limits(os.getpid(), os.getpid())
    assert limits.fence is None or CpuSet(os.sched_getaffinity(0)) <= limits.fence


@pytest.fixture
def cage():
    """A process in a cpuset cgroup of its own, nested in another; version 1, as root."""
    if os.geteuid() != 0 or not os.access(V1_ROOT / "tasks", os.W_OK):
        pytest.skip("needs root and a version 1 cpuset hierarchy")
    outer = V1_ROOT / f"rtpind-test-{os.getpid()}"
    inner = outer / "emulator"
    child = subprocess.Popen(["sleep", "60"])
    try:
        for group, cpus in ((outer, "0"), (inner, "0")):
            group.mkdir()
            (group / "cpuset.mems").write_text((V1_ROOT / "cpuset.mems").read_text())
            (group / "cpuset.cpus").write_text(cpus)
        (inner / "tasks").write_text(str(child.pid))
        yield child, outer.name
    finally:
        child.kill()
        child.wait()
        for group in (inner, outer):
            if group.exists():
                until(lambda group=group: not (group / "tasks").read_text(), "the cgroup is empty")
                group.rmdir()


def test_a_real_fence_is_found(cage):
    """On the real host: a process in a nested cpuset is fenced, by the outer cgroup that has no more either."""
    child, name = cage
    cgroups = Cgroups()
    found = cgroups.of(child.pid, child.pid)

    assert found.path == f"/{name}/emulator"
    assert cgroups.threads(found) == [child.pid]
    limits = cgroups.limits(child.pid, child.pid)
    assert (limits.fence, limits.fenced_by) == (CpuSet([0]), f"/{name}")


@pytest.mark.parametrize(("mounts", "where"), [(V1, "cpuset"), (HYBRID, "cpuset"), (V2, "")])
def test_where_threads_get_their_cgroups_is_beside_the_emulator(tmp_path, mounts, where):
    """In the hierarchy that decides affinity; of who is not in an emulator cgroup, or has gone, nowhere."""
    home = tmp_path / "sys/fs/cgroup" / where / SCOPE[1:] / "libvirt"
    (home / "emulator").mkdir(parents=True)
    cgroups = Cgroups(make_tree(tmp_path, {"proc/self/mountinfo": mounts}))

    assert cgroups.above(f"{SCOPE}/libvirt/emulator") == str(home)
    assert cgroups.above(f"{SCOPE}/libvirt/vcpu0") is None
    assert cgroups.above("/machine/gone/emulator") is None
    assert cgroups.above("/") is cgroups.above("") is None

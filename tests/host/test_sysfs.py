"""The host's facts, from fake trees of other kernels and from this host."""

import gzip
import os
import subprocess
import tempfile
from pathlib import Path

import pytest
from trees import PF_KTHREAD, V1, V2, make_tree, process, stat_line

from rtpind.core.cpuset import CpuSet
from rtpind.host.cgroup import Cgroups
from rtpind.host.proc import Proc
from rtpind.host.sysfs import HostFacts

CPU = "sys/devices/system/cpu"
NODES = "sys/devices/system/node"
FAIR = "sys/kernel/debug/sched/fair_server/cpu{}/runtime"
RUNTIME = "proc/sys/kernel/sched_rt_runtime_us"
HOST = {
    f"{CPU}/online": "0-3\n",
    f"{CPU}/possible": "0-7\n",
    f"{CPU}/isolated": "2-3\n",
    f"{CPU}/cpu0/topology/thread_siblings_list": "0,2\n",
    RUNTIME: "950000\n",
    "proc/self/status": "Name:\tx\nCapEff:\t0000000000800000\n",
    "proc/self/mountinfo": V2,
}


def facts_at(root, release="6.12.1", **changes):
    make_tree(root, {name: text for name, text in (HOST | changes).items() if text is not None})
    proc = Proc(root)
    proc.kernel_threads.scan()
    return HostFacts(Cgroups(root), proc, root, release)


def read(root, release="6.12.1", **changes):
    return facts_at(root, release, **changes).read()


def fair(*runtimes):
    return {FAIR.format(cpu): f"{runtime}\n" for cpu, runtime in enumerate(runtimes)}


def test_the_pcpus_of_a_host_are_read(tmp_path):
    """Online, possible and isolated pCPUs, the kernel and its throttling."""
    host = read(tmp_path)

    assert (str(host.online), str(host.possible), str(host.isolated)) == ("0-3", "0-7", "2-3")
    assert (host.kernel, host.rt_runtime_us) == ("6.12.1", 950000)


def test_the_topology_is_read(tmp_path):
    """Siblings, caches, sockets and nodes; what a pCPU shows nothing of is left out."""
    changes = {
        f"{CPU}/cpu2/topology/thread_siblings_list": "0,2\n",
        f"{CPU}/cpu0/cache/index3/shared_cpu_list": "0-1\n",
        f"{CPU}/cpu1/cache/index3/shared_cpu_list": "5\n",  # not itself: cannot be
        f"{CPU}/cpu2/topology/die_cpus_list": "2\n",
        f"{CPU}/cpu3/topology/package_cpus_list": "2-3\n",
        f"{NODES}/online": "0,2\n",
        f"{NODES}/node0/cpulist": "0-3\n",
        f"{NODES}/node2/cpulist": "4-7\n",
    }

    topology = read(tmp_path, **changes).topology

    assert topology.cores == {0: CpuSet([0, 2]), 2: CpuSet([0, 2])}
    assert [str(topology.siblings(cpu)) for cpu in range(4)] == ["0,2", "1", "0,2", "3"]
    assert (topology.caches, topology.sockets) == ({0: CpuSet([0, 1])}, {3: CpuSet([2, 3])})
    assert topology.dies == {2: CpuSet([2])}
    assert topology.nodes == {0: CpuSet.parse("0-3"), 2: CpuSet.parse("4-7")}


def test_the_topology_is_read_again_when_others_are_online(tmp_path):
    """A pCPU that comes online shows its siblings then."""
    facts = facts_at(tmp_path)
    assert facts.read().topology.siblings(1) == CpuSet([1])

    make_tree(tmp_path, {f"{CPU}/online": "0-4\n", f"{CPU}/cpu1/topology/thread_siblings_list": "1,4\n"})

    assert facts.read().topology.siblings(1) == CpuSet([1, 4])


def test_isolated_partitions_count_as_isolated(tmp_path):
    """What a cpuset partition isolates is added to what the command line isolated."""
    host = read(tmp_path, **{"sys/fs/cgroup/cpuset.cpus.isolated": "1\n"})

    assert str(host.isolated) == "1-3"


@pytest.mark.parametrize("text", ["", "\n", "(null)\n", "x-y\n", None, b"\xff\xfe"])
def test_an_odd_list_is_an_empty_one(tmp_path, text):
    """An empty, missing or unreadable list isolates nothing and fails nothing."""
    changes = {f"{CPU}/isolated": text, f"{CPU}/possible": text, f"{CPU}/cpu0/topology/thread_siblings_list": text}

    host = read(tmp_path, **changes)

    assert (str(host.isolated), str(host.possible), str(host.topology.siblings(0))) == ("", "0-3", "0")


def test_what_changes_is_read_each_time(tmp_path):
    """A pCPU that goes offline and a sysctl that is set are seen at the next look."""
    facts = facts_at(tmp_path)
    facts.read()
    make_tree(tmp_path, {f"{CPU}/online": "0-1\n", RUNTIME: "-1\n"})

    host = facts.read()

    assert (str(host.online), host.rt_runtime_us) == ("0-1", -1)


@pytest.mark.parametrize(("text", "value"), [("-1\n", -1), ("0\n", 0), ("", None), ("x\n", None), (None, None)])
def test_the_throttling_sysctl_may_be_odd(tmp_path, text, value):
    """A value that is no number, or not there, is unknown."""
    assert read(tmp_path, **{RUNTIME: text}).rt_runtime_us == value


CONFIG = "CONFIG_X=y\nCONFIG_RT_GROUP_SCHED=y\n"
OFF_AT_BOOT = CONFIG + "CONFIG_RT_GROUP_SCHED_DEFAULT_DISABLED=y\n"
NOT_SET = "# CONFIG_RT_GROUP_SCHED is not set\n"
ZIPPED = "proc/config.gz"
BOOT = "boot/config-6.12.1"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, None),
        ({ZIPPED: gzip.compress(CONFIG.encode())}, True),
        ({ZIPPED: gzip.compress(NOT_SET.encode())}, False),
        ({BOOT: CONFIG}, True),
        ({BOOT: NOT_SET}, False),
        ({"boot/config-6.12.2": CONFIG}, None),  # of another kernel
        ({ZIPPED: b"no gzip", BOOT: CONFIG}, True),
        ({ZIPPED: gzip.compress(CONFIG.encode())[:-9], BOOT: NOT_SET}, False),  # cut short
        ({ZIPPED: gzip.compress(CONFIG.encode())[:10] + b"\xff" * 30, BOOT: NOT_SET}, False),  # damaged inside
        ({BOOT: CONFIG, "proc/cmdline": "ro rt_group_sched=0\n"}, False),
        ({BOOT: CONFIG, "proc/cmdline": "rt_group_sched=0 rt_group_sched=1\n"}, True),  # the last one counts
        ({BOOT: CONFIG, "proc/cmdline": "xrt_group_sched=0 quiet\n"}, True),
        ({BOOT: OFF_AT_BOOT, "proc/cmdline": "quiet\n"}, False),
        ({BOOT: OFF_AT_BOOT, "proc/cmdline": "rt_group_sched=1\n"}, True),
        ({BOOT: NOT_SET, "proc/cmdline": "rt_group_sched=1\n"}, False),  # not compiled in
    ],
)
def test_realtime_groups_are_found_by_config_and_command_line(tmp_path, files, expected):
    """The kernel's configuration says it, its command line may change it; without either it is unknown."""
    assert read(tmp_path, **files).rt_group_sched is expected


def test_realtime_groups_are_found_by_their_files(tmp_path):
    """A budget file of version 1 is proof, whatever any configuration says."""
    files = {"sys/fs/cgroup/cpu,cpuacct/cpu.rt_runtime_us": "1\n", BOOT: NOT_SET, "proc/self/mountinfo": V1}

    assert read(tmp_path, **files).rt_group_sched is True


@pytest.mark.parametrize(
    ("release", "config", "throttles"),
    [
        ("5.10.0-rt", NOT_SET, True),
        ("6.11.9", NOT_SET, True),
        ("6.12.0", NOT_SET, False),
        ("6.12.0", CONFIG, True),
        ("6.12.0", None, None),
        ("7.0.1", NOT_SET, False),
    ],
)
def test_whether_the_sysctl_throttles_depends_on_the_kernel(tmp_path, release, config, throttles):
    """Before 6.12 it always does, later only with realtime groups."""
    assert read(tmp_path, release, **{f"boot/config-{release}": config}).throttles is throttles


@pytest.mark.parametrize("release", ["", "strange", "6"])
def test_a_release_that_is_no_number_is_an_old_one(tmp_path, release):
    """What cannot be compared counts as old, which promises least."""
    host = read(tmp_path, release)

    assert (host.throttles, host.fair_server) == (True, CpuSet())


@pytest.mark.parametrize(
    ("release", "files", "expected"),
    [
        ("6.11.0", fair(1, 1, 1, 1), CpuSet()),  # not there yet, whatever debugfs holds
        ("6.12.0", fair(50000000, 50000000, 50000000, 50000000), CpuSet(range(4))),
        ("6.12.0", fair(50000000, 0, 50000000, 0), CpuSet([0, 2])),
        ("6.12.0", fair(0, 0, 0, 0), CpuSet()),
        ("6.12.0", {}, None),  # debugfs is not mounted, or not for us
        ("6.12.0", fair(50000000, 50000000, 50000000), None),  # one pCPU cannot be read
        ("6.12.0", fair(50000000, "odd", 1, 1), None),
    ],
)
def test_the_fair_server_is_read_for_each_pcpu(tmp_path, release, files, expected):
    """Only pCPUs whose server has a runtime have one; what cannot be read is unknown."""
    assert read(tmp_path, release, **files).fair_server == expected


@pytest.fixture
def open_path():
    """A folder that other users may enter; pytest's own is closed to them."""
    with tempfile.TemporaryDirectory(prefix="rtpind-test-", dir="/var/tmp") as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become somebody who may not read")
def test_a_fair_server_that_may_not_be_read_is_unknown(open_path):
    """What is root's alone, as debugfs is, is there and unreadable for the daemon's user."""
    facts = facts_at(open_path, **fair(1, 1, 1, 1))
    (open_path / "sys/kernel/debug").chmod(0o700)
    os.seteuid(65534)
    try:
        host = facts.read()
    finally:
        os.seteuid(0)

    assert host.fair_server is None


GUARDS = {
    name: text
    for pid, comm, priority in (
        (20, "rcuc/0", 10),
        (21, "ktimers/0", 1),
        (22, "ksoftirqd/0", 5),
        (23, "ksoftirqd/1", 0),
        (24, "migration/2", 99),
        (25, "ksoftirqd/30", 9),
    )
    for name, text in process(pid, {pid: stat_line(pid, comm, flags=PF_KTHREAD, priority=priority)}).items()
}


@pytest.mark.parametrize(
    ("release", "changes", "asked"),
    [
        ("6.1.0", {RUNTIME: "950000"}, False),  # throttled
        ("6.1.0", {RUNTIME: "-1"}, True),
        ("6.12.0", {RUNTIME: "950000", BOOT: NOT_SET, **fair(1, 1, 1, 1)}, False),  # fair servers
        ("6.12.0", {RUNTIME: "-1", BOOT: NOT_SET, **fair(1, 0, 1, 1)}, True),
        ("6.12.0", {RUNTIME: "-1"}, False),  # unknown counts as protected
    ],
)
def test_guards_are_read_where_nothing_else_protects(tmp_path, release, changes, asked):
    """Without throttling and fair servers the weakest of a pCPU's own threads is looked for; else nobody asks."""
    changes = {name.replace("6.12.1", release): text for name, text in changes.items()}

    guards = read(tmp_path, release, **GUARDS, **changes).guards

    assert guards == ({0: 1, 1: 0} if asked else None)


@pytest.mark.parametrize(
    ("status", "capable"),
    [
        ("CapEff:\t0000000000800000\n", True),
        ("CapEff:\t000001ffff7fffff\n", False),
        ("CapPrm:\t000001ffffffffff\nCapEff:\t0000000000000000\n", False),
        ("Name:\tCapEff: 0\n", True),  # unknown: the attempt will tell
        (None, True),
    ],
)
def test_the_capability_is_read_from_the_effective_set(tmp_path, status, capable):
    """CAP_SYS_NICE is bit 23 of CapEff and of nothing else."""
    assert read(tmp_path, **{"proc/self/status": status}).nice_capable is capable


@pytest.mark.parametrize(
    ("uids", "capable"),
    [("         0          0 4294967295\n", True), ("0 0 1\n993 993 1\n", False), ("", True), (None, True)],
)
def test_in_a_user_namespace_the_capability_reaches_nobody(tmp_path, uids, capable):
    """PrivateUsers= leaves the bit in CapEff, and takes its power over the host's threads."""
    assert read(tmp_path, **{"proc/self/uid_map": uids}).nice_capable is capable


def test_the_facts_of_this_host_are_right():
    """On the real host: what other programs say of the same facts."""
    cgroups, proc = Cgroups(), Proc()
    proc.kernel_threads.scan()
    host = HostFacts(cgroups, proc).read()

    lines = subprocess.run(["lscpu", "-p=cpu,core,socket,node"], capture_output=True, text=True, check=True).stdout
    rows = [line.split(",") for line in lines.splitlines() if not line.startswith("#")]
    assert set(host.online) == {int(cpu) for cpu, *_ in rows}
    for cpu, core, socket, node in rows:
        same_core = {int(other[0]) for other in rows if other[1:3] == [core, socket]}
        assert set(host.topology.siblings(int(cpu))) == same_core
        assert not node or int(cpu) in host.topology.nodes[int(node)]
    assert host.online <= host.possible
    assert host.kernel == os.uname().release
    assert host.rt_runtime_us == int(Path("/proc/sys/kernel/sched_rt_runtime_us").read_text())
    if Path("/sys/fs/cgroup/cpu/cpu.rt_runtime_us").exists():
        assert host.rt_group_sched is True

# SPDX-License-Identifier: GPL-2.0-or-later
"""What the daemon may and may not: its user and capability, and what each directive that the unit lacks would break.

Each such directive is added by a drop-in, and the kernel shows what does not happen any more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from lab.scene import OTHER, Guest, Scene, policy

pytestmark = pytest.mark.lab("bookworm-rt")

DROP_IN = "etc/systemd/system/rtpind.service.d/lab.conf"
CAP_SYS_NICE = 1 << 23
REALTIME = policy(("rt-*", "realtime"))

#: Asks the proc connector for events, and prints the kernel's answer: 0, or the errno that it came to.
LISTEN = """\
import socket, struct, sys
sock = socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM, 11)
sock.settimeout(10)
try:
    sock.bind((0, 1))
    sock.send(struct.pack("=IHHII IIIIHH I", 40, 3, 0, 0, 0, 1, 1, 1, 0, 4, 0, 1))
    print(struct.unpack_from("=I", sock.recv(4096), 16 + 20 + 16)[0])
except OSError as error:
    print(error.errno)
"""

Confine = Callable[[str], None]


@pytest.fixture
def confine(scene: Scene) -> Iterator[Confine]:
    """Adds settings to the unit by a drop-in; takes them away after the scenario."""

    def add(settings: str) -> None:
        scene.host.push({DROP_IN: f"[Service]\n{settings}\n"})
        scene.run("systemctl daemon-reload")

    yield add
    scene.run(
        f"systemctl stop rtpind; rm -rf $(dirname /{DROP_IN}); systemctl daemon-reload", check=False, timeout_s=90
    )


def placed_without_fifo(scene: Scene, guest: Guest) -> bool:
    """Return whether the vCPU has an isolated pCPU to itself, and is not realtime."""
    (vcpu,) = guest.vcpus()
    return len(vcpu.cpus) == 1 and vcpu.cpus[0] in scene.isolated and vcpu.policy == OTHER


def test_it_runs_as_its_own_user_with_one_capability(scene: Scene) -> None:
    """By the kernel: rtpind's uid, CAP_SYS_NICE and nothing else, every thread on housekeeping; and guests placed."""
    scene.start(REALTIME)
    guest = scene.guest("one")
    scene.wait_for(lambda: scene.alone([guest]), "the guest is placed")

    pid = scene.pid()
    status = dict(line.split(":\t", 1) for line in scene.host.read(f"/proc/{pid}/status").splitlines())
    uid = scene.run("id -u rtpind").out.strip()
    assert uid != "0"
    assert set(status["Uid"].split()) == {uid}
    assert {int(status[kind], 16) for kind in ("CapPrm", "CapEff", "CapBnd", "CapAmb")} == {CAP_SYS_NICE}
    assert status["NoNewPrivs"] == "1"
    threads = scene.host.call("threads", pid=pid)
    assert len(threads) >= 4
    assert {tuple(thread["cpus"]) for thread in threads} == {scene.housekeeping}
    assert scene.run("stat -c '%U %G %a' /run/rtpind /run/rtpind/control /run/rtpind/lock").out.splitlines() == [
        "rtpind rtpind 755",
        "rtpind rtpind 660",
        "rtpind rtpind 600",
    ]


def test_root_may_steer_it_and_others_may_not(scene: Scene) -> None:
    """Rtpinctl as root works, with and without a daemon; a member of the group may look, and change nothing."""
    scene.start(REALTIME)
    guest = scene.guest("one")
    scene.wait_for(lambda: scene.alone([guest]), "the guest is placed")
    before = guest.places()

    member = "setpriv --reuid=nobody --regid=rtpind --clear-groups rtpinctl"
    assert f'"pid": {scene.pid()},' in scene.run(f"{member} status --json", timeout_s=90).out
    refused = scene.run(f"{member} release {guest.name}", check=False, timeout_s=90)
    assert refused.code == 1
    assert "root" in str(refused)
    assert guest.moved(before) == []

    assert scene.ctl("release", guest.name).code == 0
    assert guest.moved(before) != []
    assert scene.ctl("manage", guest.name).code == 0
    scene.wait_for(lambda: scene.alone([guest]), "the guest is placed again")
    scene.run("systemctl stop rtpind", timeout_s=90)
    assert scene.ctl("release", guest.name).code == 0
    assert guest.moved(before) != []
    scene.start()  # what root wrote meanwhile is the daemon's to read and to replace
    assert scene.ctl("manage", guest.name).code == 0
    scene.wait_for(lambda: scene.alone([guest]), "the guest is placed again")


def test_without_polkit_it_says_what_is_missing_and_goes_on_when_it_is_there(scene: Scene) -> None:
    """Its user is refused by libvirt; the record names polkit; rtpind connects by itself afterwards."""
    scene.run("systemctl mask --now --runtime polkit")
    try:
        scene.write_policy(REALTIME)
        scene.run("systemctl start rtpind", timeout_s=90)
        scene.wait_for(lambda: scene.count("install polkitd") > 0, "the cure is on record")
    finally:
        scene.run("systemctl unmask --runtime polkit")
    scene.wait_for(lambda: scene.count("connected to libvirt") > 0, "rtpind has connected")
    assert scene.count("libvirt is away") == 1


def test_a_policy_that_its_user_cannot_read_is_refused_with_the_cure(scene: Scene) -> None:
    """The service does not start, a reload fails, and the record says what to do."""
    scene.start(REALTIME)
    scene.run("chmod 0600 /etc/rtpind.yaml")
    assert scene.run("systemctl reload rtpind", check=False, timeout_s=90).code != 0
    scene.run("systemctl stop rtpind", timeout_s=90)
    assert scene.run("systemctl start rtpind", check=False, timeout_s=90).code != 0
    assert scene.run("systemctl show -P ExecMainStatus rtpind").out.strip() == "78"
    scene.wait_for(lambda: scene.count("chmod 0640") > 0, "the cure is on record")

    scene.run("chgrp rtpind /etc/rtpind.yaml && chmod 0640 /etc/rtpind.yaml")
    scene.start()


@pytest.mark.lab("trixie-rt")
def test_a_fair_server_that_it_cannot_read_counts_as_on_and_that_is_said(scene: Scene) -> None:
    """Only root may read debugfs; FIFO is given all the same, with a record, and status shows it."""
    scene.start(REALTIME)
    guest = scene.guest("one")
    scene.wait_for(lambda: scene.alone([guest]), "the guest is placed at FIFO")
    assert scene.count("fair server's runtime cannot be read") == 1
    facts = {fact["name"]: fact["value"] for fact in scene.ctl_json("status")["host"]["facts"]}
    assert facts["fair server"].startswith("unknown")


def test_metrics_need_no_right_in_run_and_a_drop_in_elsewhere(scene: Scene, confine: Confine) -> None:
    """Anybody reads what it writes in its own directory; in another it says what is wrong until the unit allows it."""
    elsewhere = "/var/lib/rtpind-metrics"
    readable = "setpriv --reuid=nobody --regid=nogroup --clear-groups grep -q '^rtpind_last_pass_timestamp_seconds 1'"
    scene.start(REALTIME.replace("daemon: {", "daemon: {metrics_dir: /run/rtpind, "))
    try:
        scene.run(f"install -d -o rtpind -g rtpind {elsewhere}")
        scene.wait_for(
            lambda: scene.run(f"{readable} /run/rtpind/rtpind.prom", check=False).code == 0, "metrics in /run"
        )

        scene.write_policy(REALTIME.replace("daemon: {", f"daemon: {{metrics_dir: {elsewhere}, "))
        scene.run("systemctl reload rtpind", timeout_s=90)
        scene.wait_for(lambda: scene.count("metrics cannot be written.*Read-only file system") == 1, "it is said")
        scene.wait_for(lambda: scene.run("ls /run/rtpind/rtpind.prom", check=False).code != 0, "the old file is gone")

        confine(f"ReadWritePaths={elsewhere}")
        scene.run("systemctl restart rtpind", timeout_s=90)
        scene.wait_for(lambda: scene.run(f"{readable} {elsewhere}/rtpind.prom", check=False).code == 0, "metrics there")
    finally:
        scene.run(f"rm -rf {elsewhere}", check=False)


# --- what the unit does not say, and why --------------------------------------------------------------------------


def test_restrict_realtime_forbids_fifo(scene: Scene, confine: Confine) -> None:
    """The vCPU gets its pCPU, and no FIFO; the record names the filter."""
    confine("RestrictRealtime=yes")
    guest = scene.guest("one")
    scene.start(REALTIME)
    scene.wait_for(lambda: scene.count("fifo:1.*refused.*seccomp filter of the unit") > 0, "the refusal is on record")
    assert placed_without_fifo(scene, guest)
    assert scene.verdict(guest, "vcpu") == {"no-fifo"}


@pytest.mark.parametrize(
    ("directive", "cause"),
    [
        pytest.param("SystemCallFilter=~@resources", "seccomp filter of the unit", id="resources"),
        pytest.param("PrivateUsers=yes", "lacks CAP_SYS_NICE over", id="private-users"),
    ],
)
def test_what_keeps_it_from_every_thread(scene: Scene, confine: Confine, directive: str, cause: str) -> None:
    """Not one thread of the guest moves; the record names the cause."""
    confine(directive)
    guest = scene.guest("one")
    before = guest.places()
    scene.start(REALTIME)
    scene.wait_for(lambda: scene.count(f"refused.*{cause}") > 0, "the refusal is on record")
    scene.passes(1)
    assert guest.moved(before) == []


def test_protect_proc_hides_the_guests(scene: Scene, confine: Confine) -> None:
    """The kernel shows rtpind's user no QEMU: it finds no guest, and places none."""
    confine("ProtectProc=invisible")
    guest = scene.guest("one")
    before = guest.places()
    scene.start(REALTIME)
    scene.passes(2)
    as_it_sees = f"nsenter -t {scene.pid()} -m setpriv --reuid=rtpind --regid=rtpind --clear-groups"
    assert scene.run(f"{as_it_sees} test -e /proc/{guest.pid}", check=False).code == 1
    assert scene.ctl_json("status")["guests"] == []
    assert guest.moved(before) == []


def test_proc_subset_hides_the_host(scene: Scene, confine: Confine) -> None:
    """Without /proc/uptime and /proc/sys no look at the host succeeds: each is a fault, and nothing is placed."""
    confine("ProcSubset=pid")
    guest = scene.guest("one")
    before = guest.places()
    scene.start(REALTIME)
    scene.wait_for(lambda: scene.count("a fault in rtpind.*uptime") > 1, "passes fail")
    assert guest.moved(before) == []


def test_private_network_cuts_off_the_proc_connector(scene: Scene) -> None:
    """With the shipped drop-in's capability the kernel lets rtpind's user listen; in another network it refuses."""
    scene.host.push({"var/tmp/listen.py": LISTEN})
    common = "systemd-run --quiet --wait --pipe -p User=rtpind -p RestrictAddressFamilies=AF_NETLINK"
    probe = "/usr/bin/python3 /var/tmp/listen.py"

    def answer(*settings: str) -> str:
        words = " ".join(f"-p {setting}" for setting in settings)
        return scene.run(f"{common} {words} {probe}", timeout_s=90).out.strip()

    assert answer("AmbientCapabilities=CAP_NET_ADMIN") == "0"
    assert answer("AmbientCapabilities=CAP_NET_ADMIN", "PrivateNetwork=yes") == "111"  # ECONNREFUSED
    assert answer() == "1"  # EPERM: what the drop-in is for, on 6.1

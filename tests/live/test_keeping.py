"""What was placed stays placed: drift, fights, restarts of rtpind and libvirt, crashes, reloads, release."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import harness
import pytest
from harness import Daemon, helpers_on, placed, policy, sched_calls, state_of, violations

from demo.guests import Guest, Lab, wait_for

Make = Callable[..., Daemon]


def _taskset(tid: int, cpus: str) -> None:
    subprocess.run(["taskset", "-pc", cpus, str(tid)], check=True, capture_output=True)


def started(made: Daemon) -> None:
    """Wait until the guest's start is over: before that, what moves its vCPUs may be libvirt."""
    wait_for(lambda: made.count("vCPU 0 started") == 1, "its start is over")


@pytest.mark.usefixtures("unthrottled")
def test_a_moved_thread_is_put_back_with_one_drift_record(lab: Lab, daemon: Make) -> None:
    """Taskset on the FIFO vCPU, chrt on it, and taskset on a helper: each is repaired, with one record each."""
    guest = lab.start("drift")
    made = daemon(policy((guest, "realtime")))
    made.start()
    wait_for(lambda: placed(guest, {1}, fifo=1), "the guest is placed")
    started(made)
    vcpu, helper = guest.vcpus()[0].tid, guest.pid

    for number, tamper in enumerate(
        (
            lambda: _taskset(vcpu, "0"),
            lambda: subprocess.run(["chrt", "-o", "-p", "0", str(vcpu)], check=True),
            lambda: _taskset(helper, "0-1"),
        )
    ):
        made.passes(2)  # it has been seen in place
        tamper()
        wait_for(lambda number=number: made.count("moved by somebody") == number + 1, "the drift is on record")
        wait_for(lambda: placed(guest, {1}, fifo=1) and helpers_on(guest, {0}), "it is put back")

    made.passes(2)
    assert made.count("moved by somebody") == 3


def test_drift_warn_only_says_it(lab: Lab, daemon: Make) -> None:
    """With drift: warn a moved thread stays where it was moved to, and is said once."""
    guest = lab.start("warn")
    made = daemon(policy((guest, "dedicated"), drift="warn"))
    made.start()
    wait_for(lambda: placed(guest, {1}), "the guest is placed")
    started(made)
    made.passes(2)

    _taskset(guest.vcpus()[0].tid, "0")

    wait_for(lambda: made.count("moved by somebody") == 1, "the drift is on record")
    made.passes(2)
    assert made.count("moved by somebody") == 1
    assert placed(guest, {0})
    threads = made.ctl("status", guest.name)["guests"][0]["threads"]
    assert [thread["verdict"] for thread in threads if thread["role"] == "vcpu"] == ["drifted"]


@pytest.mark.usefixtures("unthrottled")
def test_a_fight_is_paused_and_ends_without_fifo_off_its_place(lab: Lab, daemon: Make) -> None:
    """Somebody who moves a thread again and again is left the field after three repairs, loudly and without FIFO."""
    guest = lab.start("fight")
    made = daemon(policy((guest, "realtime"), period="50ms"))
    made.start()
    wait_for(lambda: placed(guest, {1}, fifo=1), "the guest is placed")
    vcpu = guest.vcpus()[0].tid

    def moved_and_paused() -> bool:
        if guest.vcpus()[0].cpus == {1}:
            _taskset(vcpu, "0")
        return made.count("something else moves it as often") > 0

    wait_for(moved_and_paused, "the fight is paused", 30)
    _taskset(vcpu, "0")
    wait_for(lambda: placed(guest, {0}), "off its place it has no FIFO")
    made.passes(2)

    assert placed(guest, {0})
    assert made.count("something else moves it as often") == 1
    threads = made.ctl("status", guest.name)["guests"][0]["threads"]
    assert [thread["verdict"] for thread in threads if thread["role"] == "vcpu"] == ["paused"]


@pytest.mark.usefixtures("unthrottled")
def test_in_the_steady_state_nothing_is_set(lab: Lab, daemon: Make) -> None:
    """Once all is placed, and after restarts of rtpind and of libvirtd, passes set nothing on any guest thread."""
    first, second = lab.start("steady", boot="spin"), lab.start("float", vcpus=2, iothreads=1)
    made = daemon(policy((first, "realtime"), (second, "floating")))
    made.start()
    wait_for(lambda: placed(first, {1}, fifo=1) and placed(second, {0}), "the guests are placed")
    made.passes(2)
    assert sched_calls(made, [first, second]) == []

    assert made.stop() == 0
    before = state_of([first, second])
    made.start()
    assert sched_calls(made, [first, second]) == []
    assert made.ctl("verify")["ok"] is True

    connected = made.count("connected to libvirt")
    harness.restart_libvirtd()
    lab.reconnect()
    wait_for(lambda: made.count("connected to libvirt") == connected + 1, "rtpind has reconnected", 40)
    assert sched_calls(made, [first, second]) == []
    assert _same(before, [first, second])


def test_observing_touches_nothing_and_says_what_it_would(lab: Lab, daemon: Make) -> None:
    """mode: observe and --observe make no sched_set* call and journal each step as ``would``, once."""
    guest = lab.start("observe")
    before = state_of([guest])
    made = daemon(policy((guest, "realtime"), mode="observe"))
    made.start()
    wait_for(lambda: made.count("would .*fifo:1") == 1, "it says what it would do")
    assert sched_calls(made, [guest]) == []
    made.stop()

    made.write(policy((guest, "realtime")))
    made.start("--observe")
    wait_for(lambda: made.count("would .*fifo:1") == 2, "it says what it would do")
    assert sched_calls(made, [guest]) == []

    assert made.count("would .*fifo:1") == 2
    assert {tid: state for tid, state in state_of([guest]).items() if tid in before} == before
    assert not (made.state / "ledger.json").exists()


@pytest.mark.usefixtures("unthrottled")
def test_release_puts_back_exactly_what_was_there(lab: Lab, daemon: Make) -> None:
    """Release restores masks, policy and priority, keeps hands off until manage, also across a restart of rtpind."""
    guest = lab.start("release", vcpus=1, iothreads=1)
    _taskset(guest.iothreads()[0].tid, "1")
    subprocess.run(["chrt", "-b", "-p", "0", str(guest.iothreads()[0].tid)], check=True)
    before = state_of([guest])
    made = daemon(policy((guest, "realtime")))
    made.start()
    wait_for(lambda: placed(guest, {1}, fifo=1) and guest.iothreads()[0].cpus == {0}, "the guest is placed")

    assert made.run_ctl("release", guest.name).returncode == 0
    assert {tid: state for tid, state in state_of([guest]).items() if tid in before} == before
    made.passes(2)
    assert {tid: state for tid, state in state_of([guest]).items() if tid in before} == before
    made.stop(signal.SIGKILL)
    made.start()
    made.passes(2)
    assert {tid: state for tid, state in state_of([guest]).items() if tid in before} == before
    assert made.ctl("status", guest.name)["guests"][0]["state"] == "released"

    assert made.run_ctl("manage", guest.name).returncode == 0
    wait_for(lambda: placed(guest, {1}, fifo=1), "the guest is managed again")


@pytest.mark.usefixtures("unthrottled")
def test_release_works_without_a_daemon(lab: Lab, daemon: Make) -> None:
    """After the daemon was killed, rtpinctl release puts back the originals by itself, and they stay released."""
    guest = lab.start("orphan")
    before = state_of([guest])
    made = daemon(policy((guest, "realtime")))
    made.start()
    wait_for(lambda: placed(guest, {1}, fifo=1), "the guest is placed")
    made.stop(signal.SIGKILL)
    assert placed(guest, {1}, fifo=1)

    done = made.run_ctl("release", guest.name)

    assert done.returncode == 0, done.stderr
    assert {tid: state for tid, state in state_of([guest]).items() if tid in before} == before


@pytest.mark.usefixtures("unthrottled")
def test_pause_leaves_a_guest_to_hand_work(lab: Lab, daemon: Make) -> None:
    """A paused guest is not repaired; when the pause is over it is."""
    guest = lab.start("pause")
    made = daemon(policy((guest, "realtime")))
    made.start()
    wait_for(lambda: placed(guest, {1}, fifo=1), "the guest is placed")
    made.passes(1)

    assert made.run_ctl("pause", guest.name).returncode == 0
    _taskset(guest.pid, "0-1")
    made.passes(2)
    assert not helpers_on(guest, {0})

    assert made.run_ctl("pause", guest.name, "--for", "1s").returncode == 0
    wait_for(lambda: helpers_on(guest, {0}) and placed(guest, {1}, fifo=1), "the pause is over")


@pytest.mark.usefixtures("unthrottled")
def test_reload_moves_running_guests_in_order(lab: Lab, daemon: Make) -> None:
    """SIGHUP with a new policy re-places running guests; at no moment does the kernel show a violation."""
    guest = lab.start("reload", iothreads=1)
    made = daemon(policy((guest, "realtime")))
    made.start()
    wait_for(lambda: placed(guest, {1}, fifo=1) and helpers_on(guest, {0}), "the guest is placed")

    made.write(policy((guest, "realtime"), housekeeping="1", realtime="0"))
    made.reload()

    def turned() -> bool:
        assert violations([guest]) == []
        return placed(guest, {0}, fifo=1) and helpers_on(guest, {1})

    wait_for(turned, "the pools have changed places")


@pytest.mark.usefixtures("unthrottled")
def test_a_bad_reload_keeps_the_running_policy(lab: Lab, daemon: Make) -> None:
    """A policy with problems is refused with each problem on record; plan --config shows the same file beforehand."""
    guest = lab.start("badload")
    made = daemon(policy((guest, "realtime")))
    made.start()
    wait_for(lambda: placed(guest, {1}, fifo=1), "the guest is placed")

    made.write(policy((guest, "nosuch"), drift="maybe"))
    shown = made.run_ctl("plan", "--config", str(made.policy))
    made.reload()

    wait_for(lambda: made.count("the running policy stays") == 1, "the file is refused")
    assert shown.returncode == 78
    assert "there is no class 'nosuch'" in shown.stdout + shown.stderr
    assert made.count("there is no class 'nosuch'") == 1
    assert made.count("'maybe' is not") == 1
    _taskset(guest.pid, "0-1")
    wait_for(lambda: helpers_on(guest, {0}), "the running policy is still enforced")


@pytest.mark.usefixtures("unthrottled")
def test_a_guest_whose_rule_is_gone_is_unclaimed(lab: Lab, daemon: Make) -> None:
    """It stays as it is, nobody else gets its pCPU, and release puts it back."""
    guest, other = lab.start("mine"), lab.start("other")
    before = state_of([guest])
    made = daemon(policy((guest, "realtime")))
    made.start()
    wait_for(lambda: placed(guest, {1}, fifo=1), "the guest is placed")

    made.write(policy((other, "realtime")))
    made.reload()
    wait_for(lambda: made.count("its rule is gone") == 1, "that is on record")
    wait_for(lambda: placed(other, {0}), "the other guest is not given its pCPU")
    assert placed(guest, {1}, fifo=1)
    assert made.ctl("status", guest.name)["guests"][0]["state"] == "unclaimed"

    made.run_ctl("release", guest.name)

    assert {tid: state for tid, state in state_of([guest]).items() if tid in before} == before
    wait_for(lambda: placed(other, {1}, fifo=1), "now there is room")


def test_a_damaged_ledger_is_set_aside(lab: Lab, daemon: Make) -> None:
    """Garbage in the ledger is moved away with a record, and the daemon does its work."""
    guest = lab.start("ledger")
    made = daemon(policy((guest, "dedicated")))
    (made.state / "ledger.json").write_text("{not json")
    os.chown(made.state / "ledger.json", made.state.stat().st_uid, -1)

    made.start()

    wait_for(lambda: placed(guest, {1}), "the guest is placed")
    assert made.count("ledger is unusable and was set aside") == 1
    assert (made.state / "ledger.damaged").read_text() == "{not json"


def test_one_daemon_at_a_time(lab: Lab, daemon: Make) -> None:
    """A second daemon on the same state refuses to start, and the first goes on."""
    guest = lab.start("lock")
    made = daemon(policy((guest, "dedicated")))
    made.start()
    second = daemon(policy((guest, "dedicated")), state=made.state)

    second.start()

    assert second.stop() == 1
    assert second.count("another rtpind runs on this host") == 1
    assert made.ctl("status")["daemon"]["pid"] == made.tid()


def test_libvirt_that_hangs_delays_nothing(lab: Lab, daemon: Make) -> None:
    """With libvirtd stopped by a signal, drift is still repaired and commands are answered."""
    guest = lab.start("hang")
    made = daemon(policy((guest, "dedicated")))
    made.start()
    wait_for(lambda: placed(guest, {1}), "the guest is placed")
    made.passes(2)
    libvirtd = harness.libvirtd_pid()
    try:
        os.kill(libvirtd, signal.SIGSTOP)
        _taskset(guest.vcpus()[0].tid, "0")
        wait_for(lambda: placed(guest, {1}), "drift is repaired")
        assert made.ctl("status")["daemon"]["faults"] == 0
    finally:
        os.kill(libvirtd, signal.SIGCONT)


def test_libvirt_may_be_away_and_come_back(lab: Lab, daemon: Make) -> None:
    """While libvirtd is stopped its guests are kept; a guest started after it came back is placed."""
    guest = lab.start("away")
    made = daemon(policy(names=[(f"{lab.prefix}-away*", "floating")]))
    made.start()
    wait_for(lambda: placed(guest, {0}), "the guest is placed")
    made.passes(2)
    start = harness.stop_libvirtd()
    try:
        wait_for(lambda: made.count("libvirt is away") == 1, "that is on record")
        _taskset(guest.pid, "0-1")
        wait_for(lambda: helpers_on(guest, {0}), "drift is repaired")
    finally:
        start()
    lab.reconnect()
    wait_for(lambda: made.count("connected to libvirt") == 2, "rtpind has reconnected", 40)

    other = lab.start("away-second")

    wait_for(lambda: placed(other, {0}) and helpers_on(other, {0}), "the new guest is placed")


def test_the_daemon_may_start_before_libvirt(lab: Lab, daemon: Make) -> None:
    """Without libvirtd the daemon waits; when libvirtd is there it places what runs."""
    guest = lab.start("early")
    made = daemon(policy((guest, "floating")))
    start = harness.stop_libvirtd()
    try:
        made.write(policy((guest, "floating")))
        made.start_without_libvirt()
        wait_for(lambda: made.count("libvirt is away") == 1, "that is on record")
        assert made.process is not None
        said = made.ctl("status")["daemon"]
        assert (said["pid"], said["libvirt"]) == (made.process.pid, "away")
    finally:
        start()
    lab.reconnect()

    wait_for(lambda: placed(guest, {0}) and helpers_on(guest, {0}), "the guest is placed", 40)


@pytest.mark.usefixtures("unthrottled")
def test_killed_between_any_two_system_calls(lab: Lab, daemon: Make) -> None:
    """SIGKILL at every sched_set* call: promises 1 and 2 hold then, the next start converges, release restores."""
    guest, other = lab.start("crash", iothreads=1), lab.start("beside", vcpus=2)
    before = state_of([guest, other])
    made = daemon(policy((guest, "realtime"), (other, "floating")))
    survived = 0
    for number in range(1, 60):
        made.start_killed_at(number)
        assert violations([guest, other]) == []
        assert not [vcpu for vcpu in guest.vcpus() if vcpu.fifo and vcpu.cpus != {1}]
        made.start()
        wait_for(lambda: placed(guest, {1}, fifo=1) and helpers_on(guest, {0}) and placed(other, {0}), "it converges")
        survived = made.killed_at
        assert made.run_ctl("release", "--all").returncode in (0, 1)
        assert _same(before, [guest, other])
        made.stop(signal.SIGKILL)
        (made.state / "ledger.json").unlink()
        if not survived:
            break
    assert number > 8
    print("killed at", number)


def _same(before: dict[int, tuple[frozenset[int], int, int]], guests: list[Guest]) -> bool:
    now = state_of(guests)
    return {tid: state for tid, state in now.items() if tid in before} == {
        tid: state for tid, state in before.items() if tid in now
    }


def test_the_watchdog_is_answered(lab: Lab, daemon: Make, tmp_path: Path) -> None:
    """READY, STATUS and WATCHDOG=1 reach the notify socket, also while libvirtd hangs."""
    guest = lab.start("watchdog")
    made = daemon(policy((guest, "floating")))
    with harness.NotifySocket() as socket:
        made.start(env={"NOTIFY_SOCKET": socket.path, "WATCHDOG_USEC": "600000"})
        wait_for(lambda: any("READY=1" in message for message in socket.messages), "READY=1")
        wait_for(lambda: any("1 of " in message for message in socket.messages), "STATUS counts guests")
        libvirtd = harness.libvirtd_pid()
        try:
            os.kill(libvirtd, signal.SIGSTOP)
            seen = len(socket.messages)
            wait_for(lambda: sum("WATCHDOG=1" in m for m in socket.messages[seen:]) >= 5, "it keeps answering")
        finally:
            os.kill(libvirtd, signal.SIGCONT)

"""One pass after another over a simulated host, with the ledger on disk."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from factories import PID, START, cpus, fifo, guest, host, policy, thread, uuid_of
from simulated import Disk, Killed, World

from rtpind.core.audit import Kind, Level, Record
from rtpind.core.ledger import EVERYONE, HandsOff, Ledger, Off
from rtpind.core.model import OTHER, Guest, Placement, Role, Sched, Scheduling, Thread
from rtpind.core.policy import Drift, Mode, Policy
from rtpind.daemon.apply import RealKernel
from rtpind.daemon.observe import Observer
from rtpind.daemon.reconcile import Reconciler, View
from rtpind.host.ledgerfile import LedgerFile

VCPU, SIBLING, IOTHREAD = PID + 10, PID + 11, PID + 51
PLACED = {
    PID: Placement(cpus("0-1")),
    VCPU: Placement(cpus("2"), fifo()),
    SIBLING: Placement(cpus("3"), fifo()),
    IOTHREAD: Placement(cpus("0-1")),
}


class Daemon:
    """A reconciler of a simulated world, and what it said."""

    def __init__(self, world: World, file: Any, policy_: Policy | None = None, **options: Any) -> None:
        observer: Any = world
        self.world = world
        self.file = file
        self.records: list[Record] = []
        self.reconciler = Reconciler(observer, file, self.records.append, kernel=world, clock=world.clock, **options)
        self.reconciler.open_ledger()
        self.reconciler.policy = policy_ or policy()
        self.reconciler.domains = world.domains

    def run(self, seconds: float = 1.0, only: Sequence[str] | None = None) -> View:
        self.world.time += seconds
        self.reconciler.domains = self.world.domains
        return self.reconciler.run(only)

    def settle(self, passes: int = 4) -> None:
        """Do passes until every thread is verified on its place."""
        for _ in range(passes):
            self.run()

    def kinds(self, since: int = 0) -> list[Kind]:
        return [record.kind for record in self.records[since:]]

    def said(self, kind: Kind) -> list[str]:
        return [record.message for record in self.records if record.kind is kind]

    def calls(self) -> int:
        return len(self.world.calls)


@pytest.fixture
def file(tmp_path: Path) -> LedgerFile:
    return LedgerFile(tmp_path)


@pytest.fixture
def daemon(file: LedgerFile) -> Daemon:
    """A daemon with one fresh guest."""
    return Daemon(World(host(), [guest()]), file)


def with_policy(**fields: Any) -> Policy:
    return replace(policy(), **fields)


def unsure(world: World) -> None:
    """Have libvirt not be done with any vCPU."""
    for tid in (VCPU, SIBLING):
        world.change(tid, settled=False)


# --- passes ------------------------------------------------------------------------------------------------------


def test_two_passes_place_a_guest_and_then_nothing_is_done_or_said(daemon: Daemon) -> None:
    """Affinity at the first look, FIFO at the second; then no call, no record, and no write."""
    daemon.run()

    assert daemon.world.where() == {tid: Placement(now.cpus) for tid, now in PLACED.items()}

    view = daemon.run(0.003)

    assert [str(step.scheduling) for step in view.plan.steps] == ["fifo:1", "fifo:1"]
    assert daemon.world.where() == PLACED
    assert daemon.kinds() == [Kind.CHANGED] * 6

    written = daemon.file.path.stat().st_mtime_ns
    view = daemon.run()

    assert view.plan.steps == ()
    assert (daemon.calls(), len(daemon.records)) == (6, 6)
    assert daemon.file.path.stat().st_mtime_ns == written


def test_off_place_time_is_told_once_when_a_start_is_over(file: LedgerFile) -> None:
    """It counts from the last look before libvirt moved the vCPUs, up to the read-back of each step."""
    world = World(host(), [guest(young=True)])
    daemon = Daemon(world, file)
    unsure(world)
    world.ran = {VCPU: 1_000_000, SIBLING: 2_000_000}
    daemon.run()
    for tid in (VCPU, SIBLING):
        world.change(tid, settled=True)
        world.ran[tid] += 300_000

    def count(of: Thread) -> None:  # 1 us for each call on a vCPU, and 100 us for each after a pass
        if of.role is Role.VCPU:
            world.ran[of.id.tid] += 1000

    world.on_call = count
    for seconds in (0.01, 0.01, 0.5):
        daemon.run(seconds)
        world.ran = {tid: ran_ns + 100_000 for tid, ran_ns in world.ran.items()}

    assert world.where() == PLACED
    assert daemon.said(Kind.STARTED) == []

    daemon.run(1.0)
    daemon.run(1.0)
    (record,) = [record for record in daemon.records if record.kind is Kind.STARTED]

    assert record.message == (
        "rt-1: vCPU 0-1 started, at most 0.602 ms of CPU time off its pCPUs and 0.804 ms without its scheduling"
    )
    assert record.fields["RESULT"] == "placed"


def test_a_kernel_that_does_not_count_tells_nothing(daemon: Daemon) -> None:
    """Then there is no off-place time, and no record of it."""
    daemon.settle()
    assert daemon.said(Kind.STARTED) == []
    assert daemon.reconciler.memory.starts == {}


def test_what_threads_had_is_on_disk_before_the_first_call(daemon: Daemon) -> None:
    """Killed at the first system call, a new daemon can still put everything back."""
    before = daemon.world.where()
    daemon.world.crash_before = 0
    with pytest.raises(Killed):
        daemon.run()

    ledger, trouble = daemon.file.read()

    assert trouble == ""
    assert {id_.tid: entry.placement for id_, entry in ledger.originals.items()} == before


def test_a_thread_that_is_gone_leaves_the_ledger(daemon: Daemon) -> None:
    """Whether a pass sees it go, or the ledger comes to know of one that is gone already."""
    late = daemon.world.fork(PID)
    daemon.settle()
    daemon.world.exit(late)
    daemon.run()

    assert {id_.tid for id_ in daemon.reconciler.ledger.originals} == set(PLACED)

    gone = daemon.world.tasks[PID].thread
    daemon.reconciler.ledger = daemon.reconciler.ledger.recording([replace(gone, id=gone.id._replace(tid=late))])
    daemon.run()

    assert {id_.tid for id_ in daemon.reconciler.ledger.originals} == set(PLACED)


def test_a_thread_is_written_down_when_libvirt_is_done_with_it(daemon: Daemon) -> None:
    """What it had while libvirt was still moving it is not what it had before rtpind."""
    unsure(daemon.world)
    daemon.run()

    assert {id_.tid for id_ in daemon.reconciler.ledger.originals} == {PID, IOTHREAD}

    for tid in (VCPU, SIBLING):
        daemon.world.change(tid, settled=True)
        daemon.world.put(tid, cpus=cpus("4-6"))
    daemon.run()
    originals = {id_.tid: entry.placement for id_, entry in daemon.reconciler.ledger.originals.items()}

    assert originals[VCPU] == originals[SIBLING] == Placement(cpus("4-6"))


def test_a_helper_that_began_later_is_released_to_what_the_main_thread_had(daemon: Daemon) -> None:
    """It inherited a place from rtpind: one that was moved since, and one that was not."""
    daemon.settle()
    moved, still = daemon.world.fork(VCPU), daemon.world.fork(PID)
    immovable = daemon.world.fork(PID, movable=False)
    daemon.world.put(immovable, scheduling=fifo())
    daemon.run()

    assert daemon.world.where()[moved] == Placement(cpus("0-1"))

    daemon.reconciler.release([])

    assert daemon.world.where()[moved] == daemon.world.where()[still] == Placement(cpus("0-7"))
    assert daemon.world.where()[immovable] == Placement(cpus("0-1"), fifo())


def test_without_a_ledger_nothing_is_touched_and_that_is_said_once() -> None:
    """It is tried at each pass, and said again only after it worked, or when the reason is another."""
    disk = Disk()
    daemon = Daemon(World(host(), [guest()]), disk)
    disk.full = True
    daemon.run()
    daemon.run()

    assert daemon.calls() == 0
    assert daemon.said(Kind.LEDGER) == [
        "the ledger cannot be written ([Errno 28] No space left on device); no thread is touched that is not in it"
    ]
    assert daemon.reconciler.release([]) == {"rt-1": "not released: the ledger cannot be written"}
    assert daemon.reconciler.pause([], None) == {"rt-1": "not paused: the ledger cannot be written"}

    disk.full = False
    daemon.run()
    disk.full = True

    assert daemon.calls() > 0
    assert daemon.reconciler.pause([], None) == {"rt-1": "not paused: the ledger cannot be written"}
    assert len(daemon.said(Kind.LEDGER)) == 2


def test_observing_touches_nothing_and_says_once_what_it_would_do(file: LedgerFile) -> None:
    """With ``mode: observe`` and with --observe alike."""
    for options, policy_ in (({}, with_policy(mode=Mode.OBSERVE)), ({"observe_only": True}, policy())):
        daemon = Daemon(World(host(), [guest()]), file, policy_, **options)
        daemon.settle(3)

        assert not daemon.reconciler.enforcing
        assert daemon.calls() == 0
        assert daemon.kinds() == [Kind.WOULD] * 6
        assert not file.path.exists()


def test_without_a_policy_nothing_is_enforced(daemon: Daemon) -> None:
    """A daemon that has none yet acts on nobody."""
    daemon.reconciler.policy = None

    assert not daemon.reconciler.enforcing


def test_a_look_ahead_changes_nothing(daemon: Daemon) -> None:
    """view() decides by the running policy or another, and neither acts nor learns."""
    memory = daemon.reconciler.memory
    view = daemon.reconciler.view(policy=with_policy(rules=()))

    assert [str(found.state) for found in view.decision.guests] == ["unmanaged"]
    assert len(daemon.reconciler.view().plan.steps) == 6
    assert daemon.reconciler.memory is memory
    assert daemon.calls() == 0


# --- a look at some ----------------------------------------------------------------------------------------------


def test_nobody_is_acted_on_from_an_old_look(file: LedgerFile) -> None:
    """A pass for one guest looks anew at every other one that it would touch, too."""
    daemon = Daemon(World(host(), [guest(), guest("rt-2", pid=2000)]), file)
    daemon.run()
    daemon.run(0.003)
    calls = daemon.calls()
    daemon.run(0.003, only=[uuid_of(2000)])

    assert daemon.calls() == calls  # what the first pass did is not done again
    assert daemon.run(only=[uuid_of(2000)]).plan.steps == ()


def test_the_second_look_is_a_look(file: LedgerFile) -> None:
    """A pass for another guest, long after the first look, gives no FIFO to a guest that was moved since."""
    daemon = Daemon(World(host(), [guest(), guest("rt-2", pid=2000)]), file)
    daemon.run()
    daemon.world.put(VCPU, cpus=cpus("0-7"))
    daemon.run(only=[uuid_of(2000)])

    assert daemon.world.where()[VCPU] == Placement(cpus("2"))
    assert not daemon.world.where()[SIBLING].scheduling.realtime


# --- drift, fights, refusals -------------------------------------------------------------------------------------


def test_a_moved_thread_is_put_back_in_order_with_one_record_of_the_drift(daemon: Daemon) -> None:
    """Demoted, moved, and FIFO again after the second look."""
    daemon.settle()
    said = len(daemon.records)
    daemon.world.put(VCPU, cpus=cpus("5"))
    daemon.run()

    assert daemon.world.where()[VCPU] == Placement(cpus("2"), OTHER)

    daemon.run(0.001)

    assert daemon.world.where()[VCPU] == Placement(cpus("2"), OTHER)

    daemon.run(0.003)

    assert daemon.world.where() == PLACED
    assert daemon.kinds(said) == [Kind.CHANGED, Kind.CHANGED, Kind.DRIFT, Kind.CHANGED]


@pytest.mark.parametrize(("drift", "records"), [(Drift.WARN, [Kind.DRIFT]), (Drift.IGNORE, [])])
def test_warn_and_ignore_demote_and_never_place_again(file: LedgerFile, drift: Drift, records: list[Kind]) -> None:
    """Until it is back: then it gets the FIFO that rtpind took."""
    daemon = Daemon(World(host(), [guest()]), file, with_policy(drift=drift))
    daemon.settle()
    said = len(daemon.records)
    daemon.world.put(VCPU, cpus=cpus("5"))
    daemon.settle()

    assert daemon.world.where()[VCPU] == Placement(cpus("5"), OTHER)
    assert daemon.kinds(said) == [Kind.CHANGED, *records]

    daemon.world.put(VCPU, cpus=cpus("2"))
    daemon.settle()

    assert daemon.world.where() == PLACED


def test_a_fight_is_paused_for_longer_each_time_without_fifo_off_its_place(daemon: Daemon) -> None:
    """After three repairs in a minute: five minutes, then twice as long."""
    daemon.settle()
    for length_s in (300.0, 600.0, 1200.0):
        for _ in range(3):
            daemon.world.put(VCPU, cpus=cpus("5"), scheduling=fifo())
            daemon.run()

            assert daemon.world.where()[VCPU].cpus == cpus("2")

            daemon.run()

            assert daemon.world.where()[VCPU] == PLACED[VCPU]

        daemon.world.put(VCPU, cpus=cpus("5"), scheduling=fifo())
        daemon.run()
        calls = daemon.calls()

        assert daemon.world.where()[VCPU] == Placement(cpus("5"), OTHER)
        assert daemon.said(Kind.FIGHT)[-1].count(f"left alone for {length_s / 60:.0f} min")

        daemon.run(length_s - 1.0)

        assert daemon.calls() == calls

        daemon.world.put(VCPU, scheduling=fifo())
        daemon.run(0.5)

        assert daemon.world.where()[VCPU] == Placement(cpus("5"), OTHER)
        assert daemon.calls() == calls + 1

        daemon.run(1.0)
        daemon.run(1.0)

        assert daemon.world.where()[VCPU] == PLACED[VCPU]

        daemon.settle()
        daemon.run(61.0)
    assert len(daemon.said(Kind.FIGHT)) == 3


def test_what_the_kernel_refuses_is_asked_and_said_once_until_something_changes(daemon: Daemon) -> None:
    """A fence and a missing budget; and a fence that widens, or a host that throttles otherwise."""
    world = daemon.world
    world.put(VCPU, cpus=cpus("0-1"))
    world.tasks[VCPU].fence = cpus("0-1")
    world.tasks[SIBLING].budget = False
    daemon.settle()
    calls = daemon.calls()
    daemon.settle()

    assert daemon.calls() == calls
    assert len(daemon.said(Kind.REFUSED)) == 2
    assert world.where()[VCPU] == Placement(cpus("0-1"))
    assert world.where()[SIBLING] == Placement(cpus("3"))

    world.tasks[VCPU].fence = cpus("0-2")
    daemon.run()

    assert world.where()[VCPU].cpus == cpus("2")

    world.host = replace(world.host, rt_runtime_us=-1, fair_server=world.host.online)
    daemon.settle()

    assert len(daemon.said(Kind.REFUSED)) == 3

    world.tasks[SIBLING].budget = True
    daemon.settle()

    assert world.where() == PLACED


def test_a_vcpu_is_placed_inside_the_cpuset_that_fences_it_in(daemon: Daemon) -> None:
    """Refused a pCPU outside its fence, it gets one of the pool inside, at FIFO."""
    world = daemon.world
    world.put(VCPU, cpus=cpus("4-5"))
    world.tasks[VCPU].fence = cpus("4-5")
    daemon.settle()

    assert world.where()[VCPU] == Placement(cpus("4"), fifo())
    assert world.where()[SIBLING].cpus == cpus("3")


def test_a_step_that_the_law_forbids_is_said_once(daemon: Daemon) -> None:
    """A FIFO vCPU of an unmanaged guest is in the way for as long as it stands."""
    other = guest("other", pid=2000, vcpus=1, iothreads=0, on="1")
    daemon.world.guests.append(other)
    for found in other.threads:
        daemon.world.tasks[found.id.tid] = replace(daemon.world.tasks[PID], thread=found)
    daemon.world.put(2010, cpus=cpus("0-1"), scheduling=fifo())
    daemon.world.put(PID, cpus=cpus("5-6"))
    daemon.settle()
    (refused,) = (message for message in daemon.said(Kind.REFUSED) if "blocked" in message)

    assert refused.startswith("rt-1: emulator (qemu-system-x86, tid 1000): pCPU 5-6 → 0-1 blocked: vcpu 0 (CPU 0/KVM)")
    assert daemon.world.where()[PID] == Placement(cpus("5-6"))

    daemon.world.put(2010, scheduling=OTHER)
    daemon.run()

    assert daemon.world.where()[PID] == Placement(cpus("0-1"))


def test_a_vcpu_loses_fifo_to_a_helper_that_moves_in_and_gets_it_back_when_it_leaves(daemon: Daemon) -> None:
    """On record, with the reason safety, and then why it has none."""
    daemon.settle()
    said = len(daemon.records)
    stuck = daemon.world.fork(PID, movable=False)
    daemon.world.put(stuck, cpus=cpus("1-2"))
    daemon.settle()

    assert daemon.world.where()[VCPU] == Placement(cpus("2"), OTHER)
    assert [record.fields.get("REASON") for record in daemon.records[said:]] == ["safety", None]
    assert daemon.kinds(said) == [Kind.CHANGED, Kind.FIFO_WITHHELD]
    assert daemon.records[-1].message.endswith("its guest's emulator (worker) can run on pCPU 2: no FIFO")

    daemon.world.exit(stuck)
    daemon.settle()

    assert daemon.world.where() == PLACED


# --- restart, release, pause, manage -----------------------------------------------------------------------------


def test_a_restart_changes_nothing(daemon: Daemon) -> None:
    """Places that are valid in the kernel are kept; there is nothing to do and nothing to say."""
    daemon.settle()
    again = Daemon(daemon.world, daemon.file)
    calls = again.calls()
    again.settle()

    assert again.calls() == calls
    assert again.records == []
    assert again.reconciler.memory.incumbents.items() >= daemon.reconciler.memory.incumbents.items()


def test_a_damaged_ledger_is_set_aside(file: LedgerFile) -> None:
    """On record, and then the daemon goes on with an empty one."""
    file.path.write_text("{}")
    daemon = Daemon(World(host(), [guest()]), file)

    assert daemon.kinds() == [Kind.LEDGER]
    assert "set aside as" in daemon.records[0].message
    assert file.path.with_suffix(".damaged").exists()

    daemon.settle()

    assert daemon.world.where() == PLACED


def test_release_puts_back_what_was_there_and_keeps_hands_off(daemon: Daemon) -> None:
    """Until the guest is managed again."""
    world = daemon.world
    world.put(VCPU, cpus=cpus("4-5"), scheduling=fifo(7, reset_on_fork=False))
    world.put(SIBLING, scheduling=Scheduling(Sched.BATCH))
    before = world.where()
    daemon.settle()

    assert world.where() == PLACED
    assert daemon.reconciler.release(["rt-1"]) == {"rt-1": "released, 7 changes"}
    assert world.where() == before
    assert daemon.file.read()[0] == Ledger(hands_off={uuid_of(PID): Off(HandsOff.RELEASED, (PID, START))})

    calls = daemon.calls()
    daemon.settle()

    assert daemon.calls() == calls

    assert daemon.reconciler.manage(["rt-1"]) == {"rt-1": "managed"}

    daemon.settle()

    assert world.where() == PLACED
    assert daemon.said(Kind.RELEASED) == ["rt-1: released, 7 changes", "rt-1: managed"]


def test_what_could_not_be_put_back_is_said_and_can_be_tried_again(daemon: Daemon) -> None:
    """The originals are kept."""
    before = daemon.world.where()
    daemon.settle()
    daemon.world.tasks[VCPU].fence = cpus("2")

    assert daemon.reconciler.release([]) == {
        "rt-1": "released, but not every thread could be put back (see the journal)"
    }
    assert daemon.world.where()[VCPU] == Placement(cpus("2"))
    assert len(daemon.reconciler.ledger.originals) == 4

    daemon.world.tasks[VCPU].fence = None
    daemon.reconciler.release([])

    assert daemon.world.where() == before
    assert daemon.reconciler.ledger.originals == {}


def test_a_release_of_one_guest_leaves_the_others(file: LedgerFile) -> None:
    """By name or by UUID."""
    daemon = Daemon(World(host(), [guest(), guest("rt-2", pid=2000)]), file)
    daemon.settle()

    assert daemon.reconciler.release([uuid_of(2000)]) == {"rt-2": "released, 6 changes"}
    assert {tid: now for tid, now in daemon.world.where().items() if tid < 2000} == PLACED
    assert {id_.pid for id_ in daemon.reconciler.ledger.originals} == {PID}


def test_a_name_that_no_guest_has_is_refused(daemon: Daemon) -> None:
    """All names are checked before anything is done."""
    with pytest.raises(LookupError, match=r"no running guest is called nobody, nothing"):
        daemon.reconciler.release(["rt-1", "nothing", "nobody"])

    assert daemon.reconciler.ledger == Ledger()


def test_a_paused_guest_is_left_to_hand_work(daemon: Daemon) -> None:
    """For a while, or until it is managed again; a released one stays released."""
    daemon.settle()
    reconciler = daemon.reconciler

    assert reconciler.pause(["rt-1"], 3600.0) == {"rt-1": "paused"}

    daemon.world.put(VCPU, cpus=cpus("5-6"))
    daemon.settle()

    assert daemon.world.where()[VCPU] == Placement(cpus("5-6"), fifo())

    assert reconciler.pause(["rt-1"], -1.0) == {"rt-1": "paused"}  # over already

    daemon.settle()

    assert daemon.world.where() == PLACED
    assert reconciler.ledger.hands_off == {}

    reconciler.release(["rt-1"])
    reconciler.pause(["rt-1"], 3600.0)

    assert [off.kind for off in reconciler.ledger.hands_off.values()] == [HandsOff.RELEASED]


def test_a_release_of_a_guest_that_stopped_does_not_stand_against_a_pause_of_the_next(file: LedgerFile) -> None:
    """The same UUID, another process."""
    file.write(Ledger(hands_off={uuid_of(PID): Off(HandsOff.RELEASED, (1, 1))}))
    daemon = Daemon(World(host(), [guest()]), file)
    daemon.reconciler.pause(["rt-1"], None)

    assert daemon.reconciler.ledger.hands_off == {uuid_of(PID): Off(HandsOff.PAUSED, (PID, START))}


def test_pausing_all_includes_those_to_come(daemon: Daemon) -> None:
    """And managing all ends it; managing one does not, and says so."""
    assert daemon.reconciler.pause([], None) == {"rt-1": "paused"}

    daemon.settle()

    assert daemon.calls() == 0
    assert set(daemon.reconciler.ledger.hands_off) == {EVERYONE}
    with pytest.raises(LookupError, match=r"every guest is paused"):
        daemon.reconciler.manage(["rt-1"])

    assert daemon.reconciler.manage([]) == {"rt-1": "managed"}
    assert daemon.reconciler.ledger.hands_off == {}


def test_hands_can_be_kept_off_where_no_guest_runs(file: LedgerFile) -> None:
    """Then the answer is about every guest; a release has nobody to be about."""
    daemon = Daemon(World(host(), []), file)

    assert daemon.reconciler.pause([], None) == {"every guest": "paused"}
    assert daemon.reconciler.manage([]) == {"every guest": "managed"}
    assert daemon.reconciler.release([]) == {}


def test_managing_needs_the_ledger() -> None:
    """What cannot be written down is not so."""
    disk = Disk(Ledger(hands_off={uuid_of(PID): Off(HandsOff.PAUSED, (PID, START))}))
    daemon = Daemon(World(host(), [guest()]), disk)
    disk.full = True

    assert daemon.reconciler.manage([]) == {"rt-1": "not managed: the ledger cannot be written"}


# --- the ledger over time ----------------------------------------------------------------------------------------


def processes(ledger: Ledger) -> set[int]:
    return {pid for pid, _ in ledger.processes()}


def test_the_ledger_forgets_who_stopped_and_keeps_who_is_only_not_seen(file: LedgerFile) -> None:
    """Libvirt may be away; a process that is gone, or whose number another took over, is gone."""
    guests = [guest(), guest("rt-2", pid=2000), guest("rt-3", pid=3000, vcpus=1)]
    daemon = Daemon(World(host(), guests), file)
    daemon.settle()
    hidden, stopped, reused = guests
    daemon.world.stop(stopped)
    daemon.reconciler.domains = {}
    daemon.world.guests[daemon.world.guests.index(reused)] = replace(reused, pid_start=9999)
    daemon.reconciler.run()

    assert processes(daemon.reconciler.ledger) == {hidden.pid}
    assert processes(file.read()[0]) == {hidden.pid}


def test_a_thread_that_ended_is_forgotten(daemon: Daemon) -> None:
    """Its original goes with it."""
    extra = daemon.world.fork(PID)
    daemon.world.put(extra, cpus=cpus("5"))
    daemon.settle()
    daemon.world.exit(extra)
    daemon.run()

    assert {id_.tid for id_ in daemon.reconciler.ledger.originals} == {PID, VCPU, SIBLING, IOTHREAD}
    assert len(json.loads(daemon.file.path.read_text())["originals"]) == 4


def test_the_kernel_is_this_hosts_where_none_is_given(file: LedgerFile, tmp_path: Path) -> None:
    """A reconciler of the real Observer applies to the real kernel."""
    reconciler = Reconciler(Observer(tmp_path, tmp_path), file, print)

    assert isinstance(reconciler.kernel, RealKernel)


def test_one_guests_trouble_blocks_no_other(file: LedgerFile) -> None:
    """A guest whose threads are all fenced and refused, beside one that is placed."""
    second: Guest = guest("rt-2", pid=2000, vcpus=1, iothreads=0)
    world = World(host(), [guest(start=100), second])
    for tid in (PID, VCPU, SIBLING, IOTHREAD):
        world.tasks[tid].fence = cpus("6-7")
        world.tasks[tid].obeys = False
    daemon = Daemon(world, file)
    daemon.settle()
    placed: Mapping[int, Placement] = {tid: now for tid, now in world.where().items() if tid >= 2000}

    assert sorted(str(now.scheduling) for now in placed.values()) == ["fifo:1", "other"]
    assert world.where()[PID] == Placement(cpus("0-7"))
    assert thread(role=Role.VCPU).id.tid == VCPU


# --- pCPUs that come and go --------------------------------------------------------------------------------------


def test_a_pcpu_that_goes_offline_is_said_with_who_was_on_it(daemon: Daemon) -> None:
    """The vCPU whose only pCPU it was, by name and loudly, once; those that had others are not said."""
    daemon.settle()
    before = len(daemon.records)
    daemon.world.host = host(online="0,2,4-7", possible="0-7")
    daemon.world.put(SIBLING, cpus=cpus("0,2,4-7"))  # the kernel does
    daemon.run()

    host_wide, thread_ = (record for record in daemon.records[before:] if record.kind is Kind.HOTPLUG)
    assert (host_wide.message, host_wide.level) == ("pCPU 1,3 went offline", Level.WARNING)
    assert host_wide.fields == {"OLD_CPUS": "0-7", "NEW_CPUS": "0,2,4-7"}
    assert thread_.level is Level.WARNING
    assert thread_.message.startswith(f"rt-1: vcpu 1 (CPU 1/KVM, tid {SIBLING}): its pCPU 3 went offline")
    assert (thread_.fields["GUEST"], thread_.fields["TID"], thread_.fields["OLD_CPUS"]) == ("rt-1", str(SIBLING), "3")

    daemon.settle()
    before = len(daemon.records)
    daemon.world.host = host()
    daemon.run()
    daemon.run()

    said = [record for record in daemon.records[before:] if record.kind is Kind.HOTPLUG]
    assert [(record.message, record.level) for record in said] == [("pCPU 1,3 came online", Level.NOTICE)]


@pytest.mark.parametrize("drift", list(Drift))
def test_what_the_kernel_does_when_pcpus_come_and_go_is_no_drift(file: LedgerFile, drift: Drift) -> None:
    """It sets all masks to what is online: put right whatever the policy says of drift, and never called a fight."""
    daemon = Daemon(World(host(), [guest()]), file, with_policy(drift=drift))
    daemon.settle()
    for online in ("0-6", "0-7", "0-6", "0-7", "0-6"):
        daemon.world.host = host(online=online, possible="0-7")
        for tid in (PID, VCPU, SIBLING):
            daemon.world.put(tid, cpus=cpus(online))
        daemon.run()
        daemon.settle()

        assert daemon.world.where()[VCPU] == PLACED[VCPU]

    assert daemon.said(Kind.FIGHT) + daemon.said(Kind.DRIFT) == []


def test_a_pcpu_that_was_offline_before_is_no_news(daemon: Daemon) -> None:
    """What the daemon finds at its start is no change."""
    daemon.world.host = host(online="0,2-7", possible="0-7")
    daemon.run()

    assert daemon.said(Kind.HOTPLUG) == []


def test_what_a_quick_look_does_not_look_at_is_not_said_again(file: LedgerFile) -> None:
    """A guest without room is said once, whoever is looked at; and again when it has changed meanwhile."""
    crowd = [guest(f"rt-{pid}", pid=pid, vcpus=4, start=pid) for pid in (1000, 2000, 3000)]
    daemon = Daemon(World(host(), crowd), file)
    daemon.settle()
    said = daemon.said(Kind.NOT_PLACED)
    assert len(said) == 2
    for _ in range(3):
        daemon.run(only=[crowd[0].uuid])
        daemon.run(only=[crowd[2].uuid])
    daemon.run()

    assert daemon.said(Kind.NOT_PLACED) == said


def test_a_guest_beside_a_new_one_is_said_at_once(file: LedgerFile) -> None:
    """It may run on what was given out, and only the new guest was looked at."""
    daemon = Daemon(World(host(), [guest("stranger", pid=5000)]), file)
    daemon.settle()
    daemon.world.guests.append(guest())
    daemon.world.tasks |= World(host(), [guest()]).tasks
    daemon.run(only=[uuid_of(PID)])

    assert all(text.startswith("stranger: ") for text in daemon.said(Kind.INTRUDER))
    assert len(daemon.said(Kind.INTRUDER)) == 4
    daemon.settle()
    for only in ([uuid_of(PID)], [uuid_of(PID)], [uuid_of(5000)], None):
        daemon.run(only=only)
    assert len(daemon.said(Kind.INTRUDER)) == 4  # it stands, whoever is looked at


def test_a_look_at_one_guest_leaves_the_ledger_to_the_next_look_at_all(daemon: Daemon) -> None:
    """What a guest had is dropped when it has gone, by a look at everything."""
    daemon.settle()
    daemon.world.stop(daemon.world.guests[0])
    daemon.run(only=[uuid_of(PID)])
    assert daemon.reconciler.ledger.originals
    daemon.run()

    assert not daemon.reconciler.ledger.originals

"""The promises hold for any small host, any policy, any history, at every system call.

A story is lived through: guests are placed, threads are moved by others, begun, ended, the policy is read anew, the
daemon is killed and started again. What must always hold is checked after every system call, which is where the
daemon can be killed; what must hold in the end is checked when nothing changes any more.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from random import Random
from time import time as now
from typing import Any

from factories import fifo, guest
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from simulated import FIRST_CHILD, Disk, Killed, Task, World, violations

from rtpind.core.audit import Record
from rtpind.core.cpuset import CpuSet
from rtpind.core.decision import State
from rtpind.core.model import OTHER, Host, Placement, Role, Sched, Scheduling, Thread
from rtpind.core.placement import place
from rtpind.core.plan import LOOK_APART_S, Step, make
from rtpind.core.policy import Drift, Policy
from rtpind.core.policyfile import load
from rtpind.daemon.reconcile import Reconciler, View

#: More than any of these worlds needs to come to rest.
PASSES = 14
STEP_S = 0.01

RANDOM = st.randoms(use_true_random=False)
STORIES = settings(deadline=None, max_examples=100, suppress_health_check=list(HealthCheck))

SCHEDULING = [
    *[OTHER] * 5,
    fifo(1),
    fifo(1, reset_on_fork=False),
    fifo(2),
    fifo(7),
    Scheduling(Sched.RR, 3),
    Scheduling(Sched.BATCH),
]


# --- hosts, policies, guests -------------------------------------------------------------------------------------


def any_host(random: Random) -> Host:
    """Two to six pCPUs, of which one or two are for housekeeping."""
    count = random.randint(2, 6)
    online = CpuSet(range(count))
    return Host(
        online=online,
        possible=online,
        isolated=CpuSet(range(random.randint(1, min(2, count - 1)), count)),
        rt_runtime_us=random.choice([950_000, -1]),
        throttles=True,
        rt_group_sched=True,
        fair_server=CpuSet(),
        guards={cpu: random.choice([1, 4]) for cpu in online},
    )


def any_policy(random: Random, host: Host) -> Policy:
    """Return a valid policy of two classes for the guests rt-1 and rt-2; others have no rule."""
    while True:
        text = any_text(random, host)
        made, problems = load(text, host)
        if made is not None:
            note(text)
            return made
        assert all("promise" not in problem.message for problem in problems)


def any_text(random: Random, host: Host) -> str:
    rules = ["rt-1, a", "rt-1, b", "rt-2, a", "rt-2, b", "'*', unmanaged"]
    chosen = dict.fromkeys(random.choice(rules) for _ in range(random.randint(1, 4)))
    lines = [f"  - {{name: {rule.replace(', ', ', class: ')}}}" for rule in chosen]
    return f"""
version: 1
mode: enforce
pools: {{housekeeping: {host.online - host.isolated}, helpers: {host.online - host.isolated}, rt: isolated}}
classes:
  a: {any_class(random)}
  b: {any_class(random)}
guests:
{chr(10).join(lines)}
drift: {random.choice(["repair", "repair", "warn", "ignore"])}
when_full: {random.choice(["degrade", "leave"])}
"""


def any_class(random: Random) -> str:
    """Return one class of the grammar, without contradictions."""
    priority = random.choice([0, 1, 1, 3])
    exclusive = "thread" if priority else random.choice(["", "thread", "thread"])
    roles = [f"vcpu: {entry('rt' if exclusive else 'helpers', exclusive=exclusive, priority=priority)}"]
    choices = [entry("helpers"), entry("helpers"), entry("rt", exclusive="guest"), entry("rt", exclusive="thread")]
    if exclusive and not priority:
        choices.append(entry(share=True))
    roles.append(f"emulator: {random.choice(choices)}")
    choices.append(entry("rt", exclusive="thread", priority=2))
    if exclusive:
        choices += [entry(share=True, priority=priority + 1)] * 3
    some = [role for role in ("iothread", "vhost") if random.randrange(3)]
    roles += [f"{role}: {random.choice(choices)}" for role in some]
    return "{" + ", ".join(roles) + random.choice(["", ", unsafe: true"]) + "}"


def entry(pool: str = "", *, exclusive: str = "", share: bool = False, priority: int = 0) -> str:
    words = ["share_with: {vcpu: 0}"] if share else [f"pool: {pool}"]
    words += [f"exclusive: {exclusive}"] if exclusive else []
    words += [f"scheduler: fifo, priority: {priority}"] if priority else []
    return "{" + ", ".join(words) + "}"


def any_mask(random: Random, host: Host) -> CpuSet:
    """Return all pCPUs, one, or some."""
    some = random.sample(sorted(host.online), random.randint(1, len(host.online)))
    return random.choice([host.online, CpuSet(some[:1]), CpuSet(some)])


def any_world(random: Random, host: Host, *, tame: bool = False) -> World:
    """Return one to three guests whose threads are anywhere; ``tame``: none of them is hindered."""
    guests = [
        guest(
            f"rt-{number + 1}",
            pid=1000 * (number + 1),
            start=500 - 10 * number,
            vcpus=random.randint(1, 2),
            iothreads=random.randint(0, 1),
            helpers=random.randint(1, 2),
            vhosts=random.randint(0, 1),
            on=str(host.online),
        )
        for number in range(random.randint(1, 3))
    ]
    world = World(host, guests)
    for tid, task in world.tasks.items():
        world.put(tid, cpus=any_mask(random, host), scheduling=random.choice(SCHEDULING))
        if not tame and random.randrange(8) == 7:
            hinder(task, random.randrange(5), any_mask(random, host))
    note(repr(world))
    return world


def hinder(task: Task, how: int, mask: CpuSet) -> None:
    """Make a thread one that does not go where it should."""
    if how == 0:
        task.fence = task.thread.now.cpus | mask
    elif how == 1:
        task.budget = False
    elif how == 2 and task.thread.role in (Role.EMULATOR, Role.VHOST):
        task.thread = replace(task.thread, movable=False)
    elif how == 3 and task.thread.index is not None:
        task.thread = replace(task.thread, settled=False)
    elif how == 4:
        task.obeys = False


# --- the daemon in such a world ----------------------------------------------------------------------------------


class Life:
    """A daemon in a world, watched at every system call."""

    def __init__(self, world: World, policy: Policy, disk: Disk | None = None) -> None:
        self.world = world
        self.policy = policy
        self.disk = disk or Disk()
        self.records: list[Record] = []
        self.view: View | None = None
        self.before: set[tuple[int, int]] = set()
        self.fifo_before: set[int] = set()
        self.right: dict[str, float] = {}  # since when a guest's vCPUs and iothreads were seen in place
        self.unseen: set[int] = set()  # moved since the last look, and not looked at in this pass
        self.first: dict[int, Placement] = {}  # what each thread had before it was planned for
        self.guests: set[str] = set()  # those planned for
        world.on_call = self.on_call
        world.after_call = self.after_call
        self.start()

    def start(self) -> None:
        """Begin a daemon that remembers nothing but the ledger."""
        observer: Any = self.world
        file: Any = self.disk
        self.reconciler = Reconciler(observer, file, self.records.append, kernel=self.world, clock=self.world.clock)
        self.reconciler.open_ledger()
        self.reconciler.policy = self.policy
        self.world.seen = {}
        self.right.clear()
        look = self.reconciler.view

        def view(*args: Any, **kwargs: Any) -> View:
            self.view = look(*args, **kwargs)  # what a pass promises is about what it decided
            known = self.reconciler.memory, self.reconciler.ledger
            whole = place(self.reconciler.policy or self.policy, self.view.snapshot, *known, now())
            assert self.view.decision == whole  # whatever it took over from the decision before
            self.before = violations(self.world)
            seen = {found.id.tid: found.now for found in self.view.snapshot.threads()}
            self.unseen = {tid for tid, now in self.world.where().items() if seen.get(tid) != now}
            self.fifo_before = self.fifo_off_place()
            self.remember(self.view)
            self.look(self.view.snapshot.time)
            return self.view

        self.reconciler.view = view  # type: ignore[method-assign]

    def run(self, seconds: float = STEP_S, only: Sequence[str] | None = None) -> View:
        """Do a pass."""
        self.world.time += seconds
        self.reconciler.domains = self.world.domains
        view = self.reconciler.run(only)
        self.look(self.world.time)
        return view

    def rest(self, seconds: float = STEP_S) -> View:
        """Do passes until nothing is done or said any more; return the last."""
        for _ in range(PASSES):
            calls, said = len(self.world.calls), len(self.records)
            view = self.run(seconds)
            right = self.reconciler.memory.right_since
            waits = any(step.gated and step.thread.id.pid in {pid for pid, _ in right} for step in view.plan.steps)
            if len(self.world.calls) == calls and len(self.records) == said and not waits:
                return view
        raise AssertionError(f"no rest: {[str(record.message) for record in self.records[-10:]]}")

    def fifo_off_place(self) -> set[int]:
        """Return the tids of the FIFO threads that are not where they may be FIFO."""
        assert self.view is not None
        wanted = self.view.decision.wanted()
        return {
            found.id.tid
            for found in self.world.threads()
            if found.id in wanted
            and found.now.scheduling.realtime
            and not (wanted[found.id].affine(found.now) and wanted[found.id].priority)
        }

    def on_call(self, found: Thread) -> None:
        """Before a system call: what the thread had is in the ledger (promise 8)."""
        assert self.disk.ledger.originals[found.id].placement == self.first[found.id.tid]

    def look(self, time: float) -> None:
        """Note since when every vCPU and iothread of a guest was seen in place (promise 7)."""
        assert self.view is not None
        wanted = self.view.decision.wanted()
        for each in self.world.guests:
            own = [task for task in self.world.tasks.values() if task.thread.guest == each.uuid]
            right = all(
                task.thread.settled and (task.fence is not None or wanted[task.thread.id].affine(task.thread.now))
                for task in own
                if task.thread.index is not None and task.thread.id in wanted
            )
            if right and any(task.thread.id in wanted for task in own):
                self.right.setdefault(each.uuid, time)
            else:
                self.right.pop(each.uuid, None)

    def remember(self, view: View) -> None:
        """Note what threads had before a plan was made for them: all of a guest's that libvirt was done with."""
        for step in view.plan.steps:
            if step.gated:
                continue
            for thread in self.world.threads():
                of_guest = thread.guest == step.thread.guest and thread.settled and thread.guest not in self.guests
                if of_guest or thread.id == step.thread.id:
                    born = thread.id.tid > FIRST_CHILD and thread.movable and thread.id.pid in self.first
                    had = self.first[thread.id.pid] if born and thread.guest in self.guests else thread.now
                    self.first.setdefault(thread.id.tid, had)
        self.guests |= {step.thread.guest for step in view.plan.steps if not step.gated}

    def after_call(self) -> None:
        """After a system call: no new violation, no FIFO off its place, none too early (promises 1, 2 and 7)."""
        assert self.view is not None
        call = self.world.calls[-1]
        if isinstance(call.value, Scheduling) and call.value.realtime:
            since = self.right[self.world.tasks[call.tid].thread.guest]
            assert self.view.snapshot.time - since >= LOOK_APART_S
        assert {pair for pair in violations(self.world) - self.before if not self.excused(*pair)} == set()
        assert self.fifo_off_place() - self.fifo_before == set()

    def excused(self, vcpu: int, other: int) -> bool:
        """Return whether ``other`` is an intruder: of another guest, and not for rtpind to move, or it cannot."""
        assert self.view is not None
        task = self.world.tasks[other]
        thread = task.thread
        if {vcpu, other} & self.unseen:
            return True
        if thread.guest == self.world.tasks[vcpu].thread.guest:
            return False
        held = {found.id for found in self.view.plan.fighters}
        if self.policy.drift is not Drift.REPAIR:
            held |= {found.id for found, _ in self.view.plan.drifted}
        unplaced = thread.id not in self.view.decision.wanted() or thread.id in held
        fighting = self.reconciler.memory.fighting(thread.id, self.view.snapshot.time)
        hindered = not thread.movable or task.fence is not None or not task.obeys
        return unplaced or fighting or hindered or self.stuck(thread)

    def stuck(self, thread: Thread) -> bool:
        """Return whether the law keeps a thread from where it should be: a FIFO vCPU nobody may move is there."""
        assert self.view is not None
        there = World(self.world.host, [], {tid: replace(task) for tid, task in self.world.tasks.items()})
        there.put(thread.id.tid, cpus=self.view.decision.wanted()[thread.id].cpus)
        return any(thread.id.tid == other for _, other in violations(there) - violations(self.world))


EVENTS = ["pass", "pass", "pass", "drift", "drift", "only", "fork", "exit", "policy", "restart", "settle", "hands"]


def live(life: Life, random: Random) -> None:
    """Let one thing happen."""
    world = life.world
    what = random.choice(EVENTS)
    tid = random.choice(sorted(world.tasks))
    note(f"{what} {tid}")
    life.reconciler.domains = world.domains
    if what == "pass":
        life.run(random.choice([0.0, 0.001, 0.01, 0.5, 90.0]))
    elif what == "only":
        life.run(0.01, only=[world.tasks[tid].thread.guest] if world.seen else None)  # the first look is at all
    elif what == "drift":
        world.put(tid, cpus=any_mask(random, world.host), scheduling=random.choice(SCHEDULING))
    elif what == "fork":
        world.fork(tid)
    elif what == "exit" and world.tasks[tid].thread.helper and tid != world.tasks[tid].thread.id.pid:
        world.exit(tid)
    elif what == "policy":
        life.policy = life.reconciler.policy = any_policy(random, world.host)
    elif what == "restart":
        life.start()
    elif what == "settle":
        settle(world)
    elif what == "hands":
        hands(life, random)


def settle(world: World) -> None:
    """Have libvirt move every thread into its cgroup."""
    for tid in world.tasks:
        world.change(tid, settled=True)


def hands(life: Life, random: Random) -> None:
    """Have somebody pause a guest, or all, or manage them again."""
    if random.randrange(2):
        life.reconciler.pause(random.sample(sorted(life.world.domains.values()), random.randint(0, 1)), 60.0)
    else:
        life.reconciler.manage([])


def story(random: Random) -> None:
    host = any_host(random)
    life = Life(any_world(random, host), any_policy(random, host))
    for _ in range(random.randint(1, 10)):
        live(life, random)

    view = life.rest()
    calls = len(life.world.calls)
    again = life.run(1.0)

    assert len(life.world.calls) == calls
    assert [asked(step) for step in again.plan.steps] == [asked(step) for step in view.plan.steps]


def asked(step: Step) -> tuple[Any, ...]:
    """Return what a step is about; what remains in a plan at rest is what the law, or the gate, does not allow."""
    return (step.phase, step.thread.id, step.cpus, step.scheduling, step.gated)


@STORIES
@given(random=RANDOM)
def test_no_system_call_breaks_a_promise_and_the_end_is_at_rest(random: Random) -> None:
    """Whatever happens, each system call keeps promises 1, 2 and 8, and in the end nothing is done any more."""
    story(random)


# --- killed at any system call -----------------------------------------------------------------------------------


def until_killed(world: World, policy: Policy, disk: Disk, number: int = -1) -> Life:
    """Run a daemon until it is killed before its Nth system call, or has nothing left to do."""
    world.crash_before = number
    life = Life(world, policy, disk)
    with suppress(Killed):
        life.rest()
    world.crash_before = -1
    return life


def converge(random: Random) -> None:
    host = any_host(random)
    start, policy = any_world(random, host, tame=True), any_policy(random, host)
    whole = start.copy()
    view = until_killed(whole, policy, Disk()).view
    assert view is not None
    # Who gets the room that is short is a matter of what was there before; see placement.
    bids = [guest for guest in view.decision.guests if guest.state.managed or guest.state is State.LEFT]
    roomy = all(not guest.reason and not guest.roomless for guest in bids)

    for number in range(len(whole.calls)):
        world, disk = start.copy(), Disk()
        life = until_killed(world, policy, disk, number)
        life.start()
        life.rest()

        assert world.where() == whole.where() or not roomy, number


@STORIES
@given(random=RANDOM)
def test_a_daemon_killed_at_any_system_call_ends_where_it_would_have(random: Random) -> None:
    """Started again after any system call, the daemon brings every thread to the same place and then rests."""
    converge(random)


def undo(random: Random) -> None:
    host = any_host(random)
    start, policy = any_world(random, host), any_policy(random, host)
    whole = start.copy()
    until_killed(whole, policy, Disk())

    for number in range(len(whole.calls) + 1):
        world, disk = start.copy(), Disk()
        life = until_killed(world, policy, disk, number)
        free(world)
        if random.randrange(2):
            life.start()
        world.crash_before = len(world.calls) + random.randrange(9)
        life.reconciler.domains = world.domains
        with suppress(Killed):
            life.reconciler.release([])
        world.crash_before = -1
        life.start()
        life.run()
        life.reconciler.release([])

        assert world.where() == start.where(), number
        assert disk.ledger.originals == {}
        calls = len(world.calls)
        life.run()
        assert len(world.calls) == calls


def free(world: World) -> None:
    """Let nothing stand in the way of putting threads back, and nobody watch what the law does not bind."""
    world.on_call, world.after_call = lambda _: None, lambda: None
    for task in world.tasks.values():
        task.budget = task.obeys = True
        task.fence = None


@STORIES
@given(random=RANDOM)
def test_release_puts_back_exactly_what_was_there(random: Random) -> None:
    """Wherever the daemon was killed, and release as well, releasing gives each thread back what it had at first."""
    undo(random)


# --- one value from one value ------------------------------------------------------------------------------------


def permute(random: Random) -> None:
    host = any_host(random)
    life = Life(any_world(random, host), any_policy(random, host))
    for _ in range(random.randint(0, 5)):
        live(life, random)
    view, memory, ledger = life.reconciler.view(), life.reconciler.memory, life.reconciler.ledger
    plan = repr(view.plan)
    guests = [replace(each, threads=tuple(shuffled(random, each.threads))) for each in view.snapshot.guests]
    snapshot = replace(view.snapshot, guests=tuple(shuffled(random, guests)))
    other = replace(
        memory,
        places=dict(shuffled(random, memory.places.items())),
        verified=frozenset(shuffled(random, memory.verified)),
        refused=dict(shuffled(random, memory.refused.items())),
    )
    originals = replace(ledger, originals=dict(shuffled(random, ledger.originals.items())))

    again = make(place(life.policy, snapshot, other, originals), snapshot, other)

    assert repr(again) == plan


def shuffled(random: Random, values: Iterable[Any]) -> list[Any]:
    found = list(values)
    random.shuffle(found)
    return found


@STORIES
@given(random=RANDOM)
def test_the_order_of_what_is_seen_changes_nothing(random: Random) -> None:
    """Guests, threads and memories in another order give the same plan, byte for byte."""
    permute(random)

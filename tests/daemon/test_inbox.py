"""The inbox: nothing posted is lost, and every look comes when it is due."""

import os
import signal
import threading
import time

import pytest

from rtpind.daemon.inbox import Backoff, Inbox


class Clock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def inbox(clock):
    """An inbox by the test's clock; only how long it really waits is real."""
    return Inbox(clock)


def test_what_was_posted_is_taken_in_order(inbox):
    """All that is there comes at once, oldest first, and once."""
    for item in (1, 2, 3):
        inbox.post(item)

    assert inbox.wait(60) == [1, 2, 3]
    assert inbox.wait(0) == []


@pytest.mark.parametrize("at_most", [0, -1, -1e9])
def test_no_time_is_no_wait(inbox, at_most):
    """A time that is over means: take what is there."""
    inbox.post(1)

    assert inbox.wait(at_most) == [1]
    assert inbox.wait(at_most) == []


def test_the_wait_ends_with_its_time():
    """Where nothing comes the loop goes on after that time."""
    begun = time.monotonic()

    assert Inbox().wait(0.05) == []
    assert 0.04 < time.monotonic() - begun < 5


def test_another_thread_ends_the_wait(inbox):
    """An item from any thread wakes the loop at once."""
    timer = threading.Timer(0.02, inbox.post, ["x"])
    timer.start()
    begun = time.monotonic()

    assert inbox.wait(60) == ["x"]
    assert time.monotonic() - begun < 10
    timer.join()


def test_a_signal_handler_ends_the_wait(inbox):
    """A handler may post, also while the loop itself waits in the queue."""
    before = signal.signal(signal.SIGUSR1, lambda number, _frame: inbox.post(number))
    timer = threading.Timer(0.02, os.kill, [os.getpid(), signal.SIGUSR1])
    timer.start()
    try:
        found = inbox.wait(60)
    finally:
        timer.join()
        signal.signal(signal.SIGUSR1, before)

    assert found == [signal.SIGUSR1]


def test_a_due_look_ends_the_wait():
    """The loop wakes when a look is due, not when its own time is over."""
    inbox = Inbox()
    inbox.look_in(0.05, "a")
    begun = time.monotonic()

    assert inbox.wait(60) == []
    assert time.monotonic() - begun < 10
    assert inbox.take_due() == {"a"}


def test_a_look_that_is_overdue_does_not_wait(inbox, clock):
    """What should have been looked at is not put off further."""
    inbox.look_in(1, "a")
    clock.now += 5
    begun = time.monotonic()

    assert inbox.wait(60) == []
    assert time.monotonic() - begun < 10
    assert inbox.take_due() == {"a"}


def test_each_guest_is_due_at_its_time(inbox, clock):
    """Looks are taken when their time has come, each once."""
    for seconds, guest in ((2, "b"), (1, "a"), (3, "c"), (1, "d")):
        inbox.look_in(seconds, guest)

    taken = []
    for _ in range(4):
        taken.append(inbox.take_due())
        clock.now += 1

    assert taken == [set(), {"a", "d"}, {"b"}, {"c"}]
    assert inbox.take_due() == set()


def test_an_earlier_look_is_enough(inbox, clock):
    """A later look is left out where one is due before; an earlier one is added."""
    inbox.look_in(1, "a")
    inbox.look_in(2, "a")
    inbox.look_in(0.5, "a")
    clock.now += 0.5
    first = inbox.take_due()
    clock.now += 0.5
    second = inbox.take_due()
    clock.now += 10

    assert (first, second, inbox.take_due()) == ({"a"}, {"a"}, set())


def test_a_look_in_a_moment_does_not_replace_one_much_later(inbox, clock):
    """What begins late after an event is still looked for, although there was a look at once."""
    for seconds in (0.0, 0.05, 5.0):
        inbox.look_in(seconds, "a")
    taken = []
    for seconds in (0.0, 0.05, 1.0, 4.0):
        clock.now += seconds
        taken.append(inbox.take_due())

    assert taken == [{"a"}, {"a"}, set(), {"a"}]


def test_a_flood_of_events_is_a_handful_of_looks(inbox, clock):
    """A guest that changes all the time does not fill the timetable."""
    for _ in range(10_000):
        for seconds in (0.0, 0.05, 0.25, 1.0, 5.0):
            inbox.look_in(seconds, "noisy")
        clock.now += 0.0001

    assert len(inbox._due) < 100


def test_nothing_posted_by_many_is_lost(inbox):
    """Items of many threads all arrive, those of each in its order."""
    threads = [
        threading.Thread(target=lambda name=name: [inbox.post((name, n)) for n in range(500)]) for name in range(8)
    ]
    for thread in threads:
        thread.start()
    found = []
    while len(found) < 4000:
        items = inbox.wait(10)
        assert items
        found += items
    for thread in threads:
        thread.join()

    for name in range(8):
        assert [n for who, n in found if who == name] == list(range(500))


def test_what_fails_again_waits_longer_until_there_was_a_calm(clock):
    """Twice as long each time, never longer than asked for, and from the beginning after a quiet minute."""
    backoff = Backoff(clock)
    waits = []
    for _ in range(6):
        waits.append(backoff.next_s(10.0))
        clock.now += waits[-1]
    clock.now += 61

    assert waits == [1, 2, 4, 8, 10, 10]
    assert [backoff.next_s(0.5), backoff.next_s(10.0)] == [0.5, 1]

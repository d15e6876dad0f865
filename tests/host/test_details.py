# SPDX-License-Identifier: GPL-2.0-or-later
"""The queue of guests whose definition is asked for: who goes first, who is tried again, and what is told."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
from trees import until

from rtpind.core.cpuset import CpuSet
from rtpind.core.model import Traits
from rtpind.host.details import Definition, Described, Details

P, Q = (100, 1), (200, 2)
XML = "<domain><resource><partition>/rt</partition></resource></domain>"
TRAITS = Traits(partition="/rt")


class Libvirt:
    """Answers when the test lets it: each call takes the next answer, which may be an error."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.posts: list[Described] = []

    def fetch(self, uuid: str) -> Definition | None:
        self.calls.append(uuid)
        answer = self.answers.get(timeout=30)
        if isinstance(answer, Exception):
            raise answer
        return None if answer is None else Definition(*answer) if isinstance(answer, tuple) else Definition(answer)

    def say(self, *answers: Any) -> None:
        for answer in answers:
            self.answers.put(answer)


@pytest.fixture
def libvirt() -> Libvirt:
    return Libvirt()


@pytest.fixture
def start(libvirt: Libvirt) -> Iterator[Callable[..., Details]]:
    """Make details that run; stops them after the test."""
    made: list[Details] = []

    def make(**options: Any) -> Details:
        made.append(Details(libvirt.fetch, libvirt.posts.append, **options))
        made[-1].start()
        return made[-1]

    yield make
    for one in made:
        one.stop()
    libvirt.say(*[None] * 20)
    until(lambda: not any(one.name == "libvirt-details" for one in threading.enumerate()), "the threads have ended")


def test_what_is_asked_for_is_told_with_whom_it_was_asked_of(libvirt: Libvirt, start: Callable[..., Details]) -> None:
    """The answer carries the process, and nothing is asked for that nobody wished."""
    details = start()
    libvirt.say(XML)
    details.ask("a", P)
    until(lambda: libvirt.posts, "an answer")

    assert libvirt.posts == [Described("a", P, TRAITS)]
    assert libvirt.calls == ["a"]


def test_the_nodes_that_libvirt_chose_are_told_too(libvirt: Libvirt, start: Callable[..., Details]) -> None:
    """They do not stand in the XML; a list that is none makes the definition unreadable."""
    details = start()
    libvirt.say((XML, "1"), (XML, "auto"))
    details.ask("a", P)
    until(lambda: len(libvirt.posts) == 1, "an answer")
    details.ask("b", P)
    until(lambda: len(libvirt.posts) == 2, "another answer")

    assert libvirt.posts[0] == Described("a", P, replace(TRAITS, nodes=CpuSet([1])))
    assert libvirt.posts[1].unreadable


def test_wishes_before_the_answer_are_one(libvirt: Libvirt, start: Callable[..., Details]) -> None:
    """However many events there are; but one that comes while libvirt is being asked is asked about again."""
    details = start()
    details.ask("a", P)
    until(lambda: libvirt.calls, "it is asked")
    details.ask("a", P)
    details.ask("b", P)
    details.ask("a", Q)
    libvirt.say(XML, XML, XML)
    until(lambda: len(libvirt.posts) == 3, "three answers")

    assert libvirt.calls[0] == "a"
    assert sorted(libvirt.calls[1:]) == ["a", "b"]
    assert [post.process for post in libvirt.posts if post.uuid == "a"] == [P, Q]


def test_a_failure_is_told_once_and_tried_again(libvirt: Libvirt, start: Callable[..., Details]) -> None:
    """Until it succeeds; each attempt is no news."""
    details = start(backoff_s=(0.0,))
    libvirt.say(OSError("busy"), OSError("busy"), OSError("busy"), XML)
    details.ask("a", P)
    until(lambda: len(libvirt.posts) == 2, "an answer")

    assert libvirt.posts == [Described("a", P, None, "busy"), Described("a", P, TRAITS)]
    assert libvirt.calls == ["a"] * 4


def test_the_pauses_grow(libvirt: Libvirt, start: Callable[..., Details]) -> None:
    """The second attempt waits for the first pause, the third and all others for the last."""
    now = 1000.0
    details = start(backoff_s=(5.0, 60.0), clock=lambda: now)
    libvirt.say(OSError("busy"))
    details.ask("a", P)
    until(lambda: libvirt.posts, "it has failed")
    until(lambda: details._wishes, "it waits")
    assert details._wishes["a"].due - now == 5.0
    for failures in (1, 2):
        with details._news:
            wish = details._wishes["a"]
            assert wish.failures == failures
            now = wish.due
            libvirt.say(OSError("busy"))
            details._news.notify()
        until(lambda failures=failures: "a" in details._wishes and details._wishes["a"].failures > failures, "again")
        assert details._wishes["a"].due - now == 60.0


def test_who_was_never_asked_about_goes_before_who_failed(libvirt: Libvirt, start: Callable[..., Details]) -> None:
    """A guest that libvirt is busy with holds up the others for the one call that is under way."""
    details = start(backoff_s=(0.0,))
    details.ask("busy", P)
    until(lambda: libvirt.calls, "it is asked")
    for name in ("one", "two", "three"):
        details.ask(name, P)
    libvirt.say(OSError("busy"), XML, XML, XML, XML)
    until(lambda: len(libvirt.posts) == 5, "everybody has an answer")

    assert libvirt.calls == ["busy", "one", "two", "three", "busy"]


def test_who_failed_waits_for_who_came_later(libvirt: Libvirt, start: Callable[..., Details]) -> None:
    """However long it has been due."""
    details = start(backoff_s=(0.0,))
    details.ask("busy", P)
    details.ask("long", P)
    libvirt.say(OSError("busy"))
    until(lambda: "long" in libvirt.calls, "the next is asked")
    details.ask("late", P)
    libvirt.say(XML, XML, XML)
    until(lambda: len(libvirt.posts) == 4, "everybody has an answer")

    assert libvirt.calls == ["busy", "long", "late", "busy"]


def test_a_failure_does_not_put_off_a_new_wish(libvirt: Libvirt, start: Callable[..., Details]) -> None:
    """Who wished anew while libvirt was being asked is asked about at once."""
    details = start(backoff_s=(3600.0,))
    details.ask("a", P)
    until(lambda: libvirt.calls, "it is asked")
    details.ask("a", Q)
    libvirt.say(OSError("busy"), XML)
    until(lambda: len(libvirt.posts) == 2, "an answer")

    assert libvirt.posts[1] == Described("a", Q, TRAITS)


def test_a_new_wish_ends_the_pause(libvirt: Libvirt, start: Callable[..., Details]) -> None:
    """An event says that something has happened: it is asked at once, and counts as new."""
    details = start(backoff_s=(3600.0,))
    libvirt.say(OSError("busy"), XML)
    details.ask("a", P)
    until(lambda: libvirt.posts, "it has failed")
    details.ask("a", Q)
    until(lambda: len(libvirt.posts) == 2, "an answer")

    assert libvirt.posts[1] == Described("a", Q, TRAITS)


def test_a_domain_that_is_gone_has_no_answer(libvirt: Libvirt, start: Callable[..., Details]) -> None:
    """Neither an answer nor another attempt."""
    details = start(backoff_s=(0.0,))
    libvirt.say(None, XML)
    details.ask("gone", P)
    until(lambda: libvirt.calls, "it is asked")
    details.ask("a", P)
    until(lambda: libvirt.posts, "an answer")

    assert libvirt.calls == ["gone", "a"]
    assert [post.uuid for post in libvirt.posts] == ["a"]


@pytest.mark.parametrize("text", ["", "no XML", "<domain><cputune><vcpupin/></cputune></domain>"])
def test_a_definition_that_makes_no_sense_is_told_and_not_asked_for_again(
    libvirt: Libvirt, start: Callable[..., Details], text: str
) -> None:
    """The same text would say the same."""
    details = start(backoff_s=(0.0,))
    libvirt.say(text, XML)
    details.ask("odd", P)
    until(lambda: libvirt.posts, "an answer")
    details.ask("a", P)
    until(lambda: len(libvirt.posts) == 2, "another answer")

    assert (libvirt.posts[0].traits, libvirt.posts[0].unreadable) == (None, True)
    assert libvirt.posts[0].trouble
    assert libvirt.calls == ["odd", "a"]


def test_stopping_waits_for_nothing(libvirt: Libvirt, start: Callable[..., Details]) -> None:
    """While libvirt is being asked, stopping returns; the thread ends with its call."""
    details = start()
    details.ask("a", P)
    until(lambda: libvirt.calls, "it is asked")
    details.stop()
    details.ask("b", P)
    libvirt.say(XML)
    until(lambda: not any(one.name == "libvirt-details" for one in threading.enumerate()), "the thread has ended")

    assert libvirt.calls == ["a"]

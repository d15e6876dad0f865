# SPDX-License-Identifier: GPL-2.0-or-later
"""How an operator takes rtpind into use: observe, plan, enforce; and edits the policy later."""

from __future__ import annotations

import pytest

from lab.scene import Scene, policy

pytestmark = pytest.mark.lab("bookworm-rt")


@pytest.mark.smoke
def test_observe_then_plan_then_enforce(scene: Scene) -> None:
    """As shipped nothing is touched; plan says what would be; after a reload that is how it is."""
    shipped = scene.read_shipped_policy()
    guests = scene.guests("one", "two", vcpus=2, iothreads=1)
    before = [guest.places() for guest in guests]
    scene.start(shipped)
    scene.passes()
    assert scene.ctl("verify").code == 0

    scene.write_policy(policy(("rt-*", "realtime"), mode="observe"))
    scene.run("systemctl reload rtpind")
    scene.wait_for(lambda: scene.count("read again, observe"), "the policy is read")
    plan = scene.ctl("plan")
    scene.passes()

    assert plan.code == 0
    assert all(guest.name in plan.out for guest in guests)
    assert [guest.moved(places) for guest, places in zip(guests, before, strict=True)] == [[], []]

    scene.write_policy(policy(("rt-*", "realtime")))
    scene.run("systemctl reload rtpind")
    scene.wait_for(lambda: scene.alone(guests), "each vCPU is alone on its pCPU at FIFO")
    scene.wait_verified()
    own = scene.host.call("threads", pid=scene.pid())
    assert {tuple(thread["cpus"]) for thread in own} == {scene.housekeeping}


def test_a_bad_policy_is_refused_and_a_good_one_taken(scene: Scene) -> None:
    """Reload fails on a bad file and nothing changes; a good file that gives the guest up leaves it as it is."""
    (guest,) = scene.guests("one")
    scene.start(policy(("rt-*", "realtime")))
    scene.wait_for(lambda: scene.alone([guest]), "the vCPU is alone on its pCPU at FIFO")
    before, pid = guest.places(), scene.pid()

    scene.write_policy(policy(("rt-*", "no-such-class")))
    done = scene.run("systemctl reload rtpind", check=False)

    assert done.code != 0
    assert scene.ctl("check-config").code == 78
    scene.passes()
    assert (guest.moved(before), scene.pid()) == ([], pid)

    scene.write_policy(policy(("other-*", "realtime")))
    scene.run("systemctl reload rtpind")
    scene.wait_for(lambda: scene.count("read again, enforce"), "the policy is read")
    scene.passes()
    assert guest.moved(before) == []
    verdicts = {thread["verdict"] for thread in scene.verdicts(guest)}
    assert verdicts == {"unclaimed"}


def test_a_service_with_a_bad_policy_does_not_start(scene: Scene) -> None:
    """It ends with 78 and is not started again and again."""
    scene.write_policy("version: 1\nmode: sometimes\n")

    assert scene.run("systemctl start rtpind", check=False).code != 0

    assert scene.run("systemctl show -P ExecMainStatus,ActiveState rtpind").out.split() == ["78", "failed"]

# SPDX-License-Identifier: GPL-2.0-or-later
"""The operator's section of the README, word for word: install, observe, plan, one guest, all."""

from __future__ import annotations

import re

import pytest

from lab.host import ROOT
from lab.product import PACKAGE, push_package
from lab.scene import Scene

pytestmark = [
    pytest.mark.lab("bookworm-rt", "trixie-rt"),
    pytest.mark.skipif(PACKAGE is None, reason="RTPIND_LAB_DEB names no package"),
]

RULE = '  # - {name: "rt-*", class: realtime}'


def steps() -> dict[str, list[str]]:
    """Return the commands of each step of "Use it", without their comments."""
    section = (ROOT / "README.md").read_text().partition("## Use it\n")[2].partition("\n## ")[0]
    found: dict[str, list[str]] = {}
    for title, body in re.findall(r"^\d\. \*\*([^.*]+)\.\*\*(.*?)(?=^\d\. |\Z)", section, re.MULTILINE | re.DOTALL):
        blocks = re.findall(r"```console\n(.*?)```", body, re.DOTALL)
        lines = (line.partition("#")[0].strip() for block in blocks for line in block.splitlines())
        found[title] = [line for line in lines if line]
    return found


def edit(scene: Scene, old: str, new: str) -> None:
    """Change one place of the policy, as an operator does with an editor."""
    text = scene.host.read("/etc/rtpind.yaml")
    assert text.count(f"{old}\n") + text.count(f"{old} ") == 1, old
    scene.write_policy(text.replace(old, new))


@pytest.mark.smoke
def test_the_operators_section(scene: Scene) -> None:
    """Each command succeeds; until "enforce" no thread changes, then those of one guest do, then those of all."""
    said = steps()
    assert list(said) == ["Install", "Observe", "Plan", "Enforce, for one guest", "All guests"]
    assert PACKAGE is not None
    scene.run("apt-get -y -q purge rtpind", timeout_s=300)
    push_package(scene.host, PACKAGE)
    one, other = scene.guests("plc", "other")
    before = one.places(), other.places()

    def do(step: str) -> str:
        return "".join(scene.run(f"cd /root && {command}", timeout_s=300).out for command in said[step])

    do("Install")
    assert scene.run("systemctl is-active rtpind", check=False).out.strip() == "inactive"
    assert scene.run("systemctl is-enabled rtpind", check=False).out.strip() == "disabled"

    edit(scene, RULE, '  - {name: "rt-plc", class: realtime}')
    do("Observe")
    would = said["Observe"][-1]
    scene.wait_for(lambda: one.name in scene.run(would, check=False).out, "what it would do is in the journal")
    assert other.name not in scene.run(would).out
    assert one.name in do("Plan")
    scene.passes()
    assert (one.moved(before[0]), other.moved(before[1])) == ([], [])

    edit(scene, "mode: observe", "mode: enforce")
    reload, status, verify = said["Enforce, for one guest"]
    scene.run(reload)
    scene.wait_for(lambda: scene.alone([one]), "the one guest is placed")
    assert "placed, class realtime" in scene.run(status).out
    scene.wait_for(lambda: scene.run(verify, check=False).code == 0, "verify agrees")
    assert other.moved(before[1]) == []
    assert "`rtpinctl release rt-plc`" in (ROOT / "README.md").read_text()
    scene.run("rtpinctl release rt-plc && rtpinctl manage rt-plc")
    scene.wait_for(lambda: scene.alone([one]), "the one guest is placed again")

    edit(scene, '{name: "rt-plc", class: realtime}', '{name: "rt-*", class: realtime}')
    reload, verify = said["All guests"]
    scene.run(reload)
    scene.wait_for(lambda: scene.alone([one, other]), "all guests are placed")
    scene.wait_for(lambda: scene.run(verify, check=False).code == 0, "verify agrees")
    scene.run("systemctl disable rtpind")

# SPDX-License-Identifier: GPL-2.0-or-later
"""``rtpinctl capacity`` and ``plan --guest-shape``: what fits, on this host and on others."""

import factories
import pytest

from rtpind.ctl import show
from rtpind.daemon import report

SCHEMES = """\
version: 1
pools: {housekeeping: 0, realtime: 1-3}
classes:
  shared:
    vcpu: {pool: realtime, exclusive: thread, scheduler: fifo}
  web: {vcpu: {pool: housekeeping}}
guests:
  - {name: "no-such-guest-*", class: shared}
"""


@pytest.fixture
def schemes(tmp_path):
    path = tmp_path / "schemes.yaml"
    path.write_text(SCHEMES)
    path.chmod(0o644)
    return path


def test_what_fits_on_a_host_of_another_shape(run_json, schemes):
    """A row for each class and size, by the policy, on a host that need not exist."""
    code, document, _ = run_json("capacity", "capacity", "--policy", schemes, "--shape", "1x4x1", "--vcpus", "1-3")

    rows = {(row["class"], row["vcpus"]): (row["guests"], row["realtime_vcpus"]) for row in document["rows"]}
    assert code == 0
    assert rows == {
        ("shared", 1): (3, 3), ("shared", 2): (1, 2), ("shared", 3): (1, 3),
        ("web", 1): (None, 0), ("web", 2): (None, 0), ("web", 3): (None, 0),
    }  # fmt: skip


def test_what_fits_is_shown_as_a_table(run, schemes):
    """For people: what limits it stands beside it."""
    code, out, _ = run("capacity", "--config", schemes, "--shape", "1x4", "--vcpus", "2")

    assert code == 0
    assert out.splitlines()[1].split(None, 4) == ["shared", "2", "1", "2", "no free pCPU in 'realtime' for vcpu 1"]
    assert out.splitlines()[2].split(None, 4)[:4] == ["web", "2", "any", "0"]


def test_what_fits_on_this_host(run_json, tmp_path):
    """By this host's own pCPUs, with and without what runs on it."""
    path = tmp_path / "policy.yaml"
    path.write_text(
        "version: 1\npools: {own: 1, housekeeping: 0}\nclasses: {c: {vcpu: {pool: own, exclusive: thread}}}\n"
    )
    path.chmod(0o644)

    for schema, *words in (("capacity",), ("capacity-running", "--running")):
        code, document, _ = run_json(schema, "capacity", "--config", path, "--vcpus", "1,2", *words)
        assert code == 0
        assert [row["vcpus"] for row in document["rows"]] == [1, 2]
        assert document["rows"][1]["guests"] == 0
    assert [(row["running"], row["running_realtime_vcpus"]) for row in document["rows"]] == [(0, 0)] * 2
    assert document["rows"][0]["guests"] in (0, 1)  # somebody may be pinned there


def test_what_runs_is_shown_beside_what_fits(run, policy):
    """For people: what is there, and how many more."""
    code, out, _ = run("capacity", "--config", policy, "--vcpus", "1", "--running")

    assert code == 0
    assert "running realtime more guests realtime vCPUs" in " ".join(out.splitlines()[0].split())
    assert out.splitlines()[1].split(None, 4)[:5] == ["calm", "1", "0", "0", out.splitlines()[1].split(None, 4)[4]]


def test_what_is_not_given_out_is_shown_once_for_whom():
    """Whose threads are narrowed to it, and all the pCPUs of them; without a policy what is isolated counts."""
    busy = {2: "ptp4l (812)", 4: "dpdk (99)", 5: "dpdk (99)", 0: "cron (1)"}
    document = report.blocked(factories.host(busy=busy), None, None)

    assert document == {"2": "busy: ptp4l (812)", "4": "busy: dpdk (99)", "5": "busy: dpdk (99)"}
    assert show.blocked(document) == [("pCPU 2", "busy: ptp4l (812)"), ("pCPU 4-5", "busy: dpdk (99)")]


def test_parts_of_a_socket_can_be_told(run_json, tmp_path):
    """With numa: strict a guest is on one node: each of four nodes has seven or eight free pCPUs, so five fit once."""
    path = tmp_path / "policy.yaml"
    path.write_text(
        "version: 1\npools: {own: {cpus: isolated, numa: strict}}\n"
        "classes: {c: {vcpu: {pool: own, exclusive: thread}}}\n"
    )
    path.chmod(0o644)

    for parts, guests in (("", 6), (",nodes=4", 4), (",l3=8,dies=2,nodes=2", 6)):
        _, document, _ = run_json("capacity", "capacity", "--config", path, "--shape", f"1x32x1{parts}", "--vcpus", 5)
        assert document["rows"][0]["guests"] == guests


def test_a_policy_that_does_not_fit_the_shape_is_a_problem(run, schemes):
    """The file is checked against the host that is asked about."""
    code, out, err = run("capacity", "--config", schemes, "--shape", "1x2x1")

    assert (code, out) == (78, "")
    assert "pools.realtime: this host cannot have pCPU 2-3" in err


def test_no_policy_is_said(run, tmp_path):
    """A file that is not there."""
    code, _, err = run("capacity", "--config", tmp_path / "none.yaml")

    assert code == 78
    assert "none.yaml" in err


def test_isolation_can_be_told(run_json, tmp_path):
    """A pool of what is isolated, on a host that is not there."""
    path = tmp_path / "policy.yaml"
    path.write_text("version: 1\npools: {own: isolated}\nclasses: {c: {vcpu: {pool: own, exclusive: thread}}}\n")
    path.chmod(0o644)

    for isolated, guests in (([], 7), (["--isolated", "4-7"], 4)):
        _, document, _ = run_json("capacity", "capacity", "--config", path, "--shape", "1x8", "--vcpus", 1, *isolated)
        assert document["rows"][0]["guests"] == guests


@pytest.mark.parametrize(
    "words",
    [
        ["--shape", "4"],
        ["--shape", "0x4"],
        ["--shape", "99x999x8"],
        ["--shape", "2x8x2,l3=3"],
        ["--shape", "2x8x2,l4=2"],
        ["--shape", "2x8x2,nodes=0"],
        ["--vcpus", "0"],
        ["--vcpus", "x"],
        ["--vcpus", ""],
        ["--vcpus", "9999"],
        ["--isolated", "3-1"],
    ],
)
def test_words_that_mean_nothing_are_refused(run, words):
    """Usage errors end with 2 and name the word."""
    code, _, err = run("capacity", *words)

    assert code == 2
    assert words[0] in err


def test_where_one_more_guest_would_go(run_json, run, tmp_path):
    """A guest that is not there is placed beside those that are; no class of that name is an error."""
    path = tmp_path / "policy.yaml"
    path.write_text(
        "version: 1\npools: {own: 1, housekeeping: 0}\n"
        "classes: {c: {vcpu: {pool: own, exclusive: thread}}}\nwhen_full: degrade\n"
    )
    path.chmod(0o644)

    code, document, _ = run_json("guest-shape", "plan", "--config", path, "--guest-shape", "c:2+1x2")

    assert code == 0
    assert (document["class"], document["state"]) == ("c", "degraded")
    assert "no free pCPU in 'own' for vcpu" in document["reason"]
    assert [(thread["role"], thread["index"]) for thread in document["threads"]] == [
        ("vcpu", 0), ("vcpu", 1), ("emulator", None), ("iothread", 1),
    ]  # fmt: skip
    code, out, _ = run("plan", "--config", path, "--guest-shape", "c:1")
    assert code == 0
    assert out.startswith("one more guest of class c: ")
    code, _, err = run("plan", "--config", path, "--guest-shape", "d:1")
    assert (code, "there is no class 'd'" in err) == (1, True)
    assert run("plan", "--config", path, "--guest-shape", "two")[0] == 2

"""Each command of rtpinctl in this process: exit code, document, and what it says where something is missing."""

import json
import os
import re
import stat
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from documents import POLICY, validate
from trees import until

from rtpind import __version__
from rtpind.core.ledger import EVERYONE, HandsOff
from rtpind.ctl import main as ctl_main
from rtpind.ctl.look import URI, running
from rtpind.daemon.observe import Observer
from rtpind.host.hypervisor import list_once
from rtpind.host.ledgerfile import LedgerFile

ROOT = Path(__file__).resolve().parents[2]
NOWHERE = "qemu+unix:///system?socket=/nonexistent"
#: Commands that need a policy, with what they need besides.
WITH_POLICY = [["plan"], ["explain", "some-guest"]]


@pytest.fixture
def bad(tmp_path):
    """A policy file with two problems."""
    path = tmp_path / "bad.yaml"
    path.write_text(POLICY.replace("class: calm", "class: clam").replace("version: 1", "version: 2"))
    path.chmod(0o644)
    return path


@pytest.fixture
def lonely(tmp_path):
    """A policy whose libvirt is not there."""
    path = tmp_path / "lonely.yaml"
    path.write_text(POLICY + f'daemon: {{uri: "{NOWHERE}"}}\n')
    path.chmod(0o644)
    return path


def test_status_needs_neither_daemon_nor_policy(run_json, run, tmp_path):
    """It looks by itself, says so, and leaves nothing behind."""
    none = tmp_path / "none.yaml"
    code, document, _ = run_json("status", "status", "--config", none)

    assert (code, document["daemon"], document["policy"]) == (0, None, False)
    assert document["host"]["kernel"] == os.uname().release
    assert os.listdir(tmp_path) == []
    code, out, _ = run("status", "--config", none)
    assert code == 0
    assert "not running" in out.splitlines()[1]


def test_a_daemon_that_waits_for_libvirt_is_told_of(run_json, run, daemon, policy):
    """It runs, and knows of no guest yet: the look is our own, by its policy."""
    about = {"pid": 7, "mode": "enforce", "policy": str(policy), "libvirt": "away", "passes": 0, "faults": 0}
    daemon({"error": "libvirt has not answered yet", "daemon": about})

    code, document, err = run_json("status", "status")

    assert (code, document["daemon"], document["policy"], err) == (0, about, True, "")
    assert document["host"]["kernel"] == os.uname().release
    assert "enforce, pid 7, libvirt away" in run("status")[1].splitlines()[1]
    assert run("verify")[0] == 0  # by the same policy, which has no guest here


def test_a_daemon_that_does_not_tell_is_said_to_be_there(run_json, daemon):
    """A busy one, or one with a fault: the look is our own, and that is said."""
    daemon({"error": "the daemon is busy"})

    code, document, err = run_json("status", "status")

    assert (code, document["daemon"]) == (0, None)
    assert err == "rtpinctl: the daemon does not tell (the daemon is busy); this is a look of rtpinctl's own\n"


def test_status_by_a_policy_judges(run_json, policy):
    """With a policy the document says so, and every guest has a state."""
    code, document, err = run_json("status", "status", "--config", policy)

    assert (code, document["policy"], err) == (0, True, "")
    assert {guest["state"] for guest in document["guests"]} <= {"unmanaged"}


def test_status_with_a_bad_policy_still_shows_the_host(run_json, bad):
    """The file's problems are counted on stderr, and the look is one without a policy."""
    code, document, err = run_json("status", "status", "--config", bad)

    assert (code, document["policy"]) == (0, False)
    assert err == "rtpinctl: the policy file has 2 problems and is not used here (rtpinctl check-config)\n"


@pytest.mark.parametrize("words", [["status"], ["explain"]])
def test_a_guest_that_does_not_run_is_an_error(run, policy, words):
    """Exit 1, and nothing on stdout that a program could take for an answer."""
    for more in ([], ["--json"]):
        code, out, err = run(*words, "no-such-guest", "--config", policy, *more)
        assert (code, out) == (1, "")
        assert err == "rtpinctl: no running guest is called no-such-guest\n"


def test_check_config_lists_nothing_of_a_good_file(run, run_json, policy):
    """Exit 0 and a line that says what the file does."""
    assert run("check-config", policy) == (0, f"{policy}: good, mode observe, 1 rules\n", "")
    assert run_json("check-config", "check-config", policy) == (
        0,
        {"version": 1, "ok": True, "problems": []},
        "",
    )


def test_check_config_lists_every_problem(run, run_json, bad):
    """Exit 78, each problem with its file, line, keys and cure; as text and as JSON the same."""
    code, out, _ = run("check-config", bad)
    also, document, _ = run_json("check-config", "check-config", bad)

    assert (code, also, document["ok"]) == (78, 78, False)
    assert [(row["line"], row["path"]) for row in document["problems"]] == [(1, "version"), (6, "guests[0].class")]
    assert out.splitlines() == [
        f"{row['file']}:{row['line']}: {row['path']}: {row['message']}" + (f" ({row['hint']})" if row["hint"] else "")
        for row in document["problems"]
    ]


def test_check_config_tells_warnings_apart(run_json, policy):
    """A warning is listed, and the file is good."""
    policy.write_text(POLICY.replace("pools: {", "pools: {empty: '7,^7', "))
    code, document, _ = run_json("check-config", "check-config", policy)

    severities = [row["severity"] for row in document["problems"] if "empty" in row["message"]]
    assert severities == ["warning"]
    assert (code == 0) is document["ok"]


@pytest.mark.parametrize("kind", ["missing", "folder", "fifo", "not text"])
def test_check_config_of_what_is_no_policy_file(run_json, tmp_path, kind):
    """A file that cannot be read is one problem, said at once."""
    path = tmp_path / "odd"
    if kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "not text":
        path.write_bytes(b"version: \xff\n")
    code, document, _ = run_json("check-config", "check-config", path)

    assert (code, len(document["problems"])) == (78, 1)


def test_plan_shows_what_a_daemon_would_do(run, run_json, policy):
    """By a policy that touches nobody there is nothing to do, and every guest is listed."""
    code, document, _ = run_json("plan", "plan", "--config", policy)

    assert (code, document["steps"]) == (0, [])
    assert run("plan", "--config", policy) == (
        0,
        "nothing to do: every managed thread is where the policy wants it\n",
        "",
    )


@pytest.mark.parametrize("words", WITH_POLICY)
@pytest.mark.parametrize("json_", [[], ["--json"]])
def test_without_a_good_policy_there_is_no_plan(run, bad, tmp_path, words, json_):
    """Exit 78, the problems on stderr, and stdout stays empty for programs."""
    code, out, err = run(*words, "--config", bad, *json_)
    missing, nothing, why = run(*words, "--config", tmp_path / "none", *json_)

    assert (code, out, len(err.splitlines())) == (78, "", 2)
    assert (missing, nothing, "No such file" in why) == (78, "", True)


@pytest.mark.parametrize("words", [["plan"], ["verify"], ["status"]])
def test_a_libvirt_that_does_not_answer_is_done_without(run_json, lonely, words):
    """The guests are then those whose QEMU holds its pid file."""
    code, document, _ = run_json(words[0], *words, "--config", lonely)
    known = list_once(URI)

    assert code == 0
    if known is not None and "guests" in document:
        assert {guest["name"] for guest in document["guests"]} <= {domain.name for domain in known}


def test_the_guests_are_the_same_with_and_without_libvirt():
    """On the real host: pid files and command lines tell the same names and UUIDs."""
    observer = Observer()
    if not running(observer):
        pytest.skip("no guest runs on this host")

    until(lambda: running(observer) == running(observer, NOWHERE), "both agree (guests may come and go)")


def test_verify_says_ok_or_lists(run, run_json, policy):
    """Exit 0 where every managed thread is in its place, which is so where none is managed."""
    assert run_json("verify", "verify", "--config", policy) == (0, {"version": 1, "ok": True, "threads": []}, "")
    assert run("verify", "--config", policy) == (0, "ok: 0 managed threads are where the policy wants them\n", "")


@pytest.mark.parametrize("json_", [[], ["--json"]])
def test_verify_without_a_policy_is_not_good(run, bad, tmp_path, json_):
    """Exit 1: nothing was verified."""
    for path in (bad, tmp_path / "none"):
        code, out, err = run("verify", "--config", path, *json_)
        assert (code, out) == (1, "")
        assert "no policy to verify against" in err


def test_the_daemon_is_asked_first(made, daemon, run_json, tmp_path):
    """Status and verify show what the daemon answers; with a policy named it is not asked."""
    asked = daemon({"ok": made.status()})
    _, document, _ = run_json("status", "status")
    code, verified, _ = run_json("verify", "verify")

    assert document == made.status()
    assert (code, verified["ok"]) == (1, False)
    assert {thread["guest"] for thread in verified["threads"]} >= {"rt-1"}
    run_json("status", "status", "--config", tmp_path / "none")
    assert asked == [{"do": "status"}, {"do": "status"}]


def test_the_daemon_explains(made, daemon, run_json, run):
    """The daemon's explanation is shown as it is, and so is its refusal."""
    asked = daemon({"ok": made.explain()})
    code, document, _ = run_json("explain", "explain", "rt-1")

    assert (code, document) == (0, made.explain())
    assert asked == [{"do": "explain", "guests": ["rt-1"]}]
    code, out, _ = run("explain", "rt-1")
    assert code == 0
    assert "line 10: guests[0] name=rt-* → realtime: matches" in out


@pytest.mark.parametrize(
    "words", [["explain", "x"], ["release", "x"], ["release", "--all"], ["manage"], ["pause", "x", "--for", "1h"]]
)
def test_what_the_daemon_refuses_is_an_error(daemon, run, words):
    """Exit 1 with the daemon's own words, and nothing on stdout."""
    daemon({"error": "because \x1b[31m"})

    for more in ([], ["--json"]):
        assert run(*words, *more) == (1, "", "rtpinctl: because \ufffd[31m\n")


@pytest.mark.parametrize(
    ("words", "request_"),
    [
        (["release", "a", "b"], {"do": "release", "guests": ["a", "b"]}),
        (["release", "--all"], {"do": "release", "guests": []}),
        (["manage"], {"do": "manage", "guests": []}),
        (["manage", "a"], {"do": "manage", "guests": ["a"]}),
        (["pause"], {"do": "pause", "guests": [], "seconds": None}),
        (["pause", "a", "--for", "90s"], {"do": "pause", "guests": ["a"], "seconds": 90.0}),
        (["pause", "--for", "2d"], {"do": "pause", "guests": [], "seconds": 172800.0}),
    ],
)
def test_the_daemon_does_what_was_asked(daemon, run, run_json, words, request_):
    """The request says who and for how long; the answer is shown guest by guest."""
    asked = daemon({"ok": {"version": 1, "guests": {"a": "done"}}})

    assert run_json("hands", *words) == (0, {"version": 1, "guests": {"a": "done"}}, "")
    assert run(*words) == (0, "a: done\n", "")
    assert asked == [request_, request_]


@pytest.mark.parametrize(
    ("words", "spared"),
    [
        (["status"], ["libvirt", "jsonschema"]),
        (["manage"], ["libvirt", "jsonschema"]),
        (["check-config", str(ROOT / "etc/rtpind.yaml")], ["libvirt", "systemd"]),
    ],
)
def test_a_command_loads_what_it_needs(made, daemon, tmp_path, words, spared):
    """Half of the time of a command is its start: what only others need is left out where a daemon answers."""
    daemon({"ok": made.status() if words == ["status"] else {"guests": {}}})
    words = [words[0], "--state-dir", str(tmp_path), *words[1:]]
    script = f"import sys; from rtpind.ctl.main import main; main({words!r}); print(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)

    assert not set(spared) & set(done.stderr.split())


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("released, 3 changes", 0),
        ("not released: the ledger cannot be written", 1),
        ("released, but not every thread could be put back (see the journal)", 1),
    ],
)
def test_what_was_not_done_is_an_exit_code(daemon, run, text, code):
    """One guest that could not be put back is enough."""
    daemon({"ok": {"version": 1, "guests": {"a": "released, 0 changes", "b": text}}})

    assert run("release", "--all") == (code, f"a: released, 0 changes\nb: {text}\n", "")


def test_without_a_daemon_a_pause_is_written_down(run_json, tmp_path):
    """A pause of all is kept for the next daemon, and ends with manage; no thread is touched."""
    code, document, _ = run_json("hands", "pause", "--for", "1h")
    paused, _ = LedgerFile(tmp_path).read()
    also, back, _ = run_json("hands", "manage")

    assert (code, also) == (0, 0)
    assert set(document["guests"].values()) == {"paused"}
    assert set(back["guests"].values()) == {"managed"}
    assert paused.hands_off[EVERYONE].kind is HandsOff.PAUSED
    assert paused.originals == {}
    assert LedgerFile(tmp_path).read()[0].hands_off == {}


@pytest.mark.parametrize("words", [["release"], ["manage"], ["pause"]])
def test_without_a_daemon_an_unknown_guest_is_an_error(run, tmp_path, words):
    """Exit 1; the lock is free again for a daemon."""
    assert run(*words, "no-such-guest") == (1, "", "rtpinctl: no running guest is called no-such-guest\n")

    file = LedgerFile(tmp_path)
    file.lock()
    file.unlock()


def test_with_nothing_to_put_back_release_says_so(run, tmp_path):
    """An empty ledger has nothing for anybody: no guest is changed."""
    code, out, _ = run("release", "--all")

    assert code == 0
    assert out == "no guest runs\n" or all(line.endswith(": released, 0 changes") for line in out.splitlines())


def test_a_damaged_ledger_is_set_aside_on_record(run, tmp_path):
    """With -v the record is shown; the file is kept."""
    (tmp_path / "ledger.json").write_text("damaged")
    code, _, err = run("pause", "-v")

    assert code == 0
    assert (tmp_path / "ledger.damaged").read_text() == "damaged"
    assert "the ledger is unusable" in err or os.path.exists("/run/systemd/journal/socket")


def test_a_ledger_that_cannot_be_read_stops_whoever_would_write_it(run, tmp_path, policy):
    """Looking goes on without it; what would replace it is refused."""
    (tmp_path / "ledger.json").mkdir()

    assert run("status", "--config", policy)[0] == 0
    code, out, err = run("pause")
    assert (code, out) == (1, "")
    assert err.startswith("rtpinctl: the ledger cannot be read: ")


def test_a_daemon_that_does_not_answer_is_not_done_without(run, tmp_path):
    """While somebody holds the lock nothing is done behind his back."""
    script = "import fcntl,sys; f=open(sys.argv[1],'w'); fcntl.flock(f,2); print(flush=True); sys.stdin.read()"
    command = [sys.executable, "-I", "-S", "-c", script, str(tmp_path / "lock")]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    holder.stdout.readline()
    try:
        code, out, err = run("pause")
    finally:
        holder.communicate(b"")

    assert (code, out) == (1, "")
    assert err.startswith("rtpinctl: a daemon runs, but its control socket does not answer")


def test_a_state_directory_that_cannot_be_written_is_told(run, tmp_path):
    """Without a daemon the right to write is needed, and that is said."""
    (tmp_path / "file").touch()
    code, out, err = run("pause", "--state-dir", tmp_path / "file")

    assert (code, out) == (1, "")
    assert err.startswith("rtpinctl: no daemon runs, and without one this needs root")


@pytest.mark.parametrize(
    "words",
    [
        ["release"],
        ["release", "a", "--all"],
        ["pause", "--for", "soon"],
        ["pause", "--for", "0s"],
        ["pause", "--for", "-1h"],
        ["pause", "--for", "1.5h"],
        ["explain"],
        ["status", "a", "b"],
        ["nonsense"],
        ["plan", "--frobnicate"],
    ],
)
def test_wrong_options_are_exit_2(run, tmp_path, words):
    """Usage is said on stderr, and nothing was done."""
    code, out, err = run(*words)

    assert (code, out) == (2, "")
    assert err
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("words", [["status", "--help"], ["pause", "-h"]])
def test_help_is_exit_0(run, words):
    """Help goes to stdout."""
    code, out, err = run(*words)

    assert (code, err) == (0, "")
    assert out.startswith("usage: rtpinctl")


def test_the_version_is_the_packages(command):
    """The installed command says its version."""
    assert command("CTL --version")[:2] == (0, f"rtpinctl {__version__}\n")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become somebody who may not write")
def test_a_policy_that_others_may_write_is_not_used(run, run_json, policy):
    """Whoever may write it could give any guest FIFO: a problem like any other."""
    policy.chmod(policy.stat().st_mode | stat.S_IWOTH)
    code, document, _ = run_json("check-config", "check-config", policy)

    assert (code, [row["hint"] for row in document["problems"]]) == (78, ["chmod go-w"])
    assert run("plan", "--config", policy)[0] == 78


def test_a_process_of_its_own_prints_the_same_kind_of_document(command, policy):
    """The installed command follows the schemas like the function, with its exit code."""
    for words in ("check-config", "plan --config", "verify --config", "status --config"):
        code, out, err = command(f"CTL {words} {policy} --json")
        assert (code, err) == (0, "")
        validate(words.split()[0], json.loads(out))


def test_a_process_of_its_own_has_the_exit_codes(command, bad, policy):
    """Good, not good, wrong options and bad policy, as the shell sees them."""
    lines = [
        f"CTL verify --config {policy}",
        f"CTL verify --config {bad}",
        "CTL release",
        f"CTL check-config {bad}",
        f"CTL plan --config {bad}",
    ]

    assert [command(line)[0] for line in lines] == [0, 1, 2, 78, 78]


def test_what_is_loaded_when_it_is_called_is_there():
    """The names of functions in main, which nothing else checks."""
    names = re.findall(r'"([a-z]+\.[a-z_]+)"', Path(ctl_main.__file__).read_text())

    assert len(names) == 14
    assert all(
        callable(getattr(import_module(f"rtpind.ctl.{name.partition('.')[0]}"), name.partition(".")[2]))
        for name in names
    )

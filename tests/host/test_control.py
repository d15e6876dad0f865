"""The control socket: one line each way, and no client that can hold up or end the daemon's side."""

import json
import os
import resource
import select
import socket
import subprocess
import sys
import threading
import time

import pytest
from trees import until

from rtpind.host.control import ControlServer, UnreachableError, ask

MEMBER = """
import socket, sys
client = socket.socket(socket.AF_UNIX)
client.connect(sys.argv[1])
client.sendall(b"{}\\n")
print(client.recv(65536).decode())
"""
PATIENT = pytest.mark.timeout(30)


@pytest.fixture
def asked():
    """What the server was asked."""
    return []


@pytest.fixture
def server(tmp_path, asked):
    """A server that remembers what it was asked, answers with its number, and waits a fifth of a second for clients."""

    def answer(request, _trusted):
        asked.append(request)
        return {"ok": len(asked)}

    made = ControlServer(answer, tmp_path, patience_s=0.2)
    made.start()
    yield made
    made.stop()


def connect(directory):
    client = socket.socket(socket.AF_UNIX)
    client.connect(str(directory / "control"))
    client.settimeout(20)
    return client


def send(directory, data):
    """Send raw bytes and return all that comes back."""
    with connect(directory) as client:
        client.sendall(data)
        client.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: client.recv(65536), b""))


def test_a_request_is_answered(tmp_path, server, asked):
    """What is asked arrives as it was, and the answer comes back; one request after the other."""
    request = {"do": "status", "guests": ["ü", "\u2028", "a\nb"], "seconds": None}

    assert ask(request, tmp_path) == {"ok": 1}
    assert ask({}, tmp_path) == {"ok": 2}
    assert asked == [request, {}]


def test_a_long_answer_arrives_whole(tmp_path):
    """A status of thousands of threads is more than any buffer."""
    text = "x" * 3_000_000
    server = ControlServer(lambda *_: {"ok": text}, tmp_path)
    server.start()
    try:
        assert ask({}, tmp_path) == {"ok": text}
    finally:
        server.stop()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\n",
        b"not json\n",
        b"{\n",
        b'{"do": "status"}',  # no end of line
        b"\xff\xfe\n",
        b"[" * 60_000 + b"\n",  # brackets without end
        b"1" * 60_000 + b"\n",
        b'{"a": "\\ud800"\n',
        b"\0" * 1000 + b"\n",
    ],
)
def test_a_request_that_makes_no_sense_ends_that_client_alone(tmp_path, server, asked, data):
    """The client gets no answer, nobody is asked, and the next client is served."""
    assert send(tmp_path, data) == b""
    assert asked == []
    assert ask({}, tmp_path) == {"ok": 1}


@pytest.mark.parametrize("data", [b"[]\n", b"null\n", b'"status"\n', b"5\n"])
def test_a_request_that_is_no_object_is_told_so(tmp_path, server, asked, data):
    """JSON of another kind is refused with a reason."""
    assert json.loads(send(tmp_path, data)) == {"error": "not an object"}
    assert asked == []


def test_a_request_without_end_is_cut_off(tmp_path, server, asked):
    """A client that sends more than any request has is dropped, not collected."""
    with connect(tmp_path) as client, pytest.raises((BrokenPipeError, ConnectionResetError)):
        client.sendall(b"x" * 60_000_000)
    assert asked == []
    assert ask({}, tmp_path) == {"ok": 1}


@PATIENT
def test_a_silent_client_is_waited_for_only_so_long(tmp_path, server):
    """A client that connects and says nothing holds up the next for a moment, not for ever."""
    with connect(tmp_path):
        assert ask({}, tmp_path) == {"ok": 1}


@PATIENT
def test_a_dripping_client_is_waited_for_only_so_long(tmp_path, server):
    """A client that sends a byte now and then does not get a new deadline with each."""
    gone = threading.Event()

    def drip():
        with connect(tmp_path) as client:
            try:
                while not gone.wait(0.05):
                    client.sendall(b" ")
            except OSError:
                return

    thread = threading.Thread(target=drip)
    thread.start()
    try:
        begun = time.monotonic()
        assert ask({}, tmp_path) == {"ok": 1}
        assert time.monotonic() - begun < 5
    finally:
        gone.set()
        thread.join()


@PATIENT
def test_a_client_that_does_not_read_is_left(tmp_path):
    """An answer that nobody takes ends that client alone."""
    server = ControlServer(lambda *_: {"ok": "x" * 3_000_000}, tmp_path, patience_s=0.2)
    server.start()
    try:
        with connect(tmp_path) as client:
            client.sendall(b"{}\n")
            assert len(ask({}, tmp_path)["ok"]) == 3_000_000
    finally:
        server.stop()


@PATIENT
def test_many_clients_wait_for_their_turn(tmp_path, server):
    """However many ask at once while one is slow, none is turned away."""
    answers = []
    clients = [threading.Thread(target=lambda: answers.append(ask({}, tmp_path))) for _ in range(20)]
    with connect(tmp_path):
        for client in clients:
            client.start()
        for client in clients:
            client.join()

    assert sorted(answer["ok"] for answer in answers) == list(range(1, 21))


def test_a_client_that_leaves_early_is_no_trouble(tmp_path, server):
    """Clients that go away before the answer leave the server as it was."""
    for _ in range(20):
        with connect(tmp_path) as client:
            client.sendall(b"{}\n")

    assert "ok" in ask({}, tmp_path)


def test_the_server_outlives_a_shortage_of_descriptors(tmp_path, server):
    """While no descriptor is left nobody is served; afterwards everybody is."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with socket.socket(socket.AF_UNIX) as first, socket.socket(socket.AF_UNIX) as second:
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
        try:
            for client in (first, second):  # accept() may have set a descriptor aside for the first
                client.connect(str(tmp_path / "control"))
                client.sendall(b"{}\n")
            assert select.select([second], [], [], 0.3)[0] == []
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        second.settimeout(20)
        answer = json.loads(second.recv(65536))

    assert answer == {"ok": 2}


def test_the_socket_of_a_daemon_that_is_gone_is_replaced(tmp_path, asked):
    """A socket file that nobody listens on is unreachable, and no obstacle for the next daemon."""
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(str(tmp_path / "control"))
    stale.close()
    with pytest.raises(UnreachableError):
        ask({}, tmp_path)

    server = ControlServer(lambda *_: {"ok": 1}, tmp_path)
    server.start()
    try:
        assert ask({}, tmp_path) == {"ok": 1}
    finally:
        server.stop()


def test_only_owner_and_group_may_ask(tmp_path, server):
    """The socket is closed to everybody else, and the umask is as it was."""
    assert (tmp_path / "control").stat().st_mode & 0o777 == 0o660
    mask = os.umask(0)
    os.umask(mask)
    assert mask != 0o117


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become somebody else")
def test_another_user_is_told_that_it_is_unreachable(tmp_path, server):
    """Permission denied is what no daemon is: unreachable."""
    os.seteuid(65534)
    try:
        with pytest.raises(UnreachableError, match="Permission denied"):
            ask({}, tmp_path)
    finally:
        os.seteuid(0)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become somebody else")
def test_only_root_and_the_daemons_own_user_are_trusted(tmp_path):
    """The kernel says who asks: a member of the socket's group may ask, and is not trusted with a change."""
    server = ControlServer(lambda _, trusted: {"ok": trusted}, tmp_path)
    for directory in (tmp_path, *tmp_path.parents[:3]):
        directory.chmod(0o755)
    server.start()
    try:
        os.chown(tmp_path / "control", 4242, 4243)
        assert ask({}, tmp_path) == {"ok": True}
        member = ["setpriv", "--reuid=65534", "--regid=4243", "--clear-groups", "--inh-caps=-all"]
        python = [os.path.realpath(sys.executable), "-I", "-S", "-c", MEMBER, str(tmp_path / "control")]
        done = subprocess.run([*member, *python], capture_output=True, text=True, cwd="/")
        assert json.loads(done.stdout) == {"ok": False}, done.stderr
        os.seteuid(4242)
        try:
            assert ask({}, tmp_path) == {"ok": True}
        finally:
            os.seteuid(0)
    finally:
        server.stop()


def test_stopping_ends_the_thread_and_removes_the_socket(tmp_path, server):
    """After stop nothing listens, and nothing is left behind; stopping twice is no error."""
    server.stop()
    server.stop()

    until(lambda: not any(thread.name == "control" for thread in threading.enumerate()), "the thread has ended")
    assert not (tmp_path / "control").exists()
    with pytest.raises(UnreachableError):
        ask({}, tmp_path)


def test_no_daemon_is_unreachable(tmp_path):
    """Neither a missing directory nor a path that no socket can have is anything else."""
    for directory in (tmp_path, tmp_path / "none", tmp_path / ("x" * 200)):
        with pytest.raises(UnreachableError):
            ask({}, directory)


@PATIENT
@pytest.mark.parametrize("answer", [b"", b"\n", b"[]\n", b"{", b"not json\n"])
def test_an_answer_that_makes_no_sense_is_unreachable(tmp_path, answer):
    """Whatever listens there, if it does not answer with an object it is no daemon."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "control"))
        listener.listen()

        def serve():
            client, _ = listener.accept()
            with client:
                client.recv(65536)
                client.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(UnreachableError):
            ask({}, tmp_path)
        thread.join()


@PATIENT
def test_a_daemon_that_hangs_is_unreachable(tmp_path):
    """A daemon that takes the request and never answers is given up after the time asked for."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "control"))
        listener.listen()
        with pytest.raises(UnreachableError, match="timed out"):
            ask({}, tmp_path, timeout_s=0.2)

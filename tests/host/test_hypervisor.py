"""Which guests run, from libvirt's own test driver and from the real libvirtd behind a socket that can be cut."""

import contextlib
import socket
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import libvirt
import pytest
from trees import until

from rtpind.core.cpuset import CpuSet
from rtpind.core.model import Traits
from rtpind.host.details import Described, read
from rtpind.host.hypervisor import (
    METADATA,
    Changed,
    Domain,
    Hypervisor,
    Listed,
    Lost,
    _definition,
    describe_once,
    list_once,
)

TEST = "test:///default"
TEST_DOMAIN = Domain("6695eb01-f6a4-8304-79aa-97f2502e193f", "test")
READ_ONLY = next((path for path in (Path("/run/libvirt/libvirt-sock-ro"), Path("/run/libvirt/virtqemud-sock-ro"))
                  if path.exists()), None)  # fmt: skip


class Posts(list):
    """What a hypervisor posted, in order. Other people's guests may come and go on the real libvirtd meanwhile."""

    def of(self, kind):
        return [post for post in list(self) if isinstance(post, kind)]

    def kinds(self):
        """Return which lists and losses were posted."""
        return [type(post) for post in list(self) if not isinstance(post, Changed)]


@pytest.fixture
def watch():
    """Start hypervisors; stops them after the test."""
    made = []

    def start(uri):
        posts = Posts()
        hypervisor = Hypervisor(uri, posts.append)
        hypervisor.start()
        made.append(hypervisor)
        return hypervisor, posts

    yield start
    for hypervisor in made:
        hypervisor.stop()
    until(lambda: not any(thread.name == "libvirt-events" for thread in threading.enumerate()), "event threads ended")


@pytest.fixture
def domain():
    """The test driver's domain, running; it is shared by this process and put back after the test."""
    conn = libvirt.open(TEST)
    dom = conn.lookupByUUIDString(TEST_DOMAIN.uuid)
    yield dom
    if not dom.isActive():
        dom.create()
    conn.close()


class Proxy:
    """A socket in front of libvirtd's: can refuse, cut, or swallow everything."""

    def __init__(self, path, *, deaf=False, rude=False):
        self.path = path
        self.deaf = deaf
        self.rude = rude
        self.open = []
        self.accepted = 0
        self.server = socket.socket(socket.AF_UNIX)
        self.server.bind(str(path))
        self.server.listen()
        threading.Thread(target=self._serve, daemon=True).start()

    @property
    def uri(self):
        return f"qemu+unix:///system?socket={self.path}"

    def _serve(self):
        while True:
            try:
                client, _ = self.server.accept()
            except OSError:
                return
            self.accepted += 1
            self.open.append(client)
            if self.rude:
                self.cut()
            elif not self.deaf:
                behind = socket.socket(socket.AF_UNIX)
                behind.connect(str(READ_ONLY))
                self.open.append(behind)
                for pair in ((client, behind), (behind, client)):
                    threading.Thread(target=self._copy, args=pair, daemon=True).start()

    @staticmethod
    def _copy(source, target):
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)

    def cut(self):
        """End every connection."""
        for one in self.open:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()
        self.open.clear()

    def close(self):
        with contextlib.suppress(OSError):
            self.server.shutdown(socket.SHUT_RDWR)
        self.server.close()
        self.cut()
        self.path.unlink(missing_ok=True)


@pytest.fixture
def proxy(tmp_path):
    """Make proxies in front of the real libvirtd; closes them after the test."""
    if READ_ONLY is None or list_once("qemu:///system") is None:
        pytest.skip("libvirtd does not answer on its read-only socket")
    made = []

    def start(**options):
        made.append(Proxy(tmp_path / "libvirt", **options))
        return made[-1]

    yield start
    for one in made:
        one.close()


def test_the_running_guests_are_listed_once_connected(watch):
    """The first word is a fresh list."""
    _, posts = watch(TEST)
    until(lambda: posts, "something is posted")

    assert posts[0] == Listed((TEST_DOMAIN,), fresh=True)


def test_a_change_is_posted_as_it_happens(watch, domain):
    """A guest that is paused, resumed and stopped is named each time; stopping is told apart."""
    _, posts = watch(TEST)
    until(lambda: posts, "connected")
    domain.suspend()
    domain.resume()
    until(lambda: len(posts.of(Changed)) >= 2, "two changes")
    domain.destroy()
    until(lambda: len(posts.of(Changed)) >= 3, "three changes")
    domain.create()
    until(lambda: len(posts.of(Changed)) >= 4, "four changes")

    whats = [("lifecycle", False), ("lifecycle", True), ("stopped", False), ("lifecycle", True)]
    assert posts.of(Changed) == [Changed(TEST_DOMAIN, what, redefined) for what, redefined in whats]


def test_a_change_of_metadata_is_told_as_that(watch, domain):
    """It is a change of the definition, and of nothing else."""
    _, posts = watch(TEST)
    until(lambda: posts, "connected")
    domain.setMetadata(2, "<x/>", "x", "urn:x", 1)
    domain.setMetadata(2, None, "x", "urn:x", 1)
    until(lambda: len(posts.of(Changed)) >= 2, "two changes")

    assert posts.of(Changed) == [Changed(TEST_DOMAIN, METADATA, redefined=True)] * 2


@pytest.mark.parametrize(
    ("values", "redefined"),
    [
        ({"cputune.vcpupin0": "1"}, True),
        ({"cputune.emulatorpin": "1"}, False),
        ({"cputune.cpu_shares": 2}, False),
        ({"blkdeviotune.disk": "vda", "blkdeviotune.total_bytes_sec": 1}, False),
        ({}, False),
    ],
)
def test_only_pins_of_vcpus_are_another_definition(domain, values, redefined):
    """Shares and the throttling of disks are tunables too. The test driver has no such event."""
    posts = Posts()
    Hypervisor(TEST, posts.append)._on_tunable(None, domain, values, "tunable")

    assert posts == [Changed(TEST_DOMAIN, "tunable", redefined=redefined)]


def test_a_definition_is_posted_when_asked_for(watch, domain):
    """With whom it was asked of; a domain that there is not has no answer, and does not hold up the next."""
    hypervisor, posts = watch(TEST)
    until(lambda: posts, "connected")
    hypervisor.describe("00000000-0000-0000-0000-000000000000", (1, 1))
    hypervisor.describe(TEST_DOMAIN.uuid, (100, 7))
    until(lambda: posts.of(Described), "it is described")

    assert posts.of(Described) == [Described(TEST_DOMAIN.uuid, (100, 7), Traits())]


@pytest.mark.parametrize(
    ("numatune", "nodeset"),
    [("", ""), ("<memory mode='strict' nodeset='0'/>", "0"), ("<memory mode='strict' placement='auto'/>", "")],
)
def test_a_definition_tells_the_nodes_of_memory(domain, numatune, nodeset):
    """What libvirt's NUMA parameters say, beside the XML; where it has none, only the XML."""
    text = "<domain type='test'><name>n</name><memory>1024</memory><os><type>hvm</type></os>{}</domain>"
    found = domain.connect().createXML(text.format(f"<numatune>{numatune}</numatune>"))
    told = _definition(found)
    found.destroy()

    assert told.nodeset == nodeset
    assert told.xml.startswith("<domain ")
    assert read(told) == Traits(nodes=CpuSet.parse(nodeset))


def test_a_driver_without_numa_parameters_tells_the_xml():
    """They are not every driver's."""

    def fails(_flags):
        raise libvirt.libvirtError("this function is not supported by the connection driver")

    assert _definition(SimpleNamespace(XMLDesc=lambda _flags: "<domain/>", numaParameters=fails)) == ("<domain/>", "")


def test_nobody_is_described_without_a_connection(tmp_path):
    """What is asked while libvirt is away is asked anew after it has come: no answer, and no error."""
    assert Hypervisor(f"qemu+unix:///system?socket={tmp_path / 'none'}", print)._definition(TEST_DOMAIN.uuid) is None


def test_an_error_is_one_as_long_as_the_connection_is_there(proxy):
    """What fails because the connection was cut is asked for anew by who hears of that."""
    front = proxy()
    hypervisor = Hypervisor(front.uri, print)
    hypervisor._conn = libvirt.openReadOnly(front.uri)
    with pytest.raises(libvirt.libvirtError):
        hypervisor._definition("not a UUID")
    front.cut()

    assert hypervisor._definition(TEST_DOMAIN.uuid) is None


def test_a_new_list_is_posted_when_asked_for(watch, domain):
    """Later lists are not fresh, and show who runs then."""
    hypervisor, posts = watch(TEST)
    until(lambda: posts, "connected")
    domain.destroy()
    hypervisor.relist()
    until(lambda: len(posts.of(Listed)) == 2, "a second list")

    assert posts.of(Listed)[1] == Listed((), fresh=False)


def test_starting_and_stopping_wait_for_nothing(watch, proxy):
    """A libvirtd that accepts and never answers holds up neither start, relist nor stop."""
    deaf = proxy(deaf=True)
    begun = time.monotonic()
    hypervisor, posts = watch(deaf.uri)
    hypervisor.relist()
    until(lambda: deaf.accepted, "it has connected")
    hypervisor.stop()

    assert time.monotonic() - begun < 2
    assert posts == []


def test_a_libvirt_that_is_not_there_is_said_once_and_tried_again(watch, proxy, tmp_path):
    """Being away is one word, not one for each attempt; when it comes it is listed afresh."""
    _, posts = watch(f"qemu+unix:///system?socket={tmp_path / 'libvirt'}")
    until(lambda: posts, "it is said to be away")
    begun = time.monotonic()
    proxy()
    until(lambda: posts.of(Listed), "connected")

    assert posts.kinds() == [Lost, Listed]
    assert posts.of(Listed)[0].fresh
    assert 0.5 < time.monotonic() - begun < 5


def test_a_libvirt_that_stays_away_is_said_once(watch, proxy):
    """Further attempts that fail are no news."""
    rude = proxy(rude=True)
    hypervisor, posts = watch(rude.uri)
    until(lambda: posts.of(Lost), "it is said to be away")
    tried = rude.accepted
    until(lambda: rude.accepted > tried, "it is tried again")
    hypervisor.stop()
    until(lambda: not any(thread.name == "libvirt-calls" for thread in threading.enumerate()), "the attempt has ended")

    assert posts.kinds() == [Lost]


def test_a_connection_that_is_cut_is_made_anew(watch, proxy):
    """Each loss is told, and a fresh list follows it after a pause that spares libvirtd."""
    front = proxy()
    _, posts = watch(front.uri)
    until(lambda: posts.of(Listed), "connected")
    front.cut()
    until(lambda: len(posts.of(Listed)) == 2, "connected again")

    assert posts.kinds() == [Listed, Lost, Listed]
    assert [post.fresh for post in posts.of(Listed)] == [True, True]
    assert front.accepted == 2


def test_a_relist_does_not_cut_the_pause_short(watch, proxy, tmp_path):
    """However often the daemon asks, attempts keep their distance."""
    hypervisor, posts = watch(f"qemu+unix:///system?socket={tmp_path / 'libvirt'}")
    until(lambda: posts.of(Lost), "it is said to be away")
    begun = time.monotonic()
    proxy()
    until(lambda: hypervisor.relist() or posts.of(Listed), "connected")

    assert time.monotonic() - begun > 0.5


def test_a_command_gets_a_list_or_none_in_time(proxy, tmp_path):
    """Who runs is listed once; a libvirt that is away, unknown or deaf is no answer, and soon."""
    begun = time.monotonic()

    assert list_once(TEST) == (TEST_DOMAIN,)
    assert list_once(f"qemu+unix:///system?socket={tmp_path / 'none'}") is None
    assert list_once("nonsense:///") is None
    assert list_once(proxy(deaf=True).uri, timeout_s=0.3) is None
    assert time.monotonic() - begun < 4


def test_a_command_gets_the_definitions_that_come_in_time(proxy):
    """What libvirt does not know is left out; a libvirt that is deaf is no answer, and soon."""
    begun = time.monotonic()
    asked = ["00000000-0000-0000-0000-000000000000", TEST_DOMAIN.uuid]

    assert describe_once(TEST, asked) == {TEST_DOMAIN.uuid: Traits()}
    assert describe_once("nonsense:///", asked) == {}
    assert describe_once(proxy(deaf=True).uri, asked, timeout_s=0.3) == {}
    assert time.monotonic() - begun < 4


def test_the_real_libvirtd_lists_what_virsh_lists(proxy):
    """On the real host: the same guests as another program sees, where none comes or goes meanwhile."""
    conn = libvirt.openReadOnly("qemu:///system")

    def theirs():
        return {Domain(dom.UUIDString(), dom.name()) for dom in conn.listAllDomains(1)}

    until(lambda: theirs() == set(list_once("qemu:///system") or ()), "both agree")
    conn.close()

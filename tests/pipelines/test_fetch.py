"""The fetcher against a real server that behaves as badly as the web, and addresses that it must never touch."""

from __future__ import annotations

import os
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest

from pipelines import fetch
from pipelines.config import compose
from pipelines.fetch import Fetcher
from pipelines.fetching import addresses, wire
from pipelines.fetching.addresses import AddressError, Names, is_public
from pipelines.fetching.room import Body, Room, Share
from pipelines.fetching.wire import FetchError
from tests.pipelines.unkind_server import Unkind, certificate, drip_handshake, raw_server, unkind_server

SEED = int(os.environ.get("LDM_TEST_SEED", "0"))
SETTINGS = replace(compose([]).dataset.download, deadline_seconds=20.0, max_bytes=200_000, retries=1)
SHORT = 1.0  # seconds, where a deadline is meant to pass
LATEST = 4.5  # seconds after which that was not kept, on a machine that has other things to do; a drip takes six


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with unkind_server() as address:
        yield address


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Fetcher]]:
    """Makes fetchers, and closes them after the test."""
    made: list[Fetcher] = []

    def make(connect: str | None, **changes: Any) -> Fetcher:
        made.append(Fetcher(replace(SETTINGS, **changes), connect))
        return made[-1]

    Unkind.hits.clear()
    monkeypatch.setattr(Unkind, "robots", {"status": 404})
    yield make
    for fetcher in made:
        fetcher.close()


@pytest.fixture
def fetcher(address: str, make: Callable[..., Fetcher]) -> Fetcher:
    return make(address)


@pytest.fixture
def connections(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The addresses to which connections are made from here on."""
    made: list[str] = []
    connect = socket.create_connection

    def spy(address: tuple[str, int], *rest: Any) -> socket.socket:
        made.append(address[0])
        return connect(address, *rest)

    monkeypatch.setattr(socket, "create_connection", spy)
    return made


def reason(fetcher: Fetcher, url: str) -> str:
    with pytest.raises(FetchError) as error:
        fetcher.fetch(url)
    return error.value.reason


def resolve_to(monkeypatch: pytest.MonkeyPatch, *answers: list[str]) -> None:
    """Lets every name resolve to these addresses, one list after the other, the last one for good."""
    left = list(answers)

    def getaddrinfo(*_: Any, **__: Any) -> list[Any]:
        found = left.pop(0) if len(left) > 1 else left[0]
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (ip, 0)) for ip in found]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)


# -- what comes, and what does not ------------------------------------------------------------------------------------
def test_a_picture_comes_whole_and_the_host_is_asked_for_by_its_name(fetcher: Fetcher) -> None:
    assert fetcher.fetch("http://a.test/good") == b"picture of a.test"
    assert fetcher.fetch("http://a.test/hop") == b"picture of b.test"
    assert fetcher.fetch("http://a.test/agent").decode() == SETTINGS.user_agent
    assert "mozilla" not in SETTINGS.user_agent.lower()


@pytest.mark.parametrize("path, expected, hits", [
    ("missing", "http_404", 1), ("loop", "redirect_loop", 4), ("optout", "opt_out", 1), ("optout-dated", "opt_out", 1),
    ("reserved", "opt_out", 1), ("large", "too_large", 1), ("endless", "too_large", 1), ("short", "connection", 2),
    ("half-close", "connection", 2), ("failing", "http_500", 2), ("busy", "http_429", 1),
])  # fmt: skip
def test_each_misfortune_has_one_word_and_only_what_may_help_is_tried_again(
    fetcher: Fetcher, path: str, expected: str, hits: int
) -> None:
    assert reason(fetcher, f"http://a.test/{path}") == expected
    assert Unkind.hits[f"/{path}"] == hits


def test_what_passes_is_tried_again(fetcher: Fetcher) -> None:
    assert fetcher.fetch("http://a.test/flaky") == b"at last"


def test_a_server_that_asks_for_a_pause_gets_it_where_the_deadline_allows(fetcher: Fetcher) -> None:
    started = time.monotonic()
    assert fetcher.fetch("http://a.test/patient") == b"at last"
    assert time.monotonic() - started >= 1


def test_a_pause_may_be_asked_for_as_a_date() -> None:
    later = format_datetime(datetime.now(UTC) + timedelta(seconds=90), usegmt=True)
    assert 85 < wire.retry_after(later) <= 90
    assert [wire.retry_after(text) for text in ("7", "", "soon", "-3", "²", "Mon, 99 Foo")] == [7, 0, 0, 0, 0, 0]


def test_a_gzip_bomb_stays_packed(fetcher: Fetcher) -> None:
    assert len(fetcher.fetch("http://a.test/gzip-bomb")) < 60_000


def test_an_opt_out_is_heard_before_the_body(fetcher: Fetcher, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "_read", lambda *_: pytest.fail("the body was read"))
    fetcher.hosts.clear()
    monkeypatch.setattr(Fetcher, "_robots_text", lambda *_: "")
    assert reason(fetcher, "http://a.test/optout") == "opt_out"


@pytest.mark.parametrize("location, expected", [
    ("http://[::1", "bad_url"), ("http://a.test:99999/", "bad_url"), ("file:///etc/passwd", "scheme"),
    ("http://a.test:22/", "port"), ("//user:pw@a.test/good", "bad_url"), ("http://a..test/", "bad_url"),
])  # fmt: skip
def test_redirects_to_nonsense_have_one_word(
    fetcher: Fetcher, monkeypatch: pytest.MonkeyPatch, location: str, expected: str
) -> None:
    monkeypatch.setattr(Unkind, "onward", location)
    assert reason(fetcher, "http://a.test/onward") == expected


def test_a_redirect_in_raw_utf_8_is_followed(fetcher: Fetcher, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Unkind, "onward", "/käse bild".encode().decode("latin-1"))
    assert reason(fetcher, "http://a.test/onward") == "http_404"
    assert Unkind.hits["/k%C3%A4se%20bild"] == 1


def test_whatever_a_server_says_nothing_but_fetch_errors_comes_out(make: Callable[..., Fetcher]) -> None:
    rng = random.Random(SEED)
    good = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nLocation: http://x\r\n\r\nhello"

    def babble(connection: socket.socket) -> None:
        connection.recv(4096)
        text = bytearray(good)
        for _ in range(rng.randint(1, 6)):
            text[rng.randrange(len(text))] = rng.randrange(256)
        connection.sendall(bytes(text[: rng.randint(0, len(text))]))

    with raw_server(babble) as address:
        fetcher = make(address, deadline_seconds=0.5, retries=0, respect_robots=False)
        for _ in range(80):
            try:
                assert len(fetcher.fetch("http://a.test/x")) <= 100
            except FetchError as error:
                assert error.reason.isidentifier()


# -- deadlines --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("path", ["drip", "dripping-headers", "never"])
def test_the_deadline_is_for_all_that_a_url_costs(address: str, make: Callable[..., Fetcher], path: str) -> None:
    fetcher = make(address, deadline_seconds=SHORT, respect_robots=False)
    started = time.monotonic()
    assert reason(fetcher, f"http://a.test/{path}") == "timeout"
    assert time.monotonic() - started < LATEST


def test_the_deadline_holds_while_tls_shakes_hands_and_names_are_looked_up(
    make: Callable[..., Fetcher], monkeypatch: pytest.MonkeyPatch
) -> None:
    started = time.monotonic()
    with raw_server(drip_handshake) as address:
        assert reason(make(address, deadline_seconds=SHORT), "https://a.test/good") == "timeout"
    assert time.monotonic() - started < LATEST
    release = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: release.wait(10) and [])
    started = time.monotonic()
    assert reason(make(None, deadline_seconds=SHORT), "http://slow-names.example/") == "dns"
    assert time.monotonic() - started < LATEST
    release.set()


def test_without_the_watchdog_a_drip_holds_a_worker(
    address: str, make: Callable[..., Fetcher], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sabotage twin: the time-out of each read is kept by a drip for ever; only the watchdog ends it."""
    monkeypatch.setattr(wire.WATCHDOG, "watch", lambda handle, deadline: None)
    started = time.monotonic()
    reason(make(address, deadline_seconds=SHORT, respect_robots=False), "http://a.test/dripping-headers")
    assert time.monotonic() - started > LATEST


def test_fetchers_share_one_watchdog_which_forgets_what_is_done(address: str, make: Callable[..., Fetcher]) -> None:
    fetchers = [make(address) for _ in range(8)]
    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(lambda fetcher: fetcher.fetch("http://a.test/good"), fetchers))
    assert [thread.name for thread in threading.enumerate()].count("watchdog") == 1
    assert not wire.WATCHDOG.deadlines


# -- addresses --------------------------------------------------------------------------------------------------------
INSIDE = [
    "http://127.0.0.1/", "http://127.1/", "http://127.0.1/", "http://0x7f000001/", "http://0x7f.0.0.1/",
    "http://2130706433/", "http://0177.0.0.1/", "http://017700000001/", "http://0/", "http://0.0.0.0/",
    "http://127.255.255.254/", "http://[::1]/", "http://[::]/", "http://[::ffff:127.0.0.1]/",
    "http://[::ffff:7f00:1]/", "http://[0:0:0:0:0:ffff:7f00:1]/", "http://[::127.0.0.1]/", "http://[::ffff:0:7f00:1]/",
    "http://[64:ff9b::7f00:1]/", "http://[64:ff9b:1::7f00:1]/", "http://[2002:7f00:1::]/",
    "http://[2001:0:7f00:1::80ff:fffe]/", "http://10.0.0.1/", "http://172.16.0.1/", "http://192.168.1.1/",
    "http://169.254.169.254/latest/meta-data/", "http://[::ffff:169.254.169.254]/", "http://2852039166/",
    "http://100.64.0.1/", "http://198.18.0.1/", "http://192.0.2.1/", "http://192.88.99.1/", "http://[fe80::1]/",
    "http://[fe80::1%25lo]/", "http://[fc00::1]/", "http://[fd00:ec2::254]/", "http://[fec0::1]/", "http://[ff02::1]/",
    "http://[2001:db8::1]/", "http://[3fff::1]/", "http://224.0.0.1/", "http://240.0.0.1/", "http://255.255.255.255/",
    "http://localhost/", "http://localhost./", "http://LOCALHOST/", "http://①②⑦.⓪.⓪.①/", "http://127。0。0。1/",
    "https://127.0.0.1/", "https://[::1]/",
]  # fmt: skip
WRONG = [
    "file:///etc/passwd", "ftp://a.test/x", "data:text/plain,hi", "gopher://a.test/", "jar:http://a.test!/", "",
    "http:", "http://", "http:///etc/passwd", "//a.test/x", "http://user@127.0.0.1/", "http://user:pw@a.test/good",
    "http://127.0.0.1:6379/", "http://a.test:22/", "http://a.test:99999/", "http://a.test:x/", "http://[::1/",
    "http://a\tb\n@127.0.0.1/", "javascript:alert(1)", "pipe:cat",
]  # fmt: skip
REFUSALS = {"scheme", "bad_url", "port", "blocked_address", "dns"}


def test_no_connection_is_made_to_an_address_that_is_not_public(fetcher: Fetcher, connections: list[str]) -> None:
    reasons = {url: reason(fetcher, url) for url in [*INSIDE, *WRONG]}
    assert connections == [] and not Unkind.hits
    assert set(reasons.values()) <= REFUSALS, reasons


def test_no_redirect_leads_inside(
    fetcher: Fetcher, connections: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fetcher.settings = replace(SETTINGS, respect_robots=False)
    for url in INSIDE:
        monkeypatch.setattr(Unkind, "onward", url.encode().decode("latin-1"))
        assert reason(fetcher, "http://a.test/onward") in REFUSALS, url
    assert Unkind.hits == {"/onward": len(INSIDE)} and connections == ["127.0.0.1"]


def test_without_the_check_of_addresses_they_are_reached(
    address: str, make: Callable[..., Fetcher], connections: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sabotage twin: the same URLs, on the port where the server of these tests listens."""
    monkeypatch.setattr(fetch, "PORTS", {"http": int(address.rpartition(":")[2]), "https": 1})
    fetcher = make(None, respect_robots=False)
    assert reason(fetcher, "http://127.1/good") == "blocked_address" and not connections
    monkeypatch.setattr(addresses, "is_public", lambda ip: True)
    assert fetcher.fetch("http://127.1/good").startswith(b"picture") and connections == ["127.0.0.1"]


def test_a_name_that_leads_inside_is_blocked_whatever_else_it_leads_to(
    make: Callable[..., Fetcher], monkeypatch: pytest.MonkeyPatch
) -> None:
    resolve_to(monkeypatch, ["93.184.216.34", "127.0.0.1"])
    assert reason(make(None), "http://two-faced.example/") == "blocked_address"


def test_the_connection_goes_to_the_address_that_was_checked(
    make: Callable[..., Fetcher], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name service that answers otherwise the second time gains nothing: there is no second time."""
    resolve_to(monkeypatch, ["93.184.216.34"], ["127.0.0.1"])
    asked: list[str] = []

    def refuse(address: tuple[str, int], *_: Any) -> socket.socket:
        asked.append(address[0])
        raise ConnectionRefusedError

    monkeypatch.setattr(socket, "create_connection", refuse)
    fetcher = make(None, retries=0, respect_robots=False)
    assert reason(fetcher, "http://rebinding.example/") == "connection"
    assert asked == ["93.184.216.34"]


def test_public_addresses_are_public() -> None:
    assert all(map(is_public, ("93.184.216.34", "2606:2800:220:1:248:1893:25c8:1946", "64:ff9b::5db8:d822")))


def test_only_test_hosts_are_led_to_the_stand_in(fetcher: Fetcher, monkeypatch: pytest.MonkeyPatch) -> None:
    resolve_to(monkeypatch, ["10.1.2.3"])
    assert reason(fetcher, "http://a.test.example/good") == "blocked_address"
    with pytest.raises(ValueError, match="expected ADDRESS:PORT"):
        Fetcher(SETTINGS, "127.0.0.1")


def test_tls_insists_on_a_certificate_for_the_hosts_own_name(
    make: Callable[..., Fetcher], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trusted, context = certificate(tmp_path, "a.test")
    with unkind_server(context) as address:
        assert reason(make(address), "https://a.test/good") == "tls"
        monkeypatch.setenv("SSL_CERT_FILE", str(trusted))
        fetcher = make(address)
        assert fetcher.fetch("https://a.test/good") == b"picture of a.test"
        assert reason(fetcher, "https://b.test/good") == "tls"


@pytest.fixture
def lookups(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """How often each host was looked up; those called slow* do not answer before the end of the test."""
    asked, end = Counter[str](), threading.Event()

    def getaddrinfo(host: str, *_: Any, **__: Any) -> list[Any]:
        asked[host] += 1
        if host.startswith("slow"):
            end.wait(60)
        if host == "gone.example" and asked[host] == 1:
            raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
        ip = "127.0.0.1" if host == "moves.example" and asked[host] > 1 else "93.184.216.34"
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (ip, 0))]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    yield asked
    end.set()


def said_of(names: Names, host: str, seconds: float) -> str:
    try:
        return names.address(host, seconds)
    except AddressError as error:
        return error.reason


def test_hosts_that_are_slow_to_find_keep_no_other_waiting(lookups: Counter[str]) -> None:
    names, slow = Names(), [f"slow{i}.example" for i in range(64)]
    with ThreadPoolExecutor(192) as pool:
        assert set(pool.map(lambda host: said_of(names, host, 0.2), slow * 3)) == {"dns"}
    assert lookups == dict.fromkeys(slow, 1), "one lookup for all who ask for a host"
    assert said_of(names, "well.example", 30) == "93.184.216.34"


def test_an_address_is_remembered_for_a_while_and_checked_at_every_use(
    lookups: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = Names()
    assert {said_of(names, "moves.example", 30) for _ in range(5)} == {"93.184.216.34"} and lookups.total() == 1
    with monkeypatch.context() as patch:
        patch.setattr(addresses, "is_public", lambda ip: False)
        assert said_of(names, "moves.example", 30) == "blocked_address" and lookups.total() == 1
    monkeypatch.setattr(addresses, "KEPT_SECONDS", 0.0)
    names = Names()
    assert [said_of(names, "moves.example", 30) for _ in range(2)] == ["blocked_address"] * 2 and lookups.total() == 3


def test_a_failure_is_not_remembered_and_no_more_than_so_many_addresses(
    lookups: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = Names()
    assert [said_of(names, "gone.example", 30) for _ in range(3)] == ["dns", "93.184.216.34", "93.184.216.34"]
    monkeypatch.setattr(addresses, "NAMES_KEPT", 10)
    for i in range(50):
        said_of(names, f"{i}.example", 30)
    assert len(names.lookups) == 10


# -- room for bodies --------------------------------------------------------------------------------------------------
def test_who_waits_for_room_gets_it_in_turn_and_there_is_never_more() -> None:
    room, most, lock = Room(1000), [0], threading.Lock()

    def hold(size: int) -> None:
        share = Share(room)
        share.take(size)
        with lock:
            most[0] = max(most[0], room.size - room.left)
        time.sleep(0.001)
        share.keep(size // 2)
        share.free()

    with ThreadPoolExecutor(32) as pool:
        list(pool.map(hold, [1000, 10, 400, 999, 250] * 40))
    assert room.left == room.size and not room.waiting and 500 < most[0] <= 1000
    with pytest.raises(ValueError, match="1001 bytes never fits into a room of 1000"):
        Share(room).take(1001)


def test_a_body_takes_room_as_long_as_it_is_there(address: str, make: Callable[..., Fetcher]) -> None:
    fetcher = make(address, max_bytes=1_000_000, respect_robots=False)
    share = Share(fetcher.room)
    body = Body(fetcher.fetch("http://a.test/untold", share), share)
    assert fetcher.room.size - fetcher.room.left == len(body.getvalue()) == 600_000
    del body, share
    assert fetcher.room.left == fetcher.room.size, "given back with the last hold of it"
    assert reason(fetcher, "http://a.test/endless") == "too_large" and fetcher.room.left == fetcher.room.size
    assert len(fetcher.fetch("http://a.test/untold")) == 600_000 and fetcher.room.left == fetcher.room.size


def test_waiting_for_room_costs_no_deadline(address: str, make: Callable[..., Fetcher]) -> None:
    fetcher = make(address, max_bytes=1_000_000, respect_robots=False, deadline_seconds=2.0, retries=0)
    others = Share(fetcher.room)
    others.take(fetcher.room.size)
    with ThreadPoolExecutor(8) as pool:
        bodies = [pool.submit(fetcher.fetch, "http://a.test/untold") for _ in range(8)]
        time.sleep(3)
        assert not any(body.done() for body in bodies)
        others.free()
        assert {len(body.result()) for body in bodies} == {600_000}


# -- manners ----------------------------------------------------------------------------------------------------------
RULES = {"status": 200, "body": b"User-agent: *\nDisallow: /private/\nDisallow: /*.gif$\n"}


def test_robots_txt_is_asked_once_and_obeyed(fetcher: Fetcher, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Unkind, "robots", {**RULES, "X_Robots_Tag": "noindex"})  # of robots.txt itself, as some send it
    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(fetcher.fetch, ["http://r.test/good"] * 16))
    assert reason(fetcher, "http://r.test/private/good") == "robots"
    assert reason(fetcher, "http://r.test/moving.gif") == "robots"
    assert Unkind.hits == {"/robots.txt": 1, "/good": 16}
    fetcher.settings = replace(SETTINGS, respect_robots=False)
    assert reason(fetcher, "http://r.test/private/good") == "http_404"


def test_robots_txt_of_another_host_holds_after_a_redirect(
    fetcher: Fetcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Unkind, "robots", {"status": 200, "body": b"User-agent: *\nDisallow: /good"})
    assert reason(fetcher, "http://a.test/hop") == "robots"
    assert Unkind.hits == {"/robots.txt": 2, "/hop": 1}


@pytest.mark.parametrize("robots, expected", [
    ({"status": 301, "Location": "/rules"}, "robots"), ({"status": 503}, "http_503"),
    ({"status": 403}, ""), ({"status": 301, "Location": "/robots.txt"}, ""),
    ({"status": 200, "body": RULES["body"] + b"#" * fetch.ROBOTS_BYTES}, "robots"),
])  # fmt: skip
def test_robots_txt_that_has_moved_fails_is_forbidden_turns_in_circles_or_is_too_long(
    fetcher: Fetcher, monkeypatch: pytest.MonkeyPatch, robots: dict[str, Any], expected: str
) -> None:
    monkeypatch.setattr(Unkind, "robots", robots)
    monkeypatch.setattr(Unkind, "on_rules", lambda self: self.answer(**RULES), raising=False)
    monkeypatch.setattr(Unkind, "on_private", lambda self: self.answer(200, b"secret"), raising=False)
    monkeypatch.setattr(Unkind, "on_private/", Unkind.on_private, raising=False)  # type: ignore[attr-defined]
    url = "http://r.test/private/"
    assert (reason(fetcher, url) if expected else fetcher.fetch(url).decode()) == (expected or "secret")


def test_a_host_that_cannot_say_what_it_allows_is_asked_once_for_all_its_urls(
    fetcher: Fetcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Unkind, "robots", {"status": 503})
    urls = [f"http://r.test/good?{i}" for i in range(24)]
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(lambda url: reason(fetcher, url), urls)) == {"http_503"}
    assert Unkind.hits == {"/robots.txt": 1 + SETTINGS.retries}
    monkeypatch.setattr(fetch, "NO_ROBOTS_SECONDS", 0.0)
    for host in "st":  # and again after a while
        assert reason(fetcher, f"http://{host}.test/good") == "http_503"
    monkeypatch.setattr(Unkind, "robots", {"status": 404})
    assert fetcher.fetch("http://t.test/good") == b"picture of t.test"
    assert reason(fetcher, "http://r.test/good") == "http_503"


def test_a_dead_host_is_asked_once_for_all_its_urls(make: Callable[..., Fetcher]) -> None:
    asked: list[bytes] = []

    def hang_up(connection: socket.socket) -> None:
        if request := connection.recv(4096):
            asked.append(request.splitlines()[0])

    with raw_server(hang_up) as address:
        fetcher = make(address)
        assert {reason(fetcher, f"http://d.test/{i}") for i in range(12)} == {"connection"}
    assert asked == [b"GET /robots.txt HTTP/1.1"] * (1 + SETTINGS.retries)


def test_what_a_host_takes_for_its_robots_txt_costs_its_urls_no_deadline(
    address: str, make: Callable[..., Fetcher]
) -> None:
    """One thread waits for the host's budget, the others for that thread."""
    fetcher, first = make(address, deadline_seconds=2.0, retries=0, requests_per_second=1.0), iter([3.0])
    fetcher.share(lambda asked, _: {host: [next(first, 0.0) for _ in range(n)] for host, n in asked.items()})
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(fetcher.fetch, ["http://r.test/good"] * 8)) == {b"picture of r.test"}
    assert Unkind.hits == {"/robots.txt": 1, "/good": 8}


def test_robots_txt_is_asked_again_after_a_day(fetcher: Fetcher, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "ROBOTS_SECONDS", 0.0)
    for _ in range(3):
        fetcher.fetch("http://r.test/good")
    assert Unkind.hits["/robots.txt"] == 3


def test_connections_are_reused(fetcher: Fetcher, connections: list[str]) -> None:
    for _ in range(5):
        fetcher.fetch("http://a.test/good")
        reason(fetcher, "http://a.test/loop")
    assert len(connections) == 2, "one that the 404 for robots.txt closed, and one for everything else"


def test_a_host_is_asked_no_more_often_than_its_budget_allows_and_waiting_costs_no_deadline(
    address: str, make: Callable[..., Fetcher]
) -> None:
    fetcher = make(address, requests_per_second=8.0, respect_robots=False, deadline_seconds=0.5)
    started = time.monotonic()
    with ThreadPoolExecutor(9) as pool:
        assert all(pool.map(fetcher.fetch, ["http://a.test/good"] * 9))
    assert time.monotonic() - started >= 8 / 8

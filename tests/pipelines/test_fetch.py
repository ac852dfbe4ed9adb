"""The fetcher against a real server that behaves as badly as the web, and addresses that it must never touch."""

from __future__ import annotations

import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from pipelines.config import compose
from pipelines.fetch import Fetcher, FetchError, is_public

HITS: Counter[str] = Counter()


class Unkind(BaseHTTPRequestHandler):
    """Behaves by path."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        HITS[self.path] += 1
        name = self.path.strip("/").partition("?")[0].replace("-", "_") or "root"
        getattr(self, f"on_{name}", self.on_missing)()

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def on_good(self) -> None:
        self.answer(200, b"picture of " + self.headers["Host"].encode())

    def on_missing(self) -> None:
        self.answer(404)

    def on_flaky(self) -> None:
        self.answer(200, b"at last") if HITS["/flaky"] > 1 else self.answer(503, Retry_After="0")

    def on_busy(self) -> None:
        self.answer(429, Retry_After="60")

    def on_loop(self) -> None:
        self.answer(302, Location="/loop")

    def on_hop(self) -> None:
        self.answer(301, Location="http://b.test/good")

    def on_inside(self) -> None:
        self.answer(302, Location="http://169.254.169.254/latest")

    def on_file(self) -> None:
        self.answer(302, Location="file:///etc/passwd")

    def on_optout(self) -> None:
        self.answer(200, b"x" * 100, X_Robots_Tag="otherbot: noarchive, noai")

    def on_large(self) -> None:
        self.answer(200, b"x" * 300_000)

    def on_endless(self) -> None:
        self.send_response(200)
        self.end_headers()
        for _ in range(2000):
            self.wfile.write(b"x" * 1000)

    def on_short(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "1000")
        self.end_headers()
        self.wfile.write(b"x" * 10)
        self.close_connection = True

    def on_drip(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "1000")
        self.end_headers()
        for _ in range(100):
            self.wfile.write(b"x")
            time.sleep(0.05)

    def on_dripping_headers(self) -> None:
        for byte in b"HTTP/1.1 200 OK\r\nX-Slow: " + b"y" * 200:
            self.wfile.write(bytes([byte]))
            time.sleep(0.05)

    def on_never(self) -> None:
        time.sleep(3)

    def log_message(self, *_: Any) -> None:
        """Says nothing."""


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Unkind)
    server.daemon_threads = True
    server.handle_error = lambda *_: None  # type: ignore[method-assign]  # clients that leave early are the point here
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def fetcher(address: str) -> Fetcher:
    HITS.clear()
    settings = replace(compose([]).dataset.download, deadline_seconds=1.0, max_bytes=200_000, retries=1)
    return Fetcher(settings, address)


def reason(fetcher: Fetcher, url: str) -> str:
    with pytest.raises(FetchError) as error:
        fetcher.fetch(url)
    return error.value.reason


def test_a_picture_comes_whole_and_the_host_is_asked_for_by_its_name(fetcher: Fetcher) -> None:
    assert fetcher.fetch("http://a.test/good") == b"picture of a.test"
    assert fetcher.fetch("http://a.test/hop") == b"picture of b.test"


@pytest.mark.parametrize("path, expected, hits", [
    ("missing", "http_404", 1), ("loop", "redirect_loop", 4), ("inside", "blocked_address", 1), ("file", "scheme", 1),
    ("optout", "opt_out", 1), ("large", "too_large", 1), ("endless", "too_large", 1), ("short", "connection", 2),
    ("busy", "http_429", 1),
])  # fmt: skip
def test_each_misfortune_has_one_word_and_only_what_may_help_is_tried_again(
    fetcher: Fetcher, path: str, expected: str, hits: int
) -> None:
    assert reason(fetcher, f"http://a.test/{path}") == expected
    assert HITS[f"/{path}"] == hits


def test_what_passes_is_tried_again(fetcher: Fetcher) -> None:
    assert fetcher.fetch("http://a.test/flaky") == b"at last"


@pytest.mark.parametrize("path", ["drip", "dripping-headers", "never"])
def test_the_deadline_is_for_all_that_a_url_costs(fetcher: Fetcher, path: str) -> None:
    started = time.monotonic()
    assert reason(fetcher, f"http://a.test/{path}") == "timeout"
    assert time.monotonic() - started < 1.6


def test_without_the_watchdog_dripping_headers_hold_a_worker(
    fetcher: Fetcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sabotage twin: the deadline of each read is kept by a drip for ever; only the watchdog ends it."""
    monkeypatch.setattr(fetcher.watchdog, "watch", lambda sock, deadline: None)
    started = time.monotonic()
    reason(fetcher, "http://a.test/dripping-headers")
    assert time.monotonic() - started > 3


FORBIDDEN = [
    "file:///etc/passwd", "ftp://a.test/x", "data:text/plain,hi", "gopher://a.test/", "//a.test/x", "", "http://",
    "http://127.0.0.1/", "http://127.1/", "http://0x7f000001/", "http://2130706433/", "http://0177.0.0.1/",
    "http://0/", "http://0.0.0.0/", "http://[::1]/", "http://[::]/", "http://[::ffff:127.0.0.1]/",
    "http://[::ffff:7f00:1]/", "http://[64:ff9b::7f00:1]/", "http://[2002:7f00:1::]/", "http://10.0.0.1/",
    "http://172.16.0.1/", "http://192.168.1.1/", "http://169.254.169.254/latest/meta-data/", "http://100.64.0.1/",
    "http://[fe80::1]/", "http://[fc00::1]/", "http://224.0.0.1/", "http://255.255.255.255/", "http://localhost/",
    "http://localhost./", "http://user@127.0.0.1/", "http://user:pw@a.test/good", "http://127.0.0.1:80/",
    "http://a.test:22/", "http://a.test:6379/", "http://a.test:99999/", "https://127.0.0.1/", "http://[::1%25lo]/",
]  # fmt: skip


def test_no_connection_is_made_to_an_address_that_is_not_public(
    fetcher: Fetcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []
    connect = socket.create_connection
    monkeypatch.setattr(socket, "create_connection", lambda *a, **k: made.append(a) or connect(*a, **k))
    reasons = {url: reason(fetcher, url) for url in FORBIDDEN}
    assert not made and not HITS
    assert set(reasons.values()) <= {"scheme", "bad_url", "port", "blocked_address", "dns"}


def test_a_name_that_leads_inside_is_blocked_whatever_else_it_leads_to(
    fetcher: Fetcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (ip, 0)) for ip in ("93.184.216.34", "127.0.0.1")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: answers)
    assert reason(fetcher, "http://rebinding.example/") == "blocked_address"


def test_public_addresses_are_public() -> None:
    assert all(map(is_public, ("93.184.216.34", "2606:2800:220:1:248:1893:25c8:1946", "64:ff9b::5db8:d822")))


def test_robots_txt_is_asked_once_and_obeyed(fetcher: Fetcher, monkeypatch: pytest.MonkeyPatch) -> None:
    def rules(self: Unkind) -> None:
        self.answer(200, b"User-agent: *\nDisallow: /private/\n")

    monkeypatch.setattr(Unkind, "on_robots.txt", rules, raising=False)
    assert reason(fetcher, "http://r.test/private/good") == "robots"
    assert fetcher.fetch("http://r.test/good")
    assert HITS["/robots.txt"] == 1 and "/private/good" not in HITS


def test_connections_are_reused(fetcher: Fetcher, monkeypatch: pytest.MonkeyPatch) -> None:
    fetcher.settings = replace(fetcher.settings, respect_robots=False)
    opened: list[Any] = []
    original = Fetcher._open
    monkeypatch.setattr(Fetcher, "_open", lambda self, *a: opened.append(a) or original(self, *a))
    for _ in range(5):
        fetcher.fetch("http://a.test/good")
    assert len(opened) == 1


def test_a_host_is_asked_no_more_often_than_its_budget_allows(fetcher: Fetcher) -> None:
    fetcher.settings = replace(fetcher.settings, requests_per_second=20.0, respect_robots=False)
    started = time.monotonic()
    for _ in range(9):
        fetcher.fetch("http://a.test/good")
    assert time.monotonic() - started >= 8 / 20

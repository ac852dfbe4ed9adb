"""Fetches one URL safely and politely.

Safe: http and https only, on their own ports; every host, also after a redirect, must resolve to public addresses only,
and the connection goes to the very address that was checked; a total deadline for all that a URL may cost, a cap on
its bytes, a few redirects. Polite: an honest user agent, robots.txt, opt-out headers read before the body, a budget for
each host and process, and retries only where a retry can help. Whatever goes wrong becomes one short word.
"""

from __future__ import annotations

import ipaddress
import socket
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass
from http.client import HTTPException
from urllib.parse import quote, urljoin, urlsplit
from urllib.robotparser import RobotFileParser

from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.exceptions import HTTPError, SSLError
from urllib3.response import BaseHTTPResponse

from pipelines.settings import DownloadConfig

PORTS = {"http": 80, "https": 443}
REDIRECTS = (301, 302, 303, 307, 308)
WORTH_RETRYING = ("http_429", "http_500", "http_502", "http_503", "http_504", "timeout", "connection")
OPT_OUT = ("noai", "noimageai", "noindex", "noimageindex", "noml", "none")
CHUNK_BYTES = 1 << 16
ROBOTS_BYTES = 1 << 19
IDLE_CONNECTIONS = 64


class FetchError(Exception):
    """A URL that gives no picture; `reason` is one short word for the ledger."""

    def __init__(self, reason: str, retry_after: float = 0.0) -> None:
        super().__init__(reason)
        self.reason, self.retry_after = reason, retry_after


@dataclass(frozen=True)
class Target:
    """Where a URL leads, checked: the address to connect to, and the host to ask for."""

    scheme: str
    host: str
    address: str
    port: int
    path: str

    @property
    def origin(self) -> tuple[str, str, str, int]:
        return self.scheme, self.host, self.address, self.port


class Watchdog(threading.Thread):
    """Shuts the sockets whose deadline has passed, so that a server that drips headers or bytes holds nobody."""

    def __init__(self) -> None:
        super().__init__(name="fetch-watchdog", daemon=True)
        self.deadlines: dict[socket.socket, float] = {}
        self.lock = threading.Lock()
        self.start()

    def watch(self, sock: socket.socket, deadline: float) -> None:
        with self.lock:
            self.deadlines[sock] = deadline

    def forget(self, sock: socket.socket) -> None:
        with self.lock:
            self.deadlines.pop(sock, None)

    def run(self) -> None:
        while True:
            time.sleep(0.05)
            now = time.monotonic()
            with self.lock:
                for sock in [sock for sock, deadline in self.deadlines.items() if deadline < now]:
                    del self.deadlines[sock]
                    try:
                        sock.shutdown(socket.SHUT_RDWR)
                    except OSError:  # already closed by the other side
                        continue


class Fetcher:
    """Fetches for one process; threads share its connections, its budgets and what it knows of robots.txt."""

    def __init__(self, settings: DownloadConfig, connect: str | None) -> None:
        self.settings, self.connect = settings, connect
        self.watchdog = Watchdog()
        self.idle: OrderedDict[tuple[str, str, str, int], list[HTTPConnection]] = OrderedDict()
        self.robots: dict[tuple[str, str], RobotFileParser] = {}
        self.next_free: dict[str, float] = {}
        self.lock = threading.Lock()

    def fetch(self, url: str) -> bytes:
        """The bytes behind a URL. Raises FetchError with a one-word reason, and nothing else."""
        tries = self.settings.retries + 1
        deadline = time.monotonic() + self.settings.deadline_seconds
        for attempt in range(tries):
            try:
                return self._follow(url, deadline)
            except FetchError as error:
                wait = max(error.retry_after, self.settings.backoff_seconds * 2**attempt)
                late = time.monotonic() + wait > deadline
                if error.reason not in WORTH_RETRYING or attempt + 1 == tries or late:
                    raise
                time.sleep(wait)
        raise AssertionError("unreachable: the last try returns or raises")

    def _follow(self, url: str, deadline: float) -> bytes:
        for _ in range(self.settings.max_redirects + 1):
            target = self._resolve(url)
            if self.settings.respect_robots and not self._allowed(url, target, deadline):
                raise FetchError("robots")
            self._await_budget(target.host)
            location, body = self._get(target, deadline, self.settings.max_bytes)
            if location is None:
                return body
            url = urljoin(url, location)
        raise FetchError("redirect_loop")

    # -- where to -----------------------------------------------------------------------------------------------------
    def _resolve(self, url: str) -> Target:
        """Checks a URL and finds the one address that it may be fetched from."""
        try:
            parts = urlsplit(url.strip())
            host, port = (parts.hostname or "").rstrip("."), parts.port
            host = host.encode("idna").decode()
        except (ValueError, UnicodeError) as error:
            raise FetchError("bad_url") from error
        if parts.scheme not in PORTS:
            raise FetchError("scheme")
        if not host or parts.username is not None:
            raise FetchError("bad_url")
        if port not in (None, PORTS[parts.scheme]):
            raise FetchError("port")
        path = quote(parts.path or "/", safe="/%:@!$&'()*+,;=~-._")
        if parts.query:
            path += "?" + quote(parts.query, safe="/%:@!$&'()*+,;=~-._?")
        if self.connect is not None and host.endswith(".test"):
            address, _, mapped = self.connect.rpartition(":")
            return Target(parts.scheme, host, address, int(mapped), path)
        return Target(parts.scheme, host, public_address(host), PORTS[parts.scheme], path)

    def _allowed(self, url: str, target: Target, deadline: float) -> bool:
        """What robots.txt says. A host without one allows everything; one that cannot say forbids everything."""
        key = (target.scheme, target.host)
        if key not in self.robots:
            parser = RobotFileParser()
            file = Target(target.scheme, target.host, target.address, target.port, "/robots.txt")
            try:
                location, body = self._get(file, deadline, ROBOTS_BYTES)
                parser.parse([] if location else body.decode("utf-8", "replace").splitlines())
            except FetchError as error:
                if not error.reason.startswith("http_4"):
                    raise
                parser.parse([])
            self.robots[key] = parser
        return self.robots[key].can_fetch(self.settings.user_agent, url)

    def _await_budget(self, host: str) -> None:
        """Keeps this process to so many requests a second for each host; waiting does not count towards a deadline."""
        if self.settings.requests_per_second is None:
            return
        with self.lock:
            now = time.monotonic()
            at = max(now, self.next_free.get(host, 0.0))
            self.next_free[host] = at + 1 / self.settings.requests_per_second
        time.sleep(at - now)

    # -- the wire -----------------------------------------------------------------------------------------------------
    def _get(self, target: Target, deadline: float, max_bytes: int) -> tuple[str | None, bytes]:
        """(where a redirect leads or None, body). An idle connection that turns out dead is replaced once."""
        connection = self._take_idle(target)
        if connection is not None:
            try:
                return self._exchange(connection, target, deadline, max_bytes)
            except FetchError as error:
                if error.reason != "connection":
                    raise
        return self._exchange(self._open(target, deadline), target, deadline, max_bytes)

    def _open(self, target: Target, deadline: float) -> HTTPConnection:
        left = max(deadline - time.monotonic(), 0.001)
        if target.scheme == "https":
            return HTTPSConnection(target.address, target.port, timeout=left, server_hostname=target.host,
                                   assert_hostname=target.host)
        return HTTPConnection(target.address, target.port, timeout=left)

    def _exchange(
        self, connection: HTTPConnection, target: Target, deadline: float, max_bytes: int
    ) -> tuple[str | None, bytes]:
        try:
            connection.timeout = max(deadline - time.monotonic(), 0.001)
            if connection.sock is None:
                connection.connect()
            assert connection.sock is not None
            self.watchdog.watch(connection.sock, deadline)
            headers = {"Host": target.host, "User-Agent": self.settings.user_agent, "Accept-Encoding": "identity"}
            connection.request("GET", target.path, headers=headers, preload_content=False, decode_content=False)
            response = connection.getresponse()
            self._check_headers(response, max_bytes)
            location = response.headers.get("Location") if response.status in REDIRECTS else None
            body = _read(response, max_bytes, deadline)
            self._keep(connection, target, response)
            return location, body
        except FetchError:
            self._close(connection)
            raise
        except (OSError, HTTPError, HTTPException, ValueError) as error:
            self._close(connection)
            if time.monotonic() >= deadline or isinstance(error, TimeoutError):
                raise FetchError("timeout") from error
            raise FetchError("tls" if isinstance(error, SSLError) else "connection") from error

    def _check_headers(self, response: BaseHTTPResponse, max_bytes: int) -> None:
        """Leaves before the body where the answer is an error, an opt-out, or too large."""
        if response.status in REDIRECTS:
            return
        if response.status != 200:
            after = response.headers.get("Retry-After", "")
            raise FetchError(f"http_{response.status}", float(after) if after.isdigit() else 0.0)
        directives = response.headers.get("X-Robots-Tag", "").lower().replace(":", ",").split(",")
        if self.settings.respect_robots and {word.strip() for word in directives} & set(OPT_OUT):
            raise FetchError("opt_out")
        length = response.headers.get("Content-Length", "")
        if length.isdigit() and int(length) > max_bytes:
            raise FetchError("too_large")

    def _take_idle(self, target: Target) -> HTTPConnection | None:
        with self.lock:
            idle = self.idle.get(target.origin)
            return idle.pop() if idle else None

    def _keep(self, connection: HTTPConnection, target: Target, response: BaseHTTPResponse) -> None:
        """Keeps a connection for the next URL of its host, unless the server closes it or there are too many."""
        if connection.sock is not None:
            self.watchdog.forget(connection.sock)
        if response.headers.get("Connection", "").lower() == "close" or connection.sock is None:
            self._close(connection)
            return
        with self.lock:
            self.idle.setdefault(target.origin, []).append(connection)
            self.idle.move_to_end(target.origin)
            dropped = self.idle.popitem(last=False)[1] if len(self.idle) > IDLE_CONNECTIONS else []
        for old in dropped:
            old.close()

    def _close(self, connection: HTTPConnection) -> None:
        if connection.sock is not None:
            self.watchdog.forget(connection.sock)
        connection.close()


def _read(response: BaseHTTPResponse, max_bytes: int, deadline: float) -> bytes:
    """The body, chunk by chunk as it comes, so that neither a drip nor a flood goes unnoticed."""
    parts, size = [], 0
    while chunk := response.read1(CHUNK_BYTES):
        parts.append(chunk)
        size += len(chunk)
        if size > max_bytes:
            raise FetchError("too_large")
    # What the watchdog cut off can look like an answer that ended: nothing that comes after the deadline counts.
    if time.monotonic() > deadline:
        raise FetchError("timeout")
    length = response.headers.get("Content-Length", "")
    if length.isdigit() and size != int(length):
        raise FetchError("connection")
    return b"".join(parts)


def public_address(host: str) -> str:
    """One address of a host, all of whose addresses are public. Raises FetchError("dns") or ("blocked_address")."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise FetchError("dns") from error
    addresses = [str(info[4][0]) for info in found]
    if not addresses or not all(is_public(address) for address in addresses):
        raise FetchError("blocked_address")
    return addresses[0]


def is_public(address: str) -> bool:
    """Whether an address belongs to the open internet, also when it hides an IPv4 address inside an IPv6 one."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo and ip.teredo[1])
        if ip in ipaddress.ip_network("64:ff9b::/96"):
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner:
            return is_public(str(inner))
    return ip.is_global and not ip.is_multicast

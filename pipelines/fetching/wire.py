"""One request on one connection, to an address that was checked before, and never past a deadline.

Time-outs of sockets begin anew with every byte that drips in; here a watchdog shuts the connection itself. Connections
are kept open for the next URL of their host.
"""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import partial
from http.client import HTTPException
from io import BytesIO
from mmap import mmap

from urllib3 import HTTPHeaderDict
from urllib3.connection import HTTPConnection
from urllib3.exceptions import HTTPError
from urllib3.exceptions import TimeoutError as WireTimeout
from urllib3.response import BaseHTTPResponse

from pipelines.fetching.room import SMALL_BYTES, Share

REDIRECTS = (301, 302, 303, 307, 308)
CHUNK_BYTES = 1 << 16
IDLE_ORIGINS = 64  # origins whose connections are kept open


class FetchError(Exception):
    """A URL that gives no picture; `reason` is one short word for the ledger."""

    def __init__(self, reason: str, retry_after: float = 0.0) -> None:
        super().__init__(reason)
        self.reason, self.retry_after = reason, retry_after


class Deadline:
    """The moment after which a URL has cost enough. Waiting out of politeness moves it."""

    def __init__(self, seconds: float) -> None:
        self.at = time.monotonic() + seconds

    def left(self) -> float:
        return max(self.at - time.monotonic(), 0.001)

    def passed(self) -> bool:
        return time.monotonic() >= self.at


class Watchdog(threading.Thread):
    """Shuts the connections whose deadline has passed, so that a server that drips headers or bytes holds nobody.

    There is one for a process; it starts when it is first needed.
    """

    def __init__(self) -> None:
        super().__init__(name="watchdog", daemon=True)
        self.deadlines: dict[socket.socket, float] = {}
        self.changed = threading.Condition()
        self.wakes_at = float("inf")

    def watch(self, handle: socket.socket, deadline: Deadline) -> None:
        with self.changed:
            if self.ident is None:
                self.start()
            self.deadlines[handle] = deadline.at
            if deadline.at < self.wakes_at:
                self.changed.notify()

    def forget(self, handle: socket.socket) -> None:
        with self.changed:
            self.deadlines.pop(handle, None)

    def run(self) -> None:
        with self.changed:
            while True:
                now = time.monotonic()
                for handle in [handle for handle, at in self.deadlines.items() if at <= now]:
                    del self.deadlines[handle]
                    _shut(handle)
                self.wakes_at = min(self.deadlines.values(), default=float("inf"))
                self.changed.wait(self.wakes_at - now if self.deadlines else None)


def _shut(handle: socket.socket) -> None:
    try:
        handle.shutdown(socket.SHUT_RDWR)
    except OSError:  # the other side was faster
        return


WATCHDOG = Watchdog()


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


@dataclass(frozen=True)
class Answer:
    """What came back with status 200 or a redirect."""

    headers: HTTPHeaderDict
    location: str | None  # where a redirect leads
    body: bytes | memoryview


@dataclass(frozen=True)
class Line:
    """A connection, and a second handle on its socket for the watchdog: TLS is not shut from beside who reads it."""

    connection: HTTPConnection
    handle: socket.socket

    def close(self) -> None:
        WATCHDOG.forget(self.handle)
        self.connection.close()
        self.handle.close()


class Wire:
    """The connections of one process; threads share them."""

    def __init__(self, user_agent: str) -> None:
        self.user_agent = user_agent
        self.tls = ssl.create_default_context()
        self.idle: OrderedDict[tuple[str, str, str, int], list[Line]] = OrderedDict()
        self.lock = threading.Lock()

    def get(
        self, target: Target, deadline: Deadline, max_bytes: int, share: Share, *,
        check: Callable[[HTTPHeaderDict], None] | None = None, cut: bool = False,
    ) -> Answer:  # fmt: skip
        """Asks for a target. `check` sees the headers before the body comes; `cut` takes the beginning of a long body.

        `share` holds the room that the body takes, until whoever has the body gives it back; waiting for room moves the
        deadline. Raises FetchError, and nothing else. An idle connection that turns out dead is replaced once.
        """
        line = self._take_idle(target)
        if line is not None:
            try:
                return self._exchange(line, target, deadline, max_bytes, share, check, cut)
            except FetchError as error:
                if error.reason != "connection":
                    raise
        return self._exchange(self._open(target, deadline), target, deadline, max_bytes, share, check, cut)

    def _open(self, target: Target, deadline: Deadline) -> Line:
        """Connects to the very address that was checked; TLS asks for, and insists on, the host's name."""
        with _in_a_word(deadline):
            sock = socket.create_connection((target.address, target.port), deadline.left())
            line = Line(HTTPConnection(target.address, target.port), sock.dup())
        line.connection.sock = sock
        WATCHDOG.watch(line.handle, deadline)
        if target.scheme == "https":
            try:
                with _in_a_word(deadline):
                    line.connection.sock = self.tls.wrap_socket(sock, server_hostname=target.host)
            except FetchError:
                line.close()
                raise
        return line

    def _exchange(
        self, line: Line, target: Target, deadline: Deadline, max_bytes: int, share: Share,
        check: Callable[[HTTPHeaderDict], None] | None, cut: bool,
    ) -> Answer:  # fmt: skip
        try:
            with _in_a_word(deadline):
                WATCHDOG.watch(line.handle, deadline)
                line.connection.timeout = deadline.left()
                headers = {"Host": bracketed(target.host), "User-Agent": self.user_agent, "Accept-Encoding": "identity"}
                line.connection.request("GET", target.path, headers=headers, preload_content=False,
                                        decode_content=False)
                response = line.connection.getresponse()
                _check_status(response)
                if check and response.status == 200:
                    check(response.headers)
                body, whole = _read(response, max_bytes, deadline, cut, partial(_make_room, line, deadline, share))
        except FetchError:
            line.close()
            share.free()
            raise
        share.keep(len(body))
        self._keep(line, target, whole and response.headers.get("Connection", "").lower() != "close")
        location = response.headers.get("Location") if response.status in REDIRECTS else None
        return Answer(response.headers, location, body)

    def _take_idle(self, target: Target) -> Line | None:
        with self.lock:
            idle = self.idle.get(target.origin)
            return idle.pop() if idle else None

    def _keep(self, line: Line, target: Target, usable: bool) -> None:
        """Keeps a connection for the next URL of its host, unless the server closes it or there are too many."""
        if not usable or line.connection.sock is None:
            line.close()
            return
        WATCHDOG.forget(line.handle)
        with self.lock:
            self.idle.setdefault(target.origin, []).append(line)
            self.idle.move_to_end(target.origin)
            dropped = self.idle.popitem(last=False)[1] if len(self.idle) > IDLE_ORIGINS else []
        for old in dropped:
            old.close()

    def close(self) -> None:
        """Closes what is idle."""
        with self.lock:
            lines = [line for idle in self.idle.values() for line in idle]
            self.idle.clear()
        for line in lines:
            line.close()


def bracketed(host: str) -> str:
    """A host as it stands in a URL: IPv6 addresses in brackets."""
    return f"[{host}]" if ":" in host else host


@contextmanager
def _in_a_word(deadline: Deadline) -> Iterator[None]:
    """Turns whatever a connection may raise into a FetchError."""
    try:
        yield
    except (OSError, HTTPError, HTTPException, ValueError) as error:
        if deadline.passed() or isinstance(error, TimeoutError | WireTimeout):
            raise FetchError("timeout") from error
        # A certificate that does not fit stays so; a connection that breaks off under TLS is like any other.
        lasting = isinstance(error, ssl.SSLError) and not isinstance(error, ssl.SSLEOFError)
        raise FetchError("tls" if lasting else "connection") from error


def _check_status(response: BaseHTTPResponse) -> None:
    if response.status != 200 and response.status not in REDIRECTS:
        raise FetchError(f"http_{response.status}", retry_after(response.headers.get("Retry-After", "")))


def retry_after(text: str) -> float:
    """Seconds that a server asks to be left alone, given as a number or as a date; 0 for what is neither."""
    if text.isascii() and text.isdigit():
        return float(text)
    try:
        return max((parsedate_to_datetime(text) - datetime.now(UTC)).total_seconds(), 0.0)
    except (TypeError, ValueError, IndexError):
        return 0.0


def _make_room(line: Line, deadline: Deadline, share: Share, size: int) -> None:
    """Waits for the room of a large body. Meanwhile its server waits too, and no deadline passes."""
    WATCHDOG.forget(line.handle)
    deadline.at += share.take(size)
    WATCHDOG.watch(line.handle, deadline)


def _read(
    response: BaseHTTPResponse, max_bytes: int, deadline: Deadline, cut: bool, make_room: Callable[[int], None]
) -> tuple[bytes | memoryview, bool]:
    """(body, whether it is all), chunk by chunk as it comes, so that neither a drip nor a flood goes unnoticed.

    A large one lies in pages of its own, which go back with it: malloc keeps for each thread what it once had.
    """
    length = response.headers.get("Content-Length", "")
    told = int(length) if length.isascii() and length.isdigit() else None
    if told is not None and told > max_bytes and not cut:
        raise FetchError("too_large")
    body: BytesIO | mmap = BytesIO()
    size, most = 0, max_bytes if told is None else min(told, max_bytes)
    while chunk := response.read1(CHUNK_BYTES):
        if size + len(chunk) > most:
            if cut:
                return (body.getvalue() + chunk)[:most], False  # it was small
            raise FetchError("too_large" if told is None else "connection")
        if size <= SMALL_BYTES < size + len(chunk):
            make_room(most)
            body = _in_pages(body.getvalue(), most)
        body.write(chunk)
        size += len(chunk)
    # What the watchdog cut off can look like an answer that ended: nothing that comes after the deadline counts.
    if deadline.passed():
        raise FetchError("timeout")
    if told is not None and size != told:
        raise FetchError("connection")
    return body.getvalue() if isinstance(body, BytesIO) else memoryview(body)[:size], True


def _in_pages(start: bytes, size: int) -> mmap:
    pages = mmap(-1, size)
    pages.write(start)
    return pages

"""Fetches one URL safely and politely.

Safe: http and https only, on their own ports; every host, also after a redirect, must resolve to public addresses only,
and the connection goes to the very address that was checked; a total deadline for all that a URL may cost, a cap on its
bytes and on those of all bodies together, a few redirects. Polite: an honest user agent, robots.txt, opt-out headers
read before the body, a budget for each host (of all workers of a run, where they share one), and retries only where a
retry can help. Whatever goes wrong becomes one short word.
"""

from __future__ import annotations

import random
import socket
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import TypeVar
from urllib.parse import quote, urljoin, urlsplit

from urllib3 import HTTPHeaderDict

from pipelines.fetching.addresses import AddressError, Names
from pipelines.fetching.budgets import Ask, HostBudgets, Turns
from pipelines.fetching.robots import Robots, parse_robots
from pipelines.fetching.room import SMALL_BYTES, Room, Share
from pipelines.fetching.wire import Deadline, FetchError, Target, Wire, bracketed
from pipelines.settings import DownloadConfig

PORTS = {"http": 80, "https": 443}
WORTH_RETRYING = ("http_429", "http_500", "http_502", "http_503", "http_504", "timeout", "connection")
OPT_OUT = ("noai", "noimageai", "noindex", "noimageindex", "noml", "none")
KEPT_BY_QUOTE = "/%:@!$&'()*+,;=~-._"
STAND_IN_GONE = "stand_in_gone"  # the one reason that says nothing about the URL: our own server has ended
ROBOTS_BYTES = SMALL_BYTES
ROBOTS_SECONDS = 24 * 3600.0  # after which a host is asked again
NO_ROBOTS_SECONDS = 600.0  # after which a host is that could not say; RFC 9309 bounds it by what is reasonable
LARGEST_BODIES = 4  # of max_bytes each, that a process has room for at once; or more that are smaller
HOSTS_KEPT = 10_000  # hosts that a process remembers
Found = TypeVar("Found")


class Host:
    """What a process knows of a host."""

    def __init__(self) -> None:
        self.asking = threading.Lock()
        # scheme -> rules, or in one word why the host cannot say; and until when that holds
        self.robots: dict[str, tuple[Robots | str, float]] = {}


class ForbiddenError(FetchError):
    """A URL of a host that cannot say what it allows: the host was asked for all its URLs, and is left alone."""


class Fetcher:
    """Fetches for one process; threads share its connections, its budgets and what it knows of robots.txt.

    The budgets are its own until it is handed those of all workers by `share`.
    """

    def __init__(self, settings: DownloadConfig, connect: str | None) -> None:
        address, _, port = (connect or "").rpartition(":")
        if connect is not None and not (address and port.isdigit()):
            raise ValueError(f"dataset.connect={connect}; expected ADDRESS:PORT, or null")
        self.settings = settings
        self.stand_in = (address, int(port)) if connect is not None else None
        self.wire, self.room = Wire(settings.user_agent), Room(LARGEST_BODIES * settings.max_bytes)
        self.names = Names()
        rate = settings.requests_per_second
        self.turns = None if rate is None else Turns(HostBudgets().ask, rate)
        self.hosts: OrderedDict[str, Host] = OrderedDict()
        self.lock = threading.Lock()

    def fetch(self, url: str, share: Share | None = None) -> bytes | memoryview:
        """The bytes behind a URL. Raises FetchError with a one-word reason, and nothing else.

        They take room in memory, which a `share` holds until it is given back; without one they are not counted.
        """
        deadline, held = Deadline(self.settings.deadline_seconds), share or Share(self.room)
        try:
            return self._try(lambda: self._follow(url, deadline, held), deadline)
        except FetchError as error:
            if error.reason == "connection" and not self._stand_in_answers():
                raise FetchError(STAND_IN_GONE) from error
            raise
        finally:
            if share is None:
                held.free()

    def _try(self, ask: Callable[[], Found], deadline: Deadline) -> Found:
        """What `ask` returns, asked again after a pause where that can help and the deadline allows it."""
        tried = 0
        while True:
            try:
                return ask()
            except ForbiddenError:
                raise
            except FetchError as error:
                backoff = self.settings.backoff_seconds * 2**tried * random.uniform(1, 1.5)
                wait = max(error.retry_after, backoff)
                if error.reason not in WORTH_RETRYING or tried == self.settings.retries or wait >= deadline.left():
                    raise
            time.sleep(wait)
            tried += 1

    def share(self, ask: Ask) -> None:
        """Takes the turns of its hosts from budgets that others use too."""
        if self.turns is not None:
            self.turns.ask = ask

    def close(self) -> None:
        """Closes the connections that are kept for the next URL."""
        self.wire.close()

    def _follow(self, url: str, deadline: Deadline, share: Share) -> bytes | memoryview:
        for _ in range(self.settings.max_redirects + 1):
            target = self._resolve(url, deadline)
            if self.settings.respect_robots and not self._robots(target, deadline).allows(target.path):
                raise FetchError("robots")
            deadline.at += self._await_turn(target.host)
            answer = self.wire.get(target, deadline, self.settings.max_bytes, share, check=self._refuse_opt_out)
            if answer.location is None:
                return answer.body
            share.free()
            url = _join(url, answer.location)
        raise FetchError("redirect_loop")

    # -- where to -----------------------------------------------------------------------------------------------------
    def _resolve(self, url: str, deadline: Deadline) -> Target:
        """Checks a URL and finds the one address that it may be fetched from."""
        try:
            parts = urlsplit(url.strip())
            host, port = (parts.hostname or "").rstrip("."), parts.port
            host = host.encode("idna").decode()
            path = quote(parts.path or "/", safe=KEPT_BY_QUOTE)
            path += "?" + quote(parts.query, safe=KEPT_BY_QUOTE + "?") if parts.query else ""
        except (ValueError, UnicodeError) as error:
            raise FetchError("bad_url") from error
        if parts.scheme not in PORTS:
            raise FetchError("scheme")
        if not host or parts.username is not None:
            raise FetchError("bad_url")
        if port not in (None, PORTS[parts.scheme]):
            raise FetchError("port")
        if self.stand_in is not None and host.endswith(".test"):
            return Target(parts.scheme, host, *self.stand_in, path)
        try:
            return Target(parts.scheme, host, self.names.address(host, deadline.left()), PORTS[parts.scheme], path)
        except AddressError as error:
            raise FetchError(error.reason) from error

    def _stand_in_answers(self) -> bool:
        if self.stand_in is None:
            return True
        try:
            socket.create_connection(self.stand_in, self.settings.deadline_seconds).close()
        except OSError:
            return False
        return True

    # -- manners ------------------------------------------------------------------------------------------------------
    def _host(self, name: str) -> Host:
        with self.lock:
            host = self.hosts.setdefault(name, Host())
            self.hosts.move_to_end(name)
            if len(self.hosts) > HOSTS_KEPT:
                self.hosts.popitem(last=False)
            return host

    def _robots(self, target: Target, deadline: Deadline) -> Robots:
        """What robots.txt allows; one thread asks, the others of the host wait for its answer.

        It is asked for all URLs of the host, so that whoever asks or waits loses nothing of its own deadline.
        """
        begun, host = time.monotonic(), self._host(target.host)
        with host.asking:
            said, until = host.robots.get(target.scheme, ("", 0.0))
            if time.monotonic() >= until:
                said, seconds = self._ask_robots(target)
                host.robots[target.scheme] = said, time.monotonic() + seconds
        deadline.at += time.monotonic() - begun
        if isinstance(said, str):
            raise ForbiddenError(said)
        return said

    def _ask_robots(self, target: Target) -> tuple[Robots | str, float]:
        """(the rules of a host, or in one word why it cannot say; for how many seconds that holds)."""
        deadline = Deadline(self.settings.deadline_seconds)
        try:
            text = self._try(lambda: self._robots_text(target, deadline), deadline)
        except FetchError as error:
            return error.reason, max(NO_ROBOTS_SECONDS, min(error.retry_after, ROBOTS_SECONDS))
        return parse_robots(text, self.settings.user_agent), ROBOTS_SECONDS

    def _robots_text(self, target: Target, deadline: Deadline) -> str:
        """A host without robots.txt allows everything (4xx); one that cannot say forbids everything (it raises)."""
        url = f"{target.scheme}://{bracketed(target.host)}/robots.txt"
        for _ in range(self.settings.max_redirects + 1):
            at = self._resolve(url, deadline)
            deadline.at += self._await_turn(at.host)
            try:
                answer = self.wire.get(at, deadline, ROBOTS_BYTES, Share(self.room), cut=True)
            except FetchError as error:
                if error.reason.startswith("http_4") and error.reason != "http_429":
                    return ""
                raise
            if answer.location is None:
                return bytes(answer.body).decode("utf-8", "replace")
            url = _join(url, answer.location)
        return ""  # RFC 9309: after enough redirects there is none

    def _await_turn(self, host: str) -> float:
        """Waits until the budget of a host allows a request. Returns the seconds that were waited."""
        return 0.0 if self.turns is None else self.turns.wait(host)

    def _refuse_opt_out(self, headers: HTTPHeaderDict) -> None:
        """X-Robots-Tag, for whichever robot it is meant, and the W3C group's TDM-Reservation."""
        directives = headers.get("X-Robots-Tag", "").lower().replace(":", ",").split(",")
        reserved = headers.get("TDM-Reservation", "").strip() == "1"
        if self.settings.respect_robots and (reserved or {word.strip() for word in directives} & set(OPT_OUT)):
            raise FetchError("opt_out")


def _join(url: str, location: str) -> str:
    """Where a redirect leads. Many servers send raw UTF-8, which HTTP libraries read as Latin-1."""
    try:
        location = location.encode("latin-1").decode()
    except UnicodeError:
        pass  # it was Latin-1, or escaped as it should be
    try:
        return urljoin(url, location)
    except ValueError as error:
        raise FetchError("bad_url") from error

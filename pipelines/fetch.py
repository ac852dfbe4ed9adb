"""Fetches one URL safely and politely.

Safe: http and https only, on their own ports; every host, also after a redirect, must resolve to public addresses only,
and the connection goes to the very address that was checked; a total deadline for all that a URL may cost, a cap on
its bytes, a few redirects. Polite: an honest user agent, robots.txt, opt-out headers read before the body, a budget
for each host (of all workers of a run, where they share one), and retries only where a retry can help. Whatever goes
wrong becomes one short word.
"""

from __future__ import annotations

import random
import socket
import threading
import time
from collections import OrderedDict
from urllib.parse import quote, urljoin, urlsplit

from urllib3 import HTTPHeaderDict

from pipelines.addresses import AddressError, public_address
from pipelines.budgets import Ask, HostBudgets, Turns
from pipelines.robots import Robots, parse_robots
from pipelines.settings import DownloadConfig
from pipelines.wire import Deadline, FetchError, Target, Wire, bracketed

PORTS = {"http": 80, "https": 443}
WORTH_RETRYING = ("http_429", "http_500", "http_502", "http_503", "http_504", "timeout", "connection")
OPT_OUT = ("noai", "noimageai", "noindex", "noimageindex", "noml", "none")
KEPT_BY_QUOTE = "/%:@!$&'()*+,;=~-._"
STAND_IN_GONE = "stand_in_gone"  # the one reason that says nothing about the URL: our own server has ended
ROBOTS_BYTES = 1 << 19
ROBOTS_SECONDS = 24 * 3600.0  # after which a host is asked again
HOSTS_KEPT = 10_000  # hosts that a process remembers


class Host:
    """What a process knows of a host."""

    def __init__(self) -> None:
        self.asking = threading.Lock()
        self.robots: dict[str, tuple[Robots, float]] = {}  # scheme -> rules, and until when they hold


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
        self.wire = Wire(settings.user_agent)
        rate = settings.requests_per_second
        self.turns = None if rate is None else Turns(HostBudgets().ask, rate)
        self.hosts: OrderedDict[str, Host] = OrderedDict()
        self.lock = threading.Lock()

    def fetch(self, url: str) -> bytes:
        """The bytes behind a URL. Raises FetchError with a one-word reason, and nothing else."""
        deadline, tried = Deadline(self.settings.deadline_seconds), 0
        while True:
            try:
                return self._follow(url, deadline)
            except FetchError as error:
                backoff = self.settings.backoff_seconds * 2**tried * random.uniform(1, 1.5)
                wait = max(error.retry_after, backoff)
                if error.reason not in WORTH_RETRYING or tried == self.settings.retries or wait >= deadline.left():
                    if error.reason == "connection" and not self._stand_in_answers():
                        raise FetchError(STAND_IN_GONE) from error
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

    def _follow(self, url: str, deadline: Deadline) -> bytes:
        for _ in range(self.settings.max_redirects + 1):
            target = self._resolve(url, deadline)
            if self.settings.respect_robots and not self._robots(target, deadline).allows(target.path):
                raise FetchError("robots")
            deadline.at += self._await_turn(target.host)
            answer = self.wire.get(target, deadline, self.settings.max_bytes, check=self._refuse_opt_out)
            if answer.location is None:
                return answer.body
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
            return Target(parts.scheme, host, public_address(host, deadline.left()), PORTS[parts.scheme], path)
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
        """What robots.txt allows; one thread asks, the others of the host wait for its answer."""
        host = self._host(target.host)
        if not host.asking.acquire(timeout=deadline.left()):
            raise FetchError("timeout")
        try:
            rules, until = host.robots.get(target.scheme, (Robots(), 0.0))
            if time.monotonic() >= until:
                rules = parse_robots(self._robots_text(target, deadline), self.settings.user_agent)
                host.robots[target.scheme] = rules, time.monotonic() + ROBOTS_SECONDS
            return rules
        finally:
            host.asking.release()

    def _robots_text(self, target: Target, deadline: Deadline) -> str:
        """A host without robots.txt allows everything (4xx); one that cannot say forbids everything (it raises)."""
        url = f"{target.scheme}://{bracketed(target.host)}/robots.txt"
        for _ in range(self.settings.max_redirects + 1):
            at = self._resolve(url, deadline)
            deadline.at += self._await_turn(at.host)
            try:
                answer = self.wire.get(at, deadline, ROBOTS_BYTES, cut=True)
            except FetchError as error:
                if error.reason.startswith("http_4") and error.reason != "http_429":
                    return ""
                raise
            if answer.location is None:
                return answer.body.decode("utf-8", "replace")
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

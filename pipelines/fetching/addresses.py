"""Which addresses a fetcher may connect to: public ones only, found within a deadline."""

from __future__ import annotations

import ipaddress
import socket
import threading
import time
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout

# Name lookups under way in one process, as many as there are hosts that do not answer: no lookup can be ended, and its
# own time-outs are longer than a deadline, so that each thread which fetches may have left several behind.
RESOLVERS = ThreadPoolExecutor(512, thread_name_prefix="resolver")
KEPT_SECONDS = 60.0  # for which an answer is used again
NAMES_KEPT = 10_000
GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")  # all that has been given out; the rest of IPv6 leads nowhere public
TRANSLATED = ipaddress.ip_network("64:ff9b::/96")  # an IPv4 address behind NAT64 (RFC 6052)
NOT_GLOBAL = tuple(map(ipaddress.ip_network, ("192.88.99.0/24", "3fff::/20")))  # newer than some versions of Python


class AddressError(Exception):
    """A host that must not or cannot be reached; `reason` is dns or blocked_address."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Names:
    """The addresses of hosts, for one process. Each host is looked up once at a time, for all who ask meanwhile."""

    def __init__(self) -> None:
        self.lookups: OrderedDict[str, tuple[Future[list[str]], float]] = OrderedDict()  # and until when it is used
        self.lock = threading.Lock()

    def address(self, host: str, seconds: float) -> str:
        """One address of a host, all of whose addresses are public. Raises AddressError.

        The system's resolver knows no deadline, so it runs on a thread of its own that may be left behind.
        """
        try:
            addresses = self._lookup(host).result(seconds)
        except (OSError, UnicodeError, FutureTimeout) as error:
            raise AddressError("dns") from error
        if not addresses or not all(map(is_public, addresses)):
            raise AddressError("blocked_address")
        return addresses[0]

    def _lookup(self, host: str) -> Future[list[str]]:
        """A lookup that is under way, or what came of one not long ago; what failed is tried again."""
        with self.lock:
            lookup, until = self.lookups.pop(host, (None, 0.0))
            if lookup is None or (lookup.done() and (time.monotonic() >= until or lookup.exception())):
                lookup, until = RESOLVERS.submit(_addresses, host), time.monotonic() + KEPT_SECONDS
            self.lookups[host] = lookup, until
            if len(self.lookups) > NAMES_KEPT:
                self.lookups.popitem(last=False)
        return lookup


def _addresses(host: str) -> list[str]:
    return [str(info[4][0]) for info in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)]


def is_public(address: str) -> bool:
    """Whether an address belongs to the open internet, also when it hides an IPv4 address inside an IPv6 one."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo and ip.teredo[1])
        if ip in TRANSLATED:
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner:
            return is_public(str(inner))
        if ip not in GLOBAL_UNICAST:
            return False
    return ip.is_global and not ip.is_multicast and not any(ip in network for network in NOT_GLOBAL)

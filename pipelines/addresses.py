"""Which addresses a fetcher may connect to: public ones only, found within a deadline."""

from __future__ import annotations

import ipaddress
import socket
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout

RESOLVERS = ThreadPoolExecutor(32, thread_name_prefix="resolver")  # name lookups under way in one process
GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")  # all that has been given out; the rest of IPv6 leads nowhere public
TRANSLATED = ipaddress.ip_network("64:ff9b::/96")  # an IPv4 address behind NAT64 (RFC 6052)
NOT_GLOBAL = tuple(map(ipaddress.ip_network, ("192.88.99.0/24", "3fff::/20")))  # newer than some versions of Python


class AddressError(Exception):
    """A host that must not or cannot be reached; `reason` is dns or blocked_address."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def public_address(host: str, seconds: float) -> str:
    """One address of a host, all of whose addresses are public. Raises AddressError.

    The system's resolver knows no deadline, so it runs on a thread of its own that may be left behind.
    """
    answer: Future[list[str]] = RESOLVERS.submit(_addresses, host)
    try:
        addresses = answer.result(seconds)
    except (OSError, UnicodeError, FutureTimeout) as error:
        answer.cancel()
        raise AddressError("dns") from error
    if not addresses or not all(map(is_public, addresses)):
        raise AddressError("blocked_address")
    return addresses[0]


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

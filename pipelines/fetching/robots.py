"""robots.txt (RFC 9309): what a host allows us to fetch.

Python's own reader takes the first rule that fits, and a * in a rule for a star; here the longest rule decides, and
`Disallow: /*.jpg$` means what its author meant. Matching is linear, since the files are written by strangers.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import unquote

PRODUCT = re.compile(r"[A-Za-z_-]+")  # the part of a user agent that robots.txt speaks of


@dataclass(frozen=True)
class Robots:
    """The rules for one user agent: (pattern, whether it allows)."""

    rules: tuple[tuple[str, bool], ...] = ()

    def allows(self, path: str) -> bool:
        """Whether a path with its query may be fetched: the longest rule decides, of equal ones the one that allows."""
        path = unquote(path)
        found = [(len(pattern), allow) for pattern, allow in self.rules if matches(pattern, path)]
        return max(found, default=(0, True))[1]


def parse_robots(text: str, user_agent: str) -> Robots:
    """The rules of all groups for our product, or else of those for everybody (*)."""
    product = PRODUCT.match(user_agent)
    ours = product.group().lower() if product else ""
    groups: dict[str, list[tuple[str, bool]]] = {}
    agents: list[str] = []
    naming = False  # several user-agent lines in a row open one group
    for line in text.splitlines():
        field, _, value = (part.strip() for part in line.partition("#")[0].partition(":"))
        field = field.lower()
        if field == "user-agent":
            agents = [*agents, value] if naming else [value]
            for agent in agents:
                groups.setdefault(_product(agent), [])
            naming = True
        elif field in ("allow", "disallow"):
            naming = False
            for agent in agents if value else ():  # an empty rule forbids nothing
                groups[_product(agent)].append((unquote(value), field == "allow"))
    return Robots(tuple(groups.get(ours, groups.get("*", []))))


def _product(agent: str) -> str:
    found = PRODUCT.match(agent)
    return found.group().lower() if found else agent


def matches(pattern: str, path: str) -> bool:
    """Whether a rule fits the beginning of a path; * stands for anything, a last $ for the end of the path."""
    to_end = pattern.endswith("$")
    first, *rest = pattern.removesuffix("$").split("*")
    if not path.startswith(first):
        return False
    if to_end and not rest:
        return path == first
    at = len(first)
    last = rest.pop() if to_end else ""
    for piece in rest:  # leftmost is enough: what comes after can only gain from room
        found = path.find(piece, at)
        if found < 0:
            return False
        at = found + len(piece)
    return path.endswith(last) and len(path) - len(last) >= at

"""Fetches shards of an object store before training asks for them.

The order of samples is known at any position at once (ldm/training/order.py), so looking ahead costs nothing but the
look: every so many positions of this process's own are asked which shard they belong to, as far ahead as it takes a
lane to go through a shard. What is not here in time is fetched by whoever reads it; what fails fails there, by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from ldm.node_cache import NodeCache
from ldm.shards import ShardInfo

THREADS = 4  # files that one process fetches at once
LOOKS = 16  # at every shard of every lane, on the average


class Prefetcher:
    """Keeps a node's cache ahead of the positions that one process reads."""

    def __init__(
        self, cache: NodeCache, shards: list[ShardInfo], shard_at: Callable[[int], int], *,
        lanes: int, rank: int, world_size: int,
    ) -> None:  # fmt: skip
        self.cache, self.shards, self.shard_at = cache, shards, shard_at
        samples = max(1, sum(info.samples for info in shards) // len(shards))  # of a shard, on the average
        self.distance = lanes * samples
        steps = max(1, samples // LOOKS)
        while math.gcd(steps, lanes) > 1:  # so that the looks go round all lanes
            steps += 1
        self.stride, self.next, self.first = steps * world_size, rank, rank
        self.asked: dict[int, None] = {}  # newest last
        self.threads = ThreadPoolExecutor(THREADS, thread_name_prefix="prefetch")

    def follow(self, position: int) -> None:
        """Has fetched what comes after a position of this process."""
        if position < self.first or position > self.next:  # another start
            self.next = position
        self.first = position
        while self.next < position + self.distance:
            self._ask(self.shard_at(self.next))
            self.next += self.stride

    def close(self) -> None:
        self.threads.shutdown(wait=True, cancel_futures=True)

    def _ask(self, shard: int) -> None:
        """Asks for a shard, unless it is one of those asked for lately."""
        known = shard in self.asked
        self.asked.pop(shard, None)
        self.asked[shard] = None
        if len(self.asked) > max(1, len(self.shards) // 2):
            del self.asked[next(iter(self.asked))]
        if not known:
            for stored in self.shards[shard].stored:
                self.threads.submit(self.cache.ahead, stored)

"""Several streams of samples dealt into one: pictures of several shapes, and several caches by weight.

A batch has pictures of one shape. Batches are the units in which shapes are dealt, in proportion to their samples and
in an order of its own for each epoch; inside the batches of one shape, positions are the units in which caches are
dealt, their shares fixed within each block of 1,000. With shapes A (twice as many samples) and B, batches of four:

    batch       A      A      B      A      B      A
    position    0..3   4..7   8..11  12..15 16..19 20..23
    of stream   A 0..3 A 4..7 B 0..3 A 8..  B 4..  A 12..

Each stream runs through its own epochs in the order of ldm/training/order.py. Everything is a pure function of the
position, as there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np

from ldm.training.order import Order, shuffled

BLOCK = 1000  # positions within which caches have exactly their shares


class Deal:
    """unit -> (stream, how many of that stream's units came before): fixed shares of each block, shuffled in it."""

    def __init__(self, shares: Sequence[int], *identity: object) -> None:
        self.shares, self.identity = np.asarray(shares, np.int64), identity
        self.block = int(self.shares.sum())
        self._arranged = lru_cache(maxsize=3)(self._arrange)

    def locate(self, unit: int) -> tuple[int, int]:
        number, at = divmod(unit, self.block)
        streams, ranks = self._arranged(number)
        stream = int(streams[at])
        return stream, number * int(self.shares[stream]) + int(ranks[at])

    def unit(self, stream: int, rank: int) -> int:
        """`locate` the other way round: the unit that is a stream's, so many of its units having come before."""
        number, within = divmod(rank, int(self.shares[stream]))
        streams, ranks = self._arranged(number)
        return number * self.block + np.flatnonzero((streams == stream) & (ranks == within)).item()

    def _arrange(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """The streams of a block's units, and each unit's rank among those of its stream."""
        streams = np.repeat(np.arange(len(self.shares), dtype=np.uint32), self.shares)
        streams = streams[shuffled(self.block, *self.identity, number)]
        ranks = np.empty(self.block, np.uint32)
        ranks[np.argsort(streams, kind="stable")] = np.concatenate([np.arange(n, dtype=np.uint32) for n in self.shares])
        return streams, ranks


def shares_of(weights: Sequence[float], block: int) -> list[int]:
    """Whole numbers that add up to `block`, in proportion to weights, by largest remainders; at least 1 for each."""
    exact = np.asarray(weights, np.float64) / sum(weights) * block
    shares = np.maximum(np.floor(exact), 1).astype(int)
    while shares.sum() != block:
        step = 1 if shares.sum() < block else -1
        behind = (exact - shares) * step
        behind[(shares + step) < 1] = -np.inf
        shares[int(np.argmax(behind))] += step
    return shares.tolist()


class MixedOrder:
    """position -> (shard, place among the shard's used samples), over streams of shards.

    `shapes` and `caches` say for each shard which shape its latents have and which cache it belongs to, by number;
    `weights` are those of the caches.
    """

    def __init__(
        self,
        counts: Sequence[int],
        shapes: Sequence[int],
        caches: Sequence[int],
        weights: Sequence[float],
        *,
        seed: int,
        digest: str,
        lanes: int,
        window_shards: int,
        batch_size: int,
    ) -> None:
        used, self.batch_size = np.asarray(counts, np.int64), batch_size
        self.samples = int(used.sum())
        members = np.array(list(zip(shapes, caches, strict=True)), np.int64).reshape(-1, 2)
        self.streams: list[list[Order]] = []  # shape -> caches
        self.deals: list[Deal] = []
        sizes = []
        for shape in sorted(set(shapes)):
            mine = members[:, 0] == shape
            present = [cache for cache in range(len(weights)) if used[mine & (members[:, 1] == cache)].sum()]
            if not present:
                continue
            orders = [
                Order(
                    np.where(mine & (members[:, 1] == cache), used, 0), seed=seed, digest=f"{digest} {shape} {cache}",
                    lanes=lanes, window_shards=window_shards,
                )
                for cache in present
            ]  # fmt: skip
            shares = shares_of([weights[cache] for cache in present], BLOCK) if len(present) > 1 else [1]
            self.streams.append(orders)
            self.deals.append(Deal(shares, seed, digest, "caches", shape))
            sizes.append(int(used[mine].sum()))
        if not sizes:
            raise ValueError(f"no sample is used in any of the {len(used)} shards; widen dataset.selection")
        batches = max(len(sizes), round(self.samples / batch_size))
        self.batches = Deal(shares_of(sizes, batches), seed, digest, "shapes")

    def locate(self, position: int) -> tuple[int, int]:
        """The shard that holds the sample at a position, and the sample's place among those of the shard in use."""
        batch, within = divmod(position, self.batch_size)
        shape, number = self.batches.locate(batch)
        cache, at = self.deals[shape].locate(number * self.batch_size + within)
        return self.streams[shape][cache].locate(at)

    def visits(self, shard: int, place: int) -> Iterator[int]:
        """The positions of a sample, one in each epoch of its stream: `locate` the other way round."""
        ((shape, cache),) = ((i, j) for i, orders in enumerate(self.streams) for j, order in enumerate(orders)
                             if order.counts[shard])  # fmt: skip
        for at in self.streams[shape][cache].visits(shard, place):
            number, within = divmod(self.deals[shape].unit(cache, at), self.batch_size)
            yield self.batches.unit(shape, number) * self.batch_size + within

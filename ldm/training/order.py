"""The order in which training sees samples: a pure function of seed, data and lanes, known at any position at once.

Position p is the p-th sample of a run, counted over all processes; epoch e holds the positions [e*n, e*n + n). Within
an epoch the shards are shuffled and laid end to end, each with its used samples shuffled; that line is cut into `lanes`
pieces, dealt to the lanes in shuffled order. Inside a lane samples are shuffled again in windows of a few shards.
Position p belongs to lane p mod lanes. With six samples in each shard, two lanes and windows of two shards:

    shuffled shards   | shard 2 |  shard 0  | shard 3 |  shard 1  |
    pieces            |         lane 1      |       lane 0        |
    position          0           1           2           3           ...
    lane              0           1           0           1
    sample            3/4         0/1         1/0         2/5         (shard/row)

So neighbours come from many shards, a batch runs through the end of an epoch without a gap, and where the number of
processes divides `lanes` each of them reads its own share of the bytes (but for the shards that a cut divides). Nothing
is kept but a few numbers for each shard, and nothing depends on how many processes or workers there are.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import count

import numpy as np


def philox(*identity: object) -> np.random.Philox:
    """A counter-based source of random bits (Salmon et al. 2011) that belongs to an identity."""
    digest = hashlib.sha256("\0".join(map(str, identity)).encode()).digest()
    return np.random.Philox(key=np.frombuffer(digest[:16], np.uint64))


def shuffled(n: int, *identity: object) -> np.ndarray:
    """The numbers 0..n-1 in the order that belongs to an identity, the same on every machine."""
    return np.argsort(philox(*identity).random_raw(n), kind="stable").astype(np.uint32)


def held_out(digests: Sequence[str], shards: int) -> set[str]:
    """The digests of the shards that are held out: those whose hashes are lowest. At most 5 %, but one in any case."""
    known, most = sorted(set(digests)), max(1, int(0.05 * len(set(digests))))
    if shards and not 0 < shards <= min(most, len(known) - 1):
        raise ValueError(
            f"training.held_out_shards is {shards} of {len(known)} shards; give at most {min(most, len(known) - 1)}, "
            f"5 % of them or one"
        )
    return set(sorted(known, key=lambda digest: hashlib.sha256(f"held out {digest}".encode()).digest())[:shards])


class Order:
    """position -> (shard, place among the shard's used samples)."""

    def __init__(self, counts: Sequence[int], *, seed: int, digest: str, lanes: int, window_shards: int) -> None:
        self.counts = np.asarray(counts, np.int64)  # used samples of each shard
        self.samples = int(self.counts.sum())  # of one epoch
        if self.samples == 0:
            raise ValueError(f"no sample is used in any of the {len(self.counts)} shards; widen dataset.selection")
        self.identity = (seed, digest)
        self.lanes, self.window_shards = lanes, window_shards
        # A batch may touch two epochs; each lane is inside one window, and one more for look-ahead.
        self._epoch = lru_cache(maxsize=3)(self._make_epoch)
        self._window = lru_cache(maxsize=2 * lanes)(self._make_window)
        self._entered: dict[int, _Window] = {}  # the window that was asked for last, by lane: nearly always the next

    def locate(self, position: int) -> tuple[int, int]:
        """The shard that holds the sample at a position, and the sample's place among those of the shard in use."""
        number, lane = position // self.samples, position % self.lanes
        epoch = self._epoch(number)
        at = epoch.offsets[lane] + position // self.lanes
        window = self._entered.get(lane)
        if window is None or window.epoch != number or not window.start <= at < window.end:
            window = self._entered[lane] = self._window(number, lane, epoch.window(lane, at, self.window_shards))
        return window.shards.item(at - window.start), window.places.item(at - window.start)

    def visits(self, shard: int, place: int) -> Iterator[int]:
        """The positions of a sample, one in each epoch: `locate` the other way round. Each costs a window at most."""
        for number in count():
            epoch = self._epoch(number)
            nth = epoch.shards.index(shard)
            rows = shuffled(int(self.counts[shard]), *self.identity, "rows", number, shard)
            at = epoch.begin(nth) + int(np.flatnonzero(rows == place).item())
            lane = epoch.lane(at)
            window = self._window(number, lane, epoch.window(lane, at, self.window_shards))
            among = np.flatnonzero((window.shards == shard) & (window.places == place)).item()
            yield (window.start + among - epoch.offsets[lane]) * self.lanes + lane

    def _make_epoch(self, number: int) -> _Epoch:
        used = np.flatnonzero(self.counts).astype(np.uint32)
        shards = used[shuffled(len(used), *self.identity, "shards", number)]
        dealt = shuffled(self.lanes, *self.identity, "lanes", number)  # which lane has the n-th piece
        start = number * self.samples
        sizes = [_count_of_lane(int(lane), start, start + self.samples, self.lanes) for lane in dealt]
        before = [_first_of_lane(lane, start, self.lanes) // self.lanes for lane in range(self.lanes)]
        return _Epoch(shards, np.cumsum(self.counts[shards]), dealt, np.cumsum([0, *sizes]), before)

    def _make_window(self, number: int, lane: int, window: int) -> _Window:
        epoch = self._epoch(number)
        start, end = epoch.window_bounds(lane, window, self.window_shards)
        shards, places = np.empty(end - start, np.uint32), np.empty(end - start, np.uint32)
        for nth in range(epoch.place(start), epoch.place(end - 1) + 1):
            shard, begin = epoch.shards[nth], epoch.begin(nth)
            rows = shuffled(int(self.counts[shard]), *self.identity, "rows", number, shard)
            low, high = max(start, begin), min(end, epoch.ends[nth])
            shards[low - start : high - start] = shard
            places[low - start : high - start] = rows[low - begin : high - begin]
        order = shuffled(end - start, *self.identity, "window", number, lane, window)
        return _Window(number, start, end, shards[order], places[order])


@dataclass(frozen=True)
class _Window:
    """The samples of a window of one lane, in their order."""

    epoch: int
    start: int  # of the window on the epoch's line
    end: int
    shards: np.ndarray  # of each sample
    places: np.ndarray  # of each sample among those of its shard in use


class _Epoch:
    """One epoch's line of samples: shards end to end, cut into pieces for the lanes."""

    def __init__(
        self, shards: np.ndarray, ends: np.ndarray, dealt: np.ndarray, cuts: np.ndarray, before: list[int]
    ) -> None:
        # Lists, because a look-up in them is ten times quicker than one in an array.
        self.shards: list[int] = shards.tolist()  # in shuffled order
        self.ends: list[int] = ends.tolist()  # where each of them ends on the line
        self.cuts: list[int] = cuts.tolist()  # where each piece begins, and the end of the last
        self.nth: list[int] = np.argsort(dealt).tolist()  # which piece a lane has
        # `before` counts a lane's samples in earlier epochs. Its sample at position p is at offset + p // lanes.
        self.offsets = [self.piece(lane)[0] - count for lane, count in enumerate(before)]

    def piece(self, lane: int) -> tuple[int, int]:
        nth = self.nth[lane]
        return self.cuts[nth], self.cuts[nth + 1]

    def lane(self, at: int) -> int:
        """Which lane has the piece that a point of the line lies in."""
        return self.nth.index(bisect_right(self.cuts, at) - 1)

    def place(self, at: int) -> int:
        """Which of the shuffled shards covers a point of the line."""
        return bisect_right(self.ends, at)

    def begin(self, place: int) -> int:
        return self.ends[place - 1] if place else 0

    def window(self, lane: int, at: int, window_shards: int) -> int:
        """Windows are counted from the first shard of the lane's piece."""
        return (self.place(at) - self.place(self.piece(lane)[0])) // window_shards

    def window_bounds(self, lane: int, window: int, window_shards: int) -> tuple[int, int]:
        start, end = self.piece(lane)
        first = self.place(start) + window * window_shards
        last = min(first + window_shards, len(self.shards)) - 1
        return max(start, self.begin(first)), min(end, self.ends[last])


def _first_of_lane(lane: int, start: int, lanes: int) -> int:
    """The first position from `start` on that belongs to a lane."""
    return start + (lane - start) % lanes


def _count_of_lane(lane: int, start: int, end: int, lanes: int) -> int:
    """How many of the positions [start, end) belong to a lane."""
    return max(0, -(-(end - _first_of_lane(lane, start, lanes)) // lanes))

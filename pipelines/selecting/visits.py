"""When a training sees a sample: positions in its order, computed for each sample by itself."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ldm.shards import read_index

if TYPE_CHECKING:
    from ldm.training.loader import TrainData
    from ldm.training.mixture import MixedOrder
    from ldm.training.order import Order


class NotKnown(Exception):
    """The order in which a training saw its samples cannot be computed any more; the message says why."""


class Way:
    """The order in which a training saw its samples."""

    def __init__(self, trained: TrainData, held: TrainData | None, order: Order | MixedOrder) -> None:
        self.trained, self.held, self.order = trained, held, order
        self.tars = {True: _tars(trained), False: _tars(held) if held else {}}

    def first_visits(
        self, samples: dict[tuple[int, int], list[str]], left_out: tuple[tuple[int, int], ...]
    ) -> dict[str, int]:
        """Key -> the first position of each sample that was not left out, of those that are trained on.

        Samples are given by (cache, shard).
        """
        found = {}
        for shard, keys in samples.items():
            for tar, key, among in self._places(self.trained, self.tars[True].get(shard, ()), keys):
                visits = self.order.visits(tar, among)
                found[key] = next(at for at in visits if not any(a <= at < b for a, b in left_out))
        return found

    def held_out(self, samples: dict[tuple[int, int], list[str]]) -> list[str]:
        """The keys of those that are used, but held out."""
        return [key for shard, keys in samples.items() if self.held is not None
                for _, key, _ in self._places(self.held, self.tars[False].get(shard, ()), keys)]  # fmt: skip

    def _places(self, data: TrainData, tars: Iterable[int], keys: list[str]) -> list[tuple[int, str, int]]:
        """(tar, key, place among those in use) of the samples that are in use."""
        found = []
        for tar in tars:
            info, bits = data.shards[tar], data.used[tar]
            rows = {key: row for row, key in enumerate(read_index(info, data.node_cache)["key"].tolist())}
            used = np.ones(info.samples, bool)
            if bits is not None:
                used = np.unpackbits(np.frombuffer(bits, np.uint8), count=info.samples).astype(bool)
            among = np.cumsum(used) - 1
            found += [(tar, key, int(among[row])) for key in keys
                      if (row := rows.get(key.encode())) is not None and used[row]]  # fmt: skip
        return found


def _tars(data: TrainData) -> dict[tuple[int, int], list[int]]:
    """(cache, shard) -> the numbers of its tars."""
    found = defaultdict(list)
    for i, info in enumerate(data.shards):
        found[data.caches[i] if data.caches else 0, int(Path(info.tar).stem)].append(i)
    return found

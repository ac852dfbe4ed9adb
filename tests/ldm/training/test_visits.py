"""Where a sample is seen is known without looking at any other: the order the other way round."""

from __future__ import annotations

import os
from collections import defaultdict
from itertools import islice

import numpy as np
import pytest

from ldm.training.mixture import MixedOrder
from ldm.training.order import Order

SEED = int(os.environ.get("LDM_TEST_SEED", "0"))


def by_looking(order: Order | MixedOrder, positions: int) -> dict[tuple[int, int], list[int]]:
    found = defaultdict(list)
    for position in range(positions):
        found[order.locate(position)].append(position)
    return found


@pytest.mark.parametrize("lanes, window_shards", [(1, 1), (4, 2), (7, 3), (64, 4)])
def test_visits_are_the_positions_at_which_a_sample_is_found(lanes: int, window_shards: int) -> None:
    counts = np.random.default_rng(SEED).integers(0, 9, 12).tolist()
    order = Order([*counts, 0, 5], seed=SEED, digest="x", lanes=lanes, window_shards=window_shards)
    found = by_looking(order, 3 * order.samples)
    assert len(found) == order.samples
    for (shard, place), positions in found.items():
        assert list(islice(order.visits(shard, place), 3)) == positions


@pytest.mark.parametrize("batch_size", [4, 5])
def test_in_a_mixture_of_shapes_and_caches_too(batch_size: int) -> None:
    counts, shapes, caches = [5, 7, 0, 6, 3, 9], [0, 1, 1, 0, 0, 1], [0, 0, 0, 1, 2, 1]
    order = MixedOrder(counts, shapes, caches, [1.0, 0.4, 2.5], seed=SEED, digest="y", lanes=3, window_shards=2,
                       batch_size=batch_size)  # fmt: skip
    until = 2000
    for (shard, place), positions in by_looking(order, until).items():
        visits = list(islice(order.visits(shard, place), len(positions) + 1))
        assert visits[:-1] == positions and visits[-1] >= until

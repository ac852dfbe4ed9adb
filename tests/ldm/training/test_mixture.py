"""Several shapes and several caches in one sequence: batches of one shape, exact shares, mirrors, the same for all."""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ldm.shards import CorruptSample, ShardInfo, ShardWriter, encode_array
from ldm.training.loader import Draw, Loader, TrainData, mix
from ldm.training.mixture import BLOCK, Deal, MixedOrder, shares_of
from tests.ldm.training.test_loader import check_layouts, make, sequence, take
from tests.ldm.training.tiny import SEED, write_data

SHAPES = [[2, 4, 4], [2, 2, 6], [2, 6, 2]]


def write_shard(folder: Path, number: int, count: int, shape: list[int], mirrored: bool = False) -> ShardInfo:
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(number)
    writer = ShardWriter(folder / f"{number:06d}.tar", folder / f"{number:06d}.index")
    for row in range(count):
        moments = random.standard_normal((2 * shape[0], *shape[1:])).astype(np.float16)
        moments[shape[0] :] = -20
        fields = {"moments.npy": encode_array(moments), "txt": f"{number} {row}".encode()}
        if mirrored:
            other = moments[..., ::-1].copy()
            other[: shape[0]] += 100  # so that it is told apart
            fields["flipped.npy"] = encode_array(other)
        writer.write(f"{number:06d}{row:03d}", fields)
    writer.close()
    sha256 = hashlib.sha256(writer.index.read_bytes()).hexdigest()
    return ShardInfo(str(writer.tar), str(writer.index), count, f"digest {number}", sha256)


@pytest.fixture(scope="module")
def buckets(tmp_path_factory: pytest.TempPathFactory) -> TrainData:
    """Six shards of three shapes, most of them square."""
    folder, counts, of = tmp_path_factory.mktemp("buckets"), [20, 17, 9, 7, 4, 23], [0, 0, 1, 1, 2, 0]
    infos = [write_shard(folder, i, n, SHAPES[k]) for i, (n, k) in enumerate(zip(counts, of, strict=True))]
    return TrainData(infos, [None] * 6, "e", "s", "moments.npy", SHAPES[0], 1.0, shapes=[SHAPES[k] for k in of])


def test_a_deal_gives_each_stream_its_share_of_every_block_and_counts_it_on() -> None:
    deal = Deal([5, 1, 4], SEED, "x")
    seen: list[list[int]] = [[], [], []]
    for block in range(7):
        units = [deal.locate(10 * block + i) for i in range(10)]
        assert Counter(stream for stream, _ in units) == {0: 5, 1: 1, 2: 4}
        for stream, n in units:
            seen[stream].append(n)
    assert [numbers == list(range(len(numbers))) for numbers in seen] == [True] * 3
    assert [deal.locate(i)[0] for i in range(10)] != [deal.locate(10 + i)[0] for i in range(10)]


@pytest.mark.parametrize("weights, block, shares", [
    ([1, 1], 10, [5, 5]), ([2, 1], 10, [7, 3]), ([1, 1, 1], 10, [4, 3, 3]), ([1e9, 1, 1], 10, [8, 1, 1]), ([3], 7, [7]),
])  # fmt: skip
def test_shares_are_whole_add_up_and_leave_nobody_out(weights: list[float], block: int, shares: list[int]) -> None:
    assert shares_of(weights, block) == shares


def test_a_batch_has_one_shape_and_shapes_come_as_often_as_their_samples(buckets: TrainData) -> None:
    batches = take(make(buckets), 40)  # 320 samples of 80
    shapes = Counter(tuple(batch.z0.shape[1:]) for batch in batches)
    # Ten batches make an epoch: seven or eight of the 60 squares, two of the 16, one of the 4.
    assert shapes == {(2, 4, 4): 16 * 7, (2, 2, 6): 16 * 2, (2, 6, 2): 16 * 1}
    for start in range(0, 160, 4):  # four micro batches of a global batch
        assert len({batch.z0.shape for batch in batches[start : start + 4]}) == 1


def test_every_sample_of_every_shape_is_seen(buckets: TrainData) -> None:
    keys = Counter(key for batch in take(make(buckets), 40) for key in batch.keys)
    assert len(keys) == 80
    # Within a shape no sample is seen twice more often than another.
    for shards in ([0, 1, 5], [2, 3], [4]):
        times = [n for key, n in keys.items() if int(key[:6]) in shards]
        assert max(times) - min(times) <= 1


def test_shapes_are_the_same_for_every_layout_and_resume(buckets: TrainData) -> None:
    check_layouts(buckets, 5)
    whole = sequence(buckets, 8)
    assert sequence(buckets, 3, 2) | sequence(buckets, 5, 4, samples_seen=24, micro_batch_size=1) == whole


def test_latents_of_another_shape_than_their_folder_s_are_refused(buckets: TrainData) -> None:
    wrong = replace(buckets, shapes=[SHAPES[1]] * 6)
    with pytest.raises(CorruptSample, match=r"has shape \(4, 4, 4\), expected \(4, 2, 6\)"):
        take(make(wrong), 10)


def test_caches_are_mixed_by_weight_in_every_block(tmp_path: Path) -> None:
    sets = [write_data(tmp_path / name, counts) for name, counts in (("a", [40, 60]), ("b", [900]), ("c", [5]))
            if (tmp_path / name).mkdir() is None]  # fmt: skip
    data = mix(sets, [0.7, 0.2, 0.1])
    loader = make(data, batch_size=50, micro_batch_size=50)
    for block in range(3):
        positions = range(block * BLOCK, (block + 1) * BLOCK)
        caches = Counter(data.caches[loader.order.locate(position)[0]] for position in positions)
        assert caches == {0: 700, 1: 200, 2: 100}
    assert loader.order.locate(10**9)[0] in range(4)
    window = Counter(data.caches[loader.order.locate(position)[0]] for position in range(100))
    assert 55 <= window[0] <= 85  # mixed inside the block too, not one cache after the other
    loader.close()


def test_a_mixture_is_the_same_for_every_layout(tmp_path: Path) -> None:
    sets = [write_data(tmp_path / name, [7, 12]) for name in ("a", "b") if (tmp_path / name).mkdir() is None]
    data = mix(sets, [3, 1])
    check_layouts(data, 4)
    assert sequence(data, 4) != sequence(mix(sets, [1, 3]), 4)
    assert mix(sets, [3, 1]).digest != mix(sets, [1, 3]).digest


def test_caches_that_do_not_fit_together_are_refused(tmp_path: Path) -> None:
    data = write_data(tmp_path, [3])
    with pytest.raises(ValueError, match="scale_factor is 1.0 in the first and 0.5 in another"):
        mix([data, replace(data, scale_factor=0.5)], [1, 1])
    with pytest.raises(ValueError, match=r"2 caches have weights \[1, 0\]; expected one above 0"):
        mix([data, data], [1, 0])


def test_seeking_in_four_hundred_million_samples_of_five_shapes_is_quick() -> None:
    started = time.process_time()
    order = MixedOrder([10_000] * 40_000, [i % 5 for i in range(40_000)], [0] * 40_000, [1.0], seed=SEED, digest="d",
                       lanes=64, window_shards=4, batch_size=2048)  # fmt: skip
    for position in range(1_234_567_890, 1_234_567_890 + 64):
        order.locate(position)
    assert time.process_time() - started < 1


def test_mirrored_pictures_come_as_often_as_the_others_and_by_position(tmp_path: Path) -> None:
    infos = [write_shard(tmp_path, 0, 64, SHAPES[0], mirrored=True)]
    data = TrainData(infos, [None], "e", "s", "moments.npy", SHAPES[0], 1.0)
    loader = Loader(data, Draw(SEED, 1000, 0.0), None, lanes=4, window_shards=1, batch_size=512, micro_batch_size=512)
    batch = loader.batch(range(512))
    mirrored = batch.z0.mean(dim=(1, 2, 3)) > 50
    assert abs(mirrored.float().mean() - 0.5) < 5 * 0.5 / 512**0.5
    again = loader.batch(range(256, 512))
    assert torch.equal(again.z0, batch.z0[256:])
    # The noise, timesteps and captions are those that the same positions have without mirrors.
    plain = replace(data, shards=[write_shard(tmp_path / "plain", 0, 64, SHAPES[0])])
    other = Loader(plain, Draw(SEED, 1000, 0.0), None, lanes=4, window_shards=1, batch_size=512, micro_batch_size=512)
    batches = other.batch(range(512))
    assert torch.equal(batches.eps, batch.eps) and torch.equal(batches.t, batch.t) and batches.keys == batch.keys

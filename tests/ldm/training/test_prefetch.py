"""Latents on a real object store: read through the node's cache, ahead of time, once for all ranks, and checked."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from ldm.node_cache import DamagedFile, NodeCache
from ldm.shards import CorruptSample, ShardInfo, read_index
from ldm.storage import StoredFile, sha256_file
from ldm.training.loader import Draw, Loader, TrainData
from ldm.training.order import Order
from ldm.training.prefetch import LOOKS, Prefetcher
from tests.ldm.training import processes
from tests.ldm.training.tiny import SEED, write_data
from tests.s3_server import BUCKET, VARIABLES, S3Server

STEPS = 12


@pytest.fixture
def on_disk(tmp_path: Path) -> TrainData:
    """Twelve shards of eight samples."""
    (tmp_path / "made").mkdir()
    return write_data(tmp_path / "made", [8] * 12)


def upload(s3: S3Server, data: TrainData, prefix: str, cache: NodeCache) -> TrainData:
    """The same latents on the object store alone."""
    infos = []
    for info in data.shards:
        stored = []
        for path in map(Path, (info.tar, info.index)):
            s3.put(f"{prefix}/{path.name}", path.read_bytes())
            stored.append(StoredFile(f"s3://{BUCKET}/{prefix}/{path.name}", path.stat().st_size, sha256_file(path)))
        infos.append(replace(info, tar=stored[0].place, index=stored[1].place, stored=tuple(stored)))
    s3.requests.clear()
    return replace(data, shards=infos, node_cache=cache)


def sequence(data: TrainData, rank: int = 0, world_size: int = 1, steps: int = STEPS) -> dict[int, str]:
    """position -> key and hash of the latent, as a rank of a training run reads them."""
    loader = Loader(data, Draw(SEED, 10, 0.0), None, lanes=2, window_shards=2, batch_size=8,
                    micro_batch_size=8 // world_size, rank=rank, world_size=world_size, workers=1)  # fmt: skip
    found = {position: f"{key} {hashlib.sha256(z0.numpy().tobytes()).hexdigest()}"
             for batch in islice(loader.batches(0), steps)
             for position, key, z0 in zip(batch.positions.tolist(), batch.keys, batch.z0, strict=True)}  # fmt: skip
    loader.close()
    return found


def as_rank(data: TrainData) -> dict[int, str]:
    return sequence(data, int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))


def gets(s3: S3Server) -> Counter[str]:
    return Counter({name: n for (method, name), n in s3.requests.items() if method == "GET" and "." in name})


def test_ranks_of_a_node_read_what_lies_on_s3_and_fetch_each_shard_once(
    s3: S3Server, on_disk: TrainData, tmp_path: Path
) -> None:
    data = upload(s3, on_disk, "ranks", NodeCache(str(tmp_path / "cache"), 10**9))
    env = {**VARIABLES, "AWS_ENDPOINT_URL": s3.url}
    ranks = processes.run(as_rank, data, world_size=2, env=env)
    assert all(isinstance(found, dict) for found in ranks), ranks
    assert ranks[0] | ranks[1] == sequence(on_disk) and not ranks[0].keys() & ranks[1].keys()
    assert set(gets(s3).values()) == {1} and len(gets(s3)) == 24


def test_a_cache_smaller_than_the_data_is_kept_within_its_limit(
    s3: S3Server, on_disk: TrainData, tmp_path: Path
) -> None:
    """The disk holds eight of twelve shards: two lanes read from two windows of two."""
    size = sum(Path(name).stat().st_size for info in on_disk.shards[:1] for name in (info.tar, info.index))
    data = upload(s3, on_disk, "small", cache := NodeCache(str(tmp_path / "cache"), 8 * size))
    # Six open shards at most, of 12: what was used longest ago goes.
    assert sequence(data, steps=3 * STEPS) == sequence(on_disk, steps=3 * STEPS)
    left = sum(path.stat().st_size for path in cache.root().glob("*.*"))
    assert 4 * size < left <= 8 * size and max(gets(s3).values()) > 1


def test_a_damaged_object_stops_the_run_by_name(s3: S3Server, on_disk: TrainData, tmp_path: Path) -> None:
    data = upload(s3, on_disk, "damaged", NodeCache(str(tmp_path / "cache"), 10**9))
    whole = Path(on_disk.shards[5].tar).read_bytes()
    s3.put("damaged/000005.tar", whole[:600] + bytes([whole[600] ^ 1]) + whole[601:])
    with pytest.raises(DamagedFile, match="s3://bucket/damaged/000005.tar arrived twice with sha256"):
        sequence(data)


def test_a_copy_that_rots_on_the_node_s_disk_is_refused_and_fetched_anew(
    s3: S3Server, on_disk: TrainData, tmp_path: Path
) -> None:
    data = upload(s3, on_disk, "rot", NodeCache(str(tmp_path / "cache"), 10**9))
    expected = sequence(data)
    copy = tmp_path / "cache" / f"{data.shards[3].stored[0].sha256}.tar"
    rotten = bytearray(copy.read_bytes())
    rotten[600] ^= 1
    copy.chmod(0o600)
    copy.write_bytes(rotten)
    with pytest.raises(CorruptSample, match="this node's copy of s3://bucket/rot/000003.tar is removed; start again"):
        sequence(data)
    assert sequence(data) == expected and gets(s3)["000003.tar"] == 2


def test_reading_an_index_fetches_no_tar(s3: S3Server, on_disk: TrainData, tmp_path: Path) -> None:
    cache = NodeCache(str(tmp_path / "cache"), 10**9)
    data = upload(s3, on_disk, "index", cache)
    assert (read_index(data.shards[2], cache) == read_index(on_disk.shards[2])).all()
    assert gets(s3) == {"000002.index": 1}


# -- ahead of time ---------------------------------------------------------------------------------------------------
def prefetcher(s3: S3Server, tmp_path: Path, order: Order, rank: int, world_size: int) -> Prefetcher:
    infos = []
    for shard in range(len(order.counts)):
        data = np.array([shard, rank], np.uint16).tobytes()
        s3.put(f"ahead/{shard:06d}.tar", data)
        stored = StoredFile(f"s3://{BUCKET}/ahead/{shard:06d}.tar", len(data), hashlib.sha256(data).hexdigest())
        infos.append(ShardInfo("", "", int(order.counts[shard]), "", "", (stored,)))
    s3.requests.clear()
    return Prefetcher(NodeCache(str(tmp_path), 10**6), infos, lambda position: order.locate(position)[0],
                      lanes=order.lanes, rank=rank, world_size=world_size)  # fmt: skip


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_fetches_what_its_own_lanes_come_to_next_and_nothing_else(
    s3: S3Server, tmp_path: Path, rank: int
) -> None:
    order = Order([200] * 40, seed=SEED, digest="d", lanes=4, window_shards=2)
    ahead = prefetcher(s3, tmp_path, order, rank, 2)
    read: dict[int, int] = {}  # shard -> where it is read first
    for position in range(rank, 4000 + ahead.distance, 2):
        read.setdefault(order.locate(position)[0], position)
    late = 0
    for position in range(rank, 4000, 2):
        if read.get(shard := order.locate(position)[0]) == position and position > ahead.distance:
            late += shard not in ahead.asked
        ahead.follow(position)
    ahead.threads.shutdown(wait=True)
    fetched = {int(name[:6]) for name in gets(s3)}
    # A shard of which a lane reads a few samples only may hide between two looks.
    assert late <= 2 and fetched <= read.keys() and set(gets(s3).values()) == {1}
    assert len(fetched) >= sum(first < 4000 for first in read.values()) - 2


def test_looking_ahead_costs_few_looks_and_starts_anew_where_a_run_goes_on(s3: S3Server, tmp_path: Path) -> None:
    order, looks = Order([400] * 30, seed=SEED, digest="d", lanes=4, window_shards=2), []
    ahead = prefetcher(s3, tmp_path, order, 0, 1)
    locate = ahead.shard_at
    ahead.shard_at = lambda position: looks.append(position) or locate(position)
    for position in range(0, 4000, 8):
        ahead.follow(position)
    assert len(looks) <= (4000 + ahead.distance) * LOOKS / 400 + 1 and {look % 4 for look in looks} == {0, 1, 2, 3}
    ahead.follow(100_000)
    assert looks[-1] > 100_000 and all(look >= 100_000 for look in looks[-10:])
    ahead.close()


def test_what_cannot_be_fetched_ahead_is_fetched_by_who_reads_it(
    s3: S3Server, on_disk: TrainData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(self: NodeCache, stored: StoredFile) -> None:
        raise OSError("the network is away")

    data = upload(s3, on_disk, "away", NodeCache(str(tmp_path / "cache"), 10**9))
    monkeypatch.setattr(NodeCache, "ahead", refuses)
    assert sequence(data) == sequence(on_disk)

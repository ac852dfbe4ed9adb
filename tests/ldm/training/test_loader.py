"""The order of samples, and that everybody who reads it reads the same."""

from __future__ import annotations

import hashlib
import os
import time
import tracemalloc
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ldm.models.tokenizer import make_tokenizer
from ldm.shards import CorruptSample, ShardReader, decode_array
from ldm.training.loader import Batch, Draw, Loader, TrainData, hold_out
from ldm.training.order import Order, held_out
from tests.ldm.training.tiny import SEED, SHAPE, TEXT_ENCODER, write_data

COUNTS = [7, 12, 1, 9, 12, 5]
# The start of sequences with seed 0, which must never change.
GOLDEN_ORDER = [(6, 9), (2, 2), (1, 23), (5, 3), (6, 32), (2, 14), (7, 22), (8, 16)]
GOLDEN_T = (557, True)
GOLDEN_NOISE = [2.0368242263793945, -1.4165806770324707, -0.7867151498794556]
USED = [None, [i % 3 != 0 for i in range(12)], None, [False] * 9, None, [True, False, True, True, True]]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TrainData:
    return write_data(tmp_path_factory.mktemp("latents"), COUNTS, USED)


def make(data: TrainData, *, kind: type[Loader] = Loader, **changes: Any) -> Loader:
    options = {"lanes": 4, "window_shards": 2, "batch_size": 8, "micro_batch_size": 2, **changes}
    draw = options.pop("draw", Draw(SEED, 1000, 0.3, 0.1))
    return kind(data, draw, make_tokenizer(TEXT_ENCODER), **options)


def take(loader: Loader, steps: int, samples_seen: int = 0) -> list[Batch]:
    micro = loader.batch_size // (loader.micro_batch_size * loader.world_size)
    batches = list(islice(loader.batches(samples_seen), steps * micro))
    loader.close()
    return batches


def fingerprints(batches: list[Batch]) -> dict[int, str]:
    """position -> hash of key and of every bit that training sees of the sample."""
    found = {}
    for b in batches:
        for i, position in enumerate(b.positions.tolist()):
            parts = [b.z0[i].numpy(), b.eps[i].numpy(), b.t[i].numpy(), b.condition["tokens"][i].numpy()]
            bits = b"".join(part.tobytes() for part in parts)
            found[position] = hashlib.sha256(b.keys[i].encode() + bits).hexdigest()
    return found


def sequence(data: TrainData, steps: int, world_size: int = 1, samples_seen: int = 0, **changes: Any) -> dict[int, str]:
    """What all processes together see."""
    found: dict[int, str] = {}
    for rank in range(world_size):
        found |= fingerprints(take(make(data, rank=rank, world_size=world_size, **changes), steps, samples_seen))
    return found


# ---- order -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("counts", "lanes", "window_shards"),
    [([7, 0, 13, 5, 1], 4, 2), ([6] * 4, 2, 2), ([128, 128], 64, 4), ([3, 2], 64, 2), ([1], 1, 1), ([50] * 30, 8, 3)],
)
def test_each_epoch_has_every_sample_once(counts: list[int], lanes: int, window_shards: int) -> None:
    order = Order(counts, seed=SEED, digest="d", lanes=lanes, window_shards=window_shards)
    everything = sorted((shard, row) for shard, count in enumerate(counts) for row in range(count))
    epochs = [[order.locate(e * order.samples + i) for i in range(order.samples)] for e in range(3)]
    assert [sorted(epoch) for epoch in epochs] == [everything] * 3
    if order.samples > 5:
        assert epochs[0] != epochs[1] != epochs[2]


def test_order_depends_on_seed_and_data_and_is_what_it_always_was() -> None:
    def start(seed: int, digest: str) -> list[tuple[int, int]]:
        order = Order([40] * 9, seed=seed, digest=digest, lanes=4, window_shards=2)
        return [order.locate(i) for i in range(8)]

    assert start(0, "a") == start(0, "a") != start(1, "a") != start(1, "b")
    # Written down: a change of this sequence would break every run that is under way.
    assert start(0, "a") == GOLDEN_ORDER


def test_neighbours_come_from_many_shards() -> None:
    order = Order([100] * 200, seed=SEED, digest="d", lanes=64, window_shards=4)
    for start in range(0, 6400, 640):
        shards = {order.locate(position)[0] for position in range(start, start + 64)}
        assert len(shards) > 40
    # Without lanes (one of them) and windows the same measure fails.
    order = Order([100] * 200, seed=SEED, digest="d", lanes=1, window_shards=1)
    assert len({order.locate(position)[0] for position in range(64)}) <= 2


def seek_far() -> None:
    order = Order([10_000] * 40_000, seed=SEED, digest="d", lanes=64, window_shards=4)
    for position in range(1_234_567_890, 1_234_567_890 + 64):
        order.locate(position)


def test_seeking_in_four_hundred_million_samples_is_quick_and_small() -> None:
    started = time.process_time()
    seek_far()
    seconds = time.process_time() - started
    tracemalloc.start()
    seek_far()
    megabytes = tracemalloc.get_traced_memory()[1] / 1e6
    tracemalloc.stop()
    print(f"sought in {seconds:.2f} s of processor time with {megabytes:.0f} MB")
    assert seconds < 1 and megabytes < 200


def test_nothing_to_train_on_is_refused() -> None:
    with pytest.raises(ValueError, match="no sample is used in any of the 2 shards"):
        Order([0, 0], seed=0, digest="d", lanes=2, window_shards=1)


# ---- R9, R10 -----------------------------------------------------------------------------------------------
def check_layouts(data: TrainData, steps: int, **changes: Any) -> None:
    """Every layout sees the same samples at the same positions, to the bit."""
    expected = sequence(data, steps, **changes)
    for world_size in (1, 2, 4, 8):
        for workers in (0, 1, 3):
            micro = min(2, 8 // world_size)
            found = sequence(data, steps, world_size, workers=workers, micro_batch_size=micro, **changes)
            assert found == expected, (world_size, workers)
    for micro_batch_size in (1, 8):
        assert sequence(data, steps, micro_batch_size=micro_batch_size, **changes) == expected


def test_every_layout_reads_the_same_sequence(data: TrainData) -> None:
    check_layouts(data, 6)
    assert len(sequence(data, 6)) == 48


def test_layouts_are_told_apart(data: TrainData) -> None:
    """The twin: with noise drawn in the order of reading the same check fails."""

    class Unkeyed(Draw):
        def __call__(self, position: int, eps: np.ndarray, posterior: np.ndarray) -> tuple[int, bool]:
            count[0] += 1
            return super().__call__(count[0], eps, posterior)

    count = [0]
    with pytest.raises(AssertionError):
        check_layouts(data, 2, draw=Unkeyed(SEED, 1000, 0.3))


def test_a_run_that_was_stopped_goes_on_with_the_next_sample(data: TrainData) -> None:
    whole = sequence(data, 10)
    first = sequence(data, 4, world_size=2)
    rest = sequence(data, 6, world_size=4, samples_seen=32, micro_batch_size=1, workers=1)
    assert not first.keys() & rest.keys()
    assert first | rest == whole
    assert sequence(data, 6, samples_seen=31) != rest  # one off is seen


def test_epochs_run_into_each_other_and_hold_the_selection(data: TrainData) -> None:
    counts = data.counts()
    assert counts == [7, 8, 1, 0, 12, 4]
    keys = [key for batch in take(make(data), 12) for key in batch.keys]
    epoch, used = sorted(keys[: sum(counts)]), sorted(keys[sum(counts) : 2 * sum(counts)])
    expected = [
        f"{shard:06d}{row:03d}"
        for shard, mask in enumerate(USED)
        for row in range(COUNTS[shard])
        if mask is None or mask[row]
    ]
    assert epoch == used == expected


def test_a_process_reads_its_share_of_the_bytes(data: TrainData, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    original = ShardReader.read

    def counted(self: ShardReader, i: int) -> tuple[str, dict[str, bytes]]:
        read.append(int(self.rows[i]["size"]))
        return original(self, i)

    monkeypatch.setattr(ShardReader, "read", counted)
    shares = []
    for rank in range(2):
        take(make(data, rank=rank, world_size=2, batch_size=8), 4)  # one epoch of 32 samples
        shares.append(sum(read))
        read.clear()
    take(make(data), 4)
    assert sum(shares) == sum(read) and abs(shares[0] - shares[1]) <= max(read)


# ---- what a batch holds ------------------------------------------------------------------------------------
def test_noise_timesteps_and_dropout_have_their_distributions(tmp_path: Path) -> None:
    data = write_data(tmp_path, [64])
    batches = take(make(data, draw=Draw(SEED, 1000, 0.25), batch_size=512, micro_batch_size=512), 4)
    eps, t = torch.cat([b.eps for b in batches]), torch.cat([b.t for b in batches]).double()
    null = make_tokenizer(TEXT_ENCODER).null
    dropped = torch.cat([(b.condition["tokens"] == null).all(1) for b in batches]).double()
    n = eps.numel()
    assert abs(eps.mean()) < 5 / n**0.5 and abs(eps.var() - 1) < 5 * (2 / n) ** 0.5
    assert 0 <= t.min() < 20 and 980 < t.max() < 1000 and abs(t.mean() - 499.5) < 5 * 288.7 / len(t) ** 0.5
    assert abs(dropped.mean() - 0.25) < 5 * (0.1875 / len(t)) ** 0.5
    assert len({x.numpy().tobytes() for x in eps}) == len(eps)  # no two samples share their noise


def test_posterior_noise_is_fresh_each_epoch_and_z0_is_scaled(tmp_path: Path) -> None:
    data = replace(write_data(tmp_path, [1]), scale_factor=0.5)
    (batch,) = take(make(data, batch_size=2, lanes=1), 1)
    moments = torch.from_numpy(decode_array(ShardReader(data.shards[0]).read(0)[1]["moments.npy"]).copy())
    mean, logvar = moments.float().chunk(2)
    drawn = (batch.z0 / 0.5 - mean) / torch.exp(logvar / 2)
    assert not torch.equal(drawn[0], drawn[1]) and 0.5 < drawn.std() < 1.5
    assert not torch.allclose(drawn[0], batch.eps[0], atol=1e-3)


def test_draws_are_what_they_always_were() -> None:
    eps, posterior = np.empty(SHAPE, np.float32), np.empty(SHAPE, np.float32)
    t, dropped = Draw(0, 1000, 0.5)(12345, eps, posterior)
    assert (t, dropped) == GOLDEN_T
    np.testing.assert_allclose([eps[0, 0, 0], eps[1, 3, 3], posterior[0, 0, 0]], GOLDEN_NOISE, rtol=1e-6)


def test_memory_serves_what_fits_and_changes_nothing(data: TrainData, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = sequence(data, 12)
    reads: list[int] = []
    original = ShardReader.read
    monkeypatch.setattr(ShardReader, "read", lambda self, i: reads.append(i) or original(self, i))
    assert sequence(data, 12, cache_bytes=10**6) == expected and len(reads) == sum(data.counts())
    reads.clear()
    assert sequence(data, 12, cache_bytes=5000) == expected and sum(data.counts()) < len(reads) < 96


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_sample_stops_the_run_and_is_named(tmp_path: Path, workers: int) -> None:
    data = write_data(tmp_path, [6])
    with open(data.shards[0].tar, "r+b") as file:
        file.seek(600)
        byte = file.read(1)
        file.seek(600)
        file.write(bytes([byte[0] ^ 1]))
    with pytest.raises(CorruptSample, match="000000.tar: sample 000000000 does not match its crc32"):
        take(make(data, workers=workers), 2)


def test_latents_of_another_autoencoder_are_refused(data: TrainData) -> None:
    with pytest.raises(CorruptSample, match=r"has shape \(4, 4, 4\), expected \(8, 4, 4\)"):
        take(make(replace(data, latent_shape=[4, 4, 4])), 1)
    with pytest.raises(CorruptSample, match="has .'moments.npy', 'txt'., not latent.npy"):
        take(make(replace(data, field="latent.npy")), 1)


def test_open_files_do_not_grow(data: TrainData) -> None:
    def opened() -> int:
        return len(os.listdir("/proc/self/fd"))

    before = opened()
    for _ in range(5):
        take(make(data, lanes=1, window_shards=1, workers=1), 12)
    assert opened() <= before + len(COUNTS)


# ---- held-out shards ---------------------------------------------------------------------------------------
def test_held_out_shards_are_chosen_by_what_they_hold(data: TrainData) -> None:
    trained, held = hold_out(data, 1)
    assert held is not None and len(held.shards) == 1 and len(trained.shards) == 5
    assert not {info.tar for info in held.shards} & {info.tar for info in trained.shards}
    turned = replace(data, shards=data.shards[::-1], used=data.used[::-1])
    assert {info.digest for info in hold_out(turned, 1)[1].shards} == {info.digest for info in held.shards}
    assert hold_out(data, 0) == (data, None)
    with pytest.raises(ValueError, match="held_out_shards is 2 of 6 shards; give at most 1, 5 % of them or one"):
        hold_out(data, 2)
    many = [f"digest {i}" for i in range(100)]
    chosen = held_out(many, 5)
    assert len(chosen) == 5 and chosen == held_out(many[::-1], 5) and chosen > held_out(many, 4)
    with pytest.raises(ValueError, match="held_out_shards is 6 of 100 shards; give at most 5"):
        held_out(many, 6)
    with pytest.raises(ValueError, match="held_out_shards is 1 of 1 shards; give at most 0"):
        held_out(["alone"], 1)

"""Latents and captions -> batches, in the order of ldm/training/order.py, the same whoever reads them.

Eight positions of a step, global batch 8, seen by two processes with micro batches of two:

    position        0  1  2  3  4  5  6  7      process = position mod world size
    process 0       0     2     4     6         two micro batches: (0, 2) and (4, 6)
    process 1          1     3     5     7      two micro batches: (1, 3) and (5, 7)

Each sample's noise, timestep and caption dropout are drawn from (seed, position) here, on the processor, so they are
the same bits for every world size, micro batch, number of workers and resume. `samples_seen` is the whole state.
"""

from __future__ import annotations

import hashlib
import os
import threading
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from resource import RLIM_INFINITY, RLIMIT_NOFILE, getrlimit, setrlimit
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm.models.autoencoder import draw_latent
from ldm.models.tokenizer import Tokenizer
from ldm.node_cache import NodeCache
from ldm.shards import CONTEXT, MIRRORED, CorruptSample, ShardInfo, ShardReader, decode_array, open_shard
from ldm.training.mixture import MixedOrder
from ldm.training.order import Order, held_out
from ldm.training.prefetch import Prefetcher

OTHER_FILES = 256  # open beside shards: libraries, sockets, checkpoints
OBJECTS = 700  # bytes of Python's own that a sample in memory takes beside its data


@dataclass(frozen=True)
class TrainData:
    """The latents that a run trains on, and who made them."""

    shards: list[ShardInfo]
    used: list[bytes | None]  # for each shard one bit for each sample, first sample highest (np.packbits); None: all
    edition: str  # digest of the closed list of shards
    selection: str  # digest of what `used` was read from
    field: str  # member of a sample with its latent: "moments.npy" or "latent.npy"
    latent_shape: list[int]  # c, h, w of z0
    scale_factor: float  # of z0, so that its standard deviation is about 1
    shapes: list[list[int]] | None = None  # c, h, w of each shard's latents where they differ; null: all latent_shape
    caches: list[int] | None = None  # which of several mixed caches each shard belongs to; null: there is one
    weights: tuple[float, ...] = (1.0,)  # of the caches: shares of the samples that are seen
    context_shape: list[int] | None = None  # l, d of what a frozen text encoder made of each caption; null: not cached
    autoencoder: dict[str, Any] | None = None  # settings of what made them, and the sha256 of its weights: checkpoints
    # name it for those who draw pictures from them
    node_cache: NodeCache | None = None  # where a node keeps shards of an object store; null: all lie on disk

    @property
    def digest(self) -> str:
        """Identity of everything that decides which samples there are."""
        return hashlib.sha256(f"{self.edition}\0{self.selection}".encode()).hexdigest()

    def shape_of(self, shard: int) -> list[int]:
        """c, h, w of a shard's latents."""
        return self.latent_shape if self.shapes is None else self.shapes[shard]

    def counts(self) -> list[int]:
        """Samples in use, shard by shard."""
        return [
            info.samples if bits is None else int(np.bitwise_count(np.frombuffer(bits, np.uint8)).sum())
            for info, bits in zip(self.shards, self.used, strict=True)
        ]


def hold_out(data: TrainData, shards: int) -> tuple[TrainData, TrainData | None]:
    """(what is trained on, what losses are validated on): the shards whose hashes are lowest are held out."""
    if shards == 0:
        return data, None
    held = held_out([info.digest for info in data.shards], shards)

    def part(wanted: bool) -> TrainData:
        kept = [i for i, info in enumerate(data.shards) if (info.digest in held) == wanted]
        return replace(
            data,
            shards=[data.shards[i] for i in kept],
            used=[data.used[i] for i in kept],
            shapes=data.shapes and [data.shapes[i] for i in kept],
            caches=data.caches and [data.caches[i] for i in kept],
        )

    return part(False), part(True)


def mix(sets: Sequence[TrainData], weights: Sequence[float]) -> TrainData:
    """Several caches as one, each with its share of the samples that are seen."""
    first = sets[0]
    if len(sets) != len(weights) or min(weights) <= 0:
        raise ValueError(f"{len(sets)} caches have weights {list(weights)}; expected one above 0 for each")
    for other in sets[1:]:
        for name in ("field", "latent_shape", "scale_factor", "context_shape"):
            if getattr(other, name) != getattr(first, name):
                raise ValueError(
                    f"caches that are mixed must agree: {name} is {getattr(first, name)} in the first and "
                    f"{getattr(other, name)} in another"
                )
    return replace(
        first,
        shards=[info for each in sets for info in each.shards],
        used=[bits for each in sets for bits in each.used],
        edition=" ".join(each.edition for each in sets),
        selection=" ".join([*(each.selection for each in sets), *map(str, weights)]),
        shapes=[each.shape_of(i) for each in sets for i in range(len(each.shards))],
        caches=[cache for cache, each in enumerate(sets) for _ in each.shards],
        weights=tuple(weights),
    )


@dataclass
class Batch:
    """What one forward pass of one process reads; b samples."""

    keys: list[str]
    positions: Tensor  # (b,) int64
    z0: Tensor  # (b, c, h, w)
    eps: Tensor  # (b, c, h, w)
    t: Tensor  # (b,) int64
    condition: dict[str, Tensor]

    def to(self, device: torch.device) -> Batch:
        """The batch on a device; copies from pinned memory overlap with computation."""
        if device.type == "cpu":
            return self

        def move(x: Tensor) -> Tensor:
            return x.to(device, non_blocking=True)

        condition = {name: move(x) for name, x in self.condition.items()}
        return replace(self, z0=move(self.z0), eps=move(self.eps), t=move(self.t), condition=condition)

    def pin(self) -> Batch:
        condition = {name: x.pin_memory() for name, x in self.condition.items()}
        return replace(
            self, z0=self.z0.pin_memory(), eps=self.eps.pin_memory(), t=self.t.pin_memory(), condition=condition
        )


class _Random(threading.local):
    """Random numbers that belong to (seed, position, stream): Philox with the position in its counter.

    Each thread sets its one generator anew, which takes a tenth of the time that making another one takes.
    """

    def __init__(self) -> None:
        self.bits = np.random.Philox(counter=0, key=0)
        self.generator, self.state = np.random.Generator(self.bits), self.bits.state

    def at(self, seed: int, position: int, stream: int) -> np.random.Generator:
        self.state["state"]["key"][0] = seed
        self.state["state"]["counter"][1:3] = position, stream
        self.bits.state = self.state
        return self.generator


_random = _Random()


@dataclass(frozen=True)
class Draw:
    """What is drawn for each sample, and from which seed."""

    seed: int
    timesteps: int  # t is uniform over 0 .. timesteps - 1
    caption_dropout: float  # share of captions that become the empty one
    offset_noise: float = 0.0  # share of eps that is constant over a channel

    def mirrors(self, position: int) -> bool:
        """Whether the mirrored picture is taken at a position, where there is one."""
        return bool(_random.at(self.seed, position, 1).random() < 0.5)

    def __call__(self, position: int, eps: np.ndarray, posterior: np.ndarray) -> tuple[int, bool]:
        """Fills in the two noises (c, h, w); returns t and whether the caption is dropped."""
        random = _random.at(self.seed, position, 0)
        t, dropout = random.random(2)
        random.standard_normal(dtype=np.float32, out=eps)
        random.standard_normal(dtype=np.float32, out=posterior)
        if self.offset_noise:
            eps += self.offset_noise * random.standard_normal((len(eps), 1, 1), np.float32)
        return int(t * self.timesteps), bool(dropout < self.caption_dropout)


@dataclass(slots=True)
class _Sample:
    """A sample as it was read; nothing random is in it."""

    key: str
    caption: str
    latent: np.ndarray  # (2c, h, w) moments or (c, h, w)
    mirrored: np.ndarray | None  # the same of the mirrored picture, where the cache has it
    context: np.ndarray | None  # (l, d) of the caption, where it is read from the cache
    bytes: int  # that are in memory for it


def order_of(data: TrainData, seed: int, lanes: int, window_shards: int, batch_size: int) -> Order | MixedOrder:
    """The order of samples; with several shapes or caches it depends on the batch size too."""
    if data.shapes is None and data.caches is None:
        return Order(data.counts(), seed=seed, digest=data.digest, lanes=lanes, window_shards=window_shards)
    shapes = [tuple(data.shape_of(i)) for i in range(len(data.shards))]
    known = sorted(set(shapes))
    return MixedOrder(
        data.counts(), [known.index(shape) for shape in shapes], data.caches or [0] * len(shapes), data.weights,
        seed=seed, digest=data.digest, lanes=lanes, window_shards=window_shards, batch_size=batch_size,
    )  # fmt: skip


class Loader:
    """Batches of one process. `workers` threads read ahead; with 0 the training thread reads when it needs a batch.

    Threads are enough: drawing noise, the larger part of the work, happens outside Python's lock, and nothing has to be
    copied between processes.
    """

    def __init__(
        self,
        data: TrainData,
        draw: Draw,
        tokenizer: Tokenizer | None,
        *,
        lanes: int,
        window_shards: int,
        batch_size: int,
        micro_batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        cache_bytes: int = 0,
        pin: bool = False,
        null_context: np.ndarray | None = None,
    ) -> None:
        self.data, self.draw, self.tokenizer = data, draw, tokenizer
        self.null_context = null_context  # (l, d) of the empty caption, where contexts are read from the cache
        self.order = order_of(data, draw.seed, lanes, window_shards, batch_size)
        self.batch_size, self.micro_batch_size = batch_size, micro_batch_size
        self.rank, self.world_size, self.pin = rank, world_size, pin
        # Open shards: those of the windows that this process's lanes are in, and the ones they enter next.
        streams = len({tuple(data.shape_of(i)) for i in range(len(data.shards))}) * len(data.weights)
        self.open_shards = min(len(data.shards), streams * (max(1, lanes // world_size) * window_shards + lanes))
        self._reader = lru_cache(maxsize=self.open_shards)(self._open)
        self._rows = lru_cache(maxsize=self.open_shards)(self._used_rows)
        self._cache: dict[tuple[int, int], _Sample] = {}
        self._cache_left, self._lock = cache_bytes, threading.Lock()
        self._workers = workers
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="loader") if workers else None
        self._prefetcher: Prefetcher | None = None
        if data.node_cache is not None and any(info.stored for info in data.shards):
            self._prefetcher = Prefetcher(
                data.node_cache, data.shards, lambda position: self.order.locate(position)[0],
                lanes=lanes, rank=rank, world_size=world_size,
            )  # fmt: skip

    def batches(self, samples_seen: int) -> Iterator[Batch]:
        """Micro batches of this process without end, from `samples_seen` samples of all processes on."""
        positions = self._positions(samples_seen)
        if self._threads is None:
            yield from map(self.batch, positions)
            return
        ahead: deque[Future[Batch]] = deque()
        while True:
            while len(ahead) < 2 * self._workers:
                ahead.append(self._threads.submit(self.batch, next(positions)))
            yield ahead.popleft().result()

    def batch(self, positions: range) -> Batch:
        """The batch at given positions: a pure function of the data, the seed and the positions."""
        rows = [self._row(position) for position in positions]
        samples, shape = self._samples(rows), (len(rows), *self.data.shape_of(rows[0][0]))
        eps, posterior = np.empty(shape, np.float32), np.empty(shape, np.float32)
        drawn = [self.draw(*each) for each in zip(positions, eps, posterior, strict=True)]
        latents = torch.from_numpy(np.stack([self._side(*each) for each in zip(samples, positions, strict=True)]))
        # One by one: a vectorised exponential may round otherwise where a batch ends.
        z0 = [
            draw_latent(latent, noise, self.data.scale_factor)
            for latent, noise in zip(latents.split(1), torch.from_numpy(posterior).split(1), strict=True)
        ]
        batch = Batch(
            keys=[sample.key for sample in samples],
            positions=torch.tensor(positions, dtype=torch.int64),
            z0=torch.cat(z0),
            eps=torch.from_numpy(eps),
            t=torch.tensor([t for t, _ in drawn], dtype=torch.int64),
            condition=self._condition(samples, [dropped for _, dropped in drawn]),
        )
        return batch.pin() if self.pin else batch

    def close(self) -> None:
        """Ends the threads; batches that were under way are thrown away."""
        if self._prefetcher is not None:
            self._prefetcher.close()
        if self._threads is not None:
            self._threads.shutdown(wait=True, cancel_futures=True)

    def _positions(self, samples_seen: int) -> Iterator[range]:
        step = self.micro_batch_size * self.world_size
        while True:
            for start in range(samples_seen, samples_seen + self.batch_size, step):
                if self._prefetcher is not None:
                    self._prefetcher.follow(start + self.rank)
                yield range(start + self.rank, start + step, self.world_size)
            samples_seen += self.batch_size

    def _side(self, sample: _Sample, position: int) -> np.ndarray:
        """The latent of a picture or of its mirror image."""
        return sample.mirrored if sample.mirrored is not None and self.draw.mirrors(position) else sample.latent

    def _condition(self, samples: list[_Sample], dropped: list[bool]) -> dict[str, Tensor]:
        pairs = list(zip(samples, dropped, strict=True))
        if self.data.context_shape is not None:
            contexts = [self.null_context if empty else sample.context for sample, empty in pairs]
            return {"context": torch.from_numpy(np.stack(contexts))}  # type: ignore[arg-type]
        if self.tokenizer is None:
            return {}
        return {"tokens": self.tokenizer(["" if empty else sample.caption for sample, empty in pairs])}

    # -- from disk -----------------------------------------------------------------------------------------------
    def _row(self, position: int) -> tuple[int, int]:
        shard, place = self.order.locate(position)
        rows = self._rows(shard)
        return shard, place if rows is None else rows.item(place)

    def _used_rows(self, shard: int) -> np.ndarray | None:
        """The rows of a shard that are in use; None when all are."""
        bits = self.data.used[shard]
        if bits is None:
            return None
        mask = np.unpackbits(np.frombuffer(bits, np.uint8), count=self.data.shards[shard].samples)
        return np.flatnonzero(mask).astype(np.uint32)

    def _samples(self, rows: list[tuple[int, int]]) -> list[_Sample]:
        """Samples from memory or from disk, which is asked for all of them at once."""
        for shard, row in rows:
            if (shard, row) not in self._cache:
                self._reader(shard).ahead(row)
        return [self._cache.get(row) or self._read(*row) for row in rows]

    def _keep(self, shard: int, row: int, sample: _Sample) -> None:
        """Leaves a sample in memory if it fits into the budget. What is there stays: in a cyclic order any rule that
        threw out the oldest would throw out the very sample that is needed next."""
        with self._lock:
            if sample.bytes <= self._cache_left and (shard, row) not in self._cache:
                self._cache_left -= sample.bytes
                self._cache[shard, row] = sample

    def _read(self, shard: int, row: int) -> _Sample:
        data, tar = self.data, self.data.shards[shard].tar
        key, fields = self._reader(shard).read(row)
        c, h, w = data.shape_of(shard)
        shape = (2 * c if data.field == "moments.npy" else c, h, w)
        latent = _array(fields, data.field, shape, tar, key)
        mirrored = _array(fields, MIRRORED, shape, tar, key) if MIRRORED in fields else None
        context = _array(fields, CONTEXT, tuple(data.context_shape), tar, key) if data.context_shape else None
        size = sum(map(len, fields.values())) + OBJECTS
        sample = _Sample(key, fields.get("txt", b"").decode(), latent, mirrored, context, size)
        if size <= self._cache_left:
            self._keep(shard, row, sample)
        return sample

    def _open(self, shard: int) -> ShardReader:
        reader = open_shard(self.data.shards[shard], self.data.node_cache)
        # Closed when the last thread that reads from it has let go, not when it leaves the cache.
        weakref.finalize(reader, os.close, reader.handle)
        return reader


def allow_open_files(*loaders: Loader) -> None:
    """Lets this process open as many files as the system allows: by default 1,024, which shards of many shapes exceed.

    Raises ValueError where that is too few too, rather than hours later.
    """
    needed, (_, most) = OTHER_FILES + sum(loader.open_shards for loader in loaders), getrlimit(RLIMIT_NOFILE)
    setrlimit(RLIMIT_NOFILE, (most, most))
    if most != RLIM_INFINITY and needed > most:
        raise ValueError(
            f"training may have {needed} files open at once, {OTHER_FILES} of them no shards, and this system allows a "
            f"process {most} (ulimit -Hn); raise that, or start a new run with lower training.lanes or window_shards"
        )


def _array(fields: dict[str, bytes], name: str, shape: tuple[int, ...], tar: str, key: str) -> np.ndarray:
    """A member of a sample that must be there and of a shape."""
    if name not in fields:
        raise CorruptSample(f"{tar}: sample {key} has {sorted(fields)}, not {name}")
    array = decode_array(fields[name])
    if array.shape != shape:
        raise CorruptSample(f"{tar}: sample {key} has shape {array.shape}, expected {shape}")
    return array

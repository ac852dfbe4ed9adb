"""Encodes every kept picture once with the frozen autoencoder and caches its moments.

download/000042.tar + filter_images/000042.parquet -> precompute_latents/256/000042.tar, 000042.index

Samples are {key.moments.npy fp16, key.txt}, and with flip=true key.flipped.npy besides, encoded from mirrored pixels.
A folder for each resolution, so that a 256 px run never reads the bytes of another; with buckets a folder for each
shape in it, "256/192x320". All of them come from one decode of the picture, in threads beside the encoder. With
text_features=true a sample has key.context.npy besides, fp16: what a frozen text encoder makes of its caption.

Moments are stored unscaled, for the trainer to draw fresh noise and scale; captions are stored whole. A shard's bytes
depend on its input and its settings only. Some samples of every shard are decoded back and compared with their
picture, which catches a wrong normalisation or a wrong scale before weeks are spent on it.
"""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import Tensor

from ldm.buckets import bucket_shapes, fit, nearest_shape
from ldm.config import AutoencoderSettings
from ldm.encode import Encoder, Stored, TooLarge, to_stored
from ldm.encode_text import CaptionEncoder
from ldm.images import decode_rgb, to_tensor
from ldm.shards import CONTEXT, MIRRORED, ShardWriter, encode_array
from pipelines.dag import Job, weights_path
from pipelines.devices import device_of
from pipelines.manifest import Record, shard_name
from pipelines.settings import PrecomputeLatentsConfig
from pipelines.stages.filter_images import pictures_of


@dataclass
class Group:
    """Pictures of one shape that are encoded in one call."""

    folder: str
    keys: list[str] = field(default_factory=list)
    captions: list[bytes] = field(default_factory=list)
    pictures: list[np.ndarray] = field(default_factory=list)  # each (H, W, 3) uint8

    @cached_property
    def image(self) -> Tensor:
        """(b, 3, H, W) in [-1, 1]"""
        return to_tensor(np.stack(self.pictures))


@dataclass
class Measured:
    """What is known of a shard's latents: sums over those that are trained on, and how well some decode back."""

    total: float = 0.0
    squares: float = 0.0
    count: int = 0
    psnrs: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))  # by folder

    def add(self, mean: np.ndarray) -> None:
        values = mean.astype(np.float64)
        self.total, self.squares = self.total + values.sum(), self.squares + (values**2).sum()
        self.count += values.size

    def facts(self) -> dict[str, Any]:
        center = self.total / max(self.count, 1)
        psnrs = [psnr for folder in self.psnrs.values() for psnr in folder]
        return {
            "psnr": round(float(np.mean(psnrs)), 3) if psnrs else None,
            "mean": round(center, 6),
            "std": round(math.sqrt(max(self.squares / max(self.count, 1) - center**2, 0.0)), 6),
        }


def sizes(job: Job) -> dict[str, int]:
    """What makes a worker take more memory or less."""
    return {"dataset.precompute_latents.batch_size": job.what["dataset.precompute_latents"].batch_size}


class Worker:
    """Holds the autoencoder on one device; lives as long as the stage."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.settings: PrecomputeLatentsConfig = job.what["dataset.precompute_latents"]
        self.device = device_of(job.how.cluster.precompute_latents.num_gpus, "precompute_latents")
        settings = self.settings
        self.encoder = Encoder(
            settings_of(job), self.device, batch_size=settings.batch_size, precision=settings.precision,
            threads=settings.threads, channels_last=settings.channels_last,
        )  # fmt: skip
        self.captions = None if not settings.text_features else CaptionEncoder(
            job.what["text_encoder"], self.device, batch_size=settings.batch_size, precision=settings.precision,
            threads=settings.threads,
        )  # fmt: skip
        self.field = "moments.npy" if self.encoder.autoencoder.config.posterior == "kl" else "latent.npy"
        self.shapes = shapes_of(settings)
        # As many threads decode as the stage is given processors; what they make does not depend on how many.
        self.decoders = ThreadPoolExecutor(max(1, math.ceil(job.how.cluster.precompute_latents.num_cpus)), "decode")
        self.refusal = ""  # once a batch does not fit, no later one does

    def run_shard(self, shard: int) -> Record:
        """Encodes the kept pictures of one shard and commits their moments."""
        if self.refusal:
            raise TooLarge(self.refusal)
        job, name = self.job, shard_name(shard)
        records = {read: job.inputs[read].record(shard) for read in ("download", "filter_images")}
        for read, record in records.items():
            if record is None:
                raise FileNotFoundError(f"{read} has no shard {name}; run +stage={read} first")
        with job.output.attempt(shard, job.fingerprint) as attempt:
            try:
                facts = self._encode(shard, attempt.path)
            except (TooLarge, MemoryError) as error:
                self.refusal = self._refusal(error)
                raise TooLarge(self.refusal) from error
            inputs = {f"{read}/{name}": record.digest for read, record in records.items()}
            if "train_autoencoder" in job.inputs:
                inputs["train_autoencoder"] = job.inputs["train_autoencoder"].record().digest
            kept = records["filter_images"].samples
            return attempt.commit(rows=kept, samples=facts["samples"], dropped={}, inputs=inputs, facts=facts)

    def _refusal(self, error: TooLarge | MemoryError) -> str:
        """What does not fit, and which setting to lower."""
        if isinstance(error, TooLarge):
            return str(error)
        size = self.settings.batch_size
        return (
            f"the machine has no memory for three batches of {size} decoded pictures; set "
            f"dataset.precompute_latents.batch_size to less than {size}"
        )

    # -- one shard ---------------------------------------------------------------------------------------------------
    def _encode(self, shard: int, place: Path) -> dict[str, Any]:
        """Writes the latents of a shard; returns what was measured on them."""
        writers, measured = first_writers(self.settings, place, shard), Measured()
        for group, encoded in self._encoded(self._groups(shard)):
            if group.folder not in writers:
                writers[group.folder] = open_writer(place, group.folder, shard)
            self._write(writers[group.folder], group, encoded, measured)
        facts = close_writers(writers, self.settings, self.encoder.autoencoder.factor)
        self._check_psnr(shard, measured)
        return {**facts, **measured.facts(), "device": self.device.type, "torch": torch.__version__}

    def _encoded(self, groups: Iterable[Group]) -> Iterator[tuple[Group, dict[str, Stored]]]:
        """Groups with what was encoded of them, by member; the next one is under way while one is written."""
        before = None
        for group in groups:
            encoded = {self.field: Stored(self.encoder.encode(group.image))}
            if self.settings.flip:  # mirrored latents would be wrong: an encoder does not commute with mirrors
                encoded[MIRRORED] = Stored(self.encoder.encode(group.image.flip(-1)))
            if self.captions is not None:
                encoded[CONTEXT] = Stored(self.captions.encode([caption.decode() for caption in group.captions]))
            if before is not None:
                yield before
            before = group, encoded
        if before is not None:
            yield before

    def _write(self, writer: ShardWriter, group: Group, encoded: dict[str, Stored], measured: Measured) -> None:
        arrays = {name: to_stored(group.keys, each) for name, each in encoded.items()}
        stored = arrays[self.field]
        psnrs = measured.psnrs[group.folder]
        if wanted := self.settings.check_samples - len(psnrs):
            psnrs += self.encoder.psnr(group.image[:wanted], stored[:wanted])
        if group.folder.partition("/")[0] == str(self.settings.resolution):
            measured.add(stored[:, : self.encoder.latent_channels].numpy())
        for i, (key, caption) in enumerate(zip(group.keys, group.captions, strict=True)):
            fields = {name: encode_array(array[i].numpy()) for name, array in arrays.items()}
            writer.write(key, {**fields, "txt": caption})

    def _check_psnr(self, shard: int, measured: Measured) -> None:
        for folder, psnrs in measured.psnrs.items():
            if psnrs and np.mean(psnrs) < self.settings.min_psnr:
                raise ValueError(
                    f"shard {shard}: pictures decoded back from their latents in {folder} reach {np.mean(psnrs):.1f} "
                    f"dB, expected at least {self.settings.min_psnr} dB (dataset.precompute_latents.min_psnr): these "
                    f"weights do not fit these pictures, or their normalisation is wrong"
                )

    # -- pictures ----------------------------------------------------------------------------------------------------
    def _groups(self, shard: int) -> Iterator[Group]:
        """The kept pictures of a shard in key order, gathered by shape into batches."""
        open_groups: dict[str, Group] = {}
        for key, caption, pictures in self._pictures(shard):
            for folder, picture in pictures.items():
                group = open_groups.setdefault(folder, Group(folder))
                group.keys.append(key)
                group.captions.append(caption)
                group.pictures.append(picture)
                if len(group.keys) == self.settings.batch_size:
                    yield open_groups.pop(folder)
        yield from open_groups.values()

    def _pictures(self, shard: int) -> Iterator[tuple[str, bytes, dict[str, np.ndarray]]]:
        """(key, caption, picture by folder) of the kept pictures in key order; threads decode some batches ahead."""
        name = shard_name(shard)
        table = pq.read_table(self.job.inputs["filter_images"].data(f"{name}.parquet"), columns=["key", "verdict"])
        kept = {row["key"] for row in table.to_pylist() if not row["verdict"]}
        if not kept:
            return
        ahead: deque[tuple[str, bytes, Future[dict[str, np.ndarray]]]] = deque()
        for key, data, caption in pictures_of(self.job.inputs["download"].data(f"{name}.tar")):
            if key not in kept:
                continue
            ahead.append((key, caption, self.decoders.submit(self._decode, data)))
            if len(ahead) > 2 * self.settings.batch_size:
                key, caption, pictures = ahead.popleft()
                yield key, caption, pictures.result()
        for key, caption, pictures in ahead:
            yield key, caption, pictures.result()

    def _decode(self, data: bytes) -> dict[str, np.ndarray]:
        """One picture, decoded once, in every size that it is encoded in."""
        rgb = decode_rgb(data)
        pictures = {}
        for resolution, shapes in self.shapes.items():
            height, width = shape = nearest_shape(shapes, *rgb.shape[:2])
            folder = f"{resolution}/{height}x{width}" if self.settings.buckets else str(resolution)
            pictures[folder] = fit(rgb, shape)
        return pictures


def write_empty(job: Job, shard: int, folder: Path) -> dict[str, Any]:
    """The files of a shard without latents."""
    settings = job.what["dataset.precompute_latents"]
    writers = first_writers(settings, folder, shard)
    return {**close_writers(writers, settings, job.what["autoencoder.network"].factor), **Measured().facts()}


def first_writers(settings: PrecomputeLatentsConfig, place: Path, shard: int) -> dict[str, ShardWriter]:
    """Of each folder that every shard has files in, also an empty one: those of squares."""
    folders = [] if settings.buckets else [str(resolution) for resolution in shapes_of(settings)]
    return {folder: open_writer(place, folder, shard) for folder in folders}


def open_writer(place: Path, folder: str, shard: int) -> ShardWriter:
    (place / folder).mkdir(parents=True)
    return ShardWriter(place / folder / f"{shard_name(shard)}.tar", place / folder / f"{shard_name(shard)}.index")


def close_writers(writers: dict[str, ShardWriter], settings: PrecomputeLatentsConfig, factor: int) -> dict[str, Any]:
    """Finishes a shard's files; returns what they hold, by folder."""
    for writer in writers.values():
        writer.close()
    trained = trained_folders(writers, settings.resolution)
    return {
        "samples": sum(len(writers[folder].rows) for folder in trained),
        "folders": {folder: len(writer.rows) for folder, writer in sorted(writers.items())},
        "resolution": settings.resolution,
        "latent_side": settings.resolution // factor,
    }


def shapes_of(settings: PrecomputeLatentsConfig) -> dict[int, list[tuple[int, int]]]:
    """The shapes of each resolution: its buckets, or the square alone."""
    sizes = dict.fromkeys([settings.resolution, *settings.more_resolutions])
    buckets = settings.buckets
    return {
        size: bucket_shapes(size, buckets.max_aspect, buckets.step) if buckets else [(size, size)] for size in sizes
    }


def trained_folders(folders: Iterable[str], resolution: int) -> list[str]:
    """The folders of a cache that hold the pictures of one resolution."""
    return sorted(folder for folder in folders if folder.partition("/")[0] == str(resolution))


def settings_of(job: Job) -> AutoencoderSettings:
    """The autoencoder that encodes: its weights are given, or made by train_autoencoder. Nothing is scaled here."""
    given = job.what["autoencoder.weights"]
    path = weights_path(given) if given is not None else job.inputs["train_autoencoder"] / "autoencoder.safetensors"
    return AutoencoderSettings(network=job.what["autoencoder.network"], weights=str(path), scale_factor=1.0)

"""Looks at every downloaded picture and writes what it saw: sizes, hashes, scores, a verdict by reason. No pixels.

download/000042.tar -> filter_images/000042.parquet, one row for each picture in key order:

    key, width, height, original_width, original_height (of the file as it came), md5_of_source, sha256_of_source,
    sha256 of the stored bytes, phash (64 bits), verdict ("" is kept); and where CLIP is configured clip_similarity,
    a score for each head, and the embedding

Only cheap, permanent rules act here, each on one picture alone. What needs the whole set or a threshold that people
change (duplicates, scores) is a selection and re-encodes nothing: pipelines/selection.py.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import imagehash
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from ldm.images import ImageError, decode_rgb
from ldm.shards import CorruptSample, iterate_tar
from pipelines.dag import Job
from pipelines.devices import device_of
from pipelines.manifest import Record, StageFolder, shard_name
from pipelines.settings import FilterImagesConfig

PICTURES = ("jpg", "png", "webp")
KNOWN = (
    ("original_width", pa.int32()), ("original_height", pa.int32()),
    ("md5_of_source", pa.string()), ("sha256_of_source", pa.string()),
)  # fmt: skip
SEEN = (
    ("key", pa.string()), ("width", pa.int32()), ("height", pa.int32()), ("sha256", pa.string()),
    ("phash", pa.uint64()), ("verdict", pa.string()),
)  # fmt: skip


def pictures_of(tar: Path) -> Iterator[tuple[str, bytes, bytes]]:
    """(key, encoded picture, caption) of every sample of a downloaded tar, in key order."""
    for key, fields in iterate_tar(tar):
        found = [name for name in PICTURES if name in fields]
        if not found or "txt" not in fields:
            expected = f"a picture ({', '.join(PICTURES)}) and a txt"
            raise CorruptSample(f"{tar}: sample {key} has {', '.join(sorted(fields))}; expected {expected}")
        yield key, fields[found[0]], fields["txt"]


def judge(rgb: np.ndarray, settings: FilterImagesConfig) -> str:
    """The verdict on the pixels of one picture, (h, w, 3) uint8."""
    shorter, longer = sorted(rgb.shape[:2])
    if shorter < settings.min_size:
        return "too_small"
    return "extreme_shape" if longer > settings.max_aspect * shorter else ""


def schema(settings: FilterImagesConfig) -> pa.Schema:
    """The columns of a shard; scores only where they are asked for."""
    scores = [("clip_similarity", pa.float32()), *((name, pa.float32()) for name in settings.heads)]
    if settings.clip is None:
        return pa.schema([*SEEN, *KNOWN])
    embedding = [("embedding", pa.list_(pa.float16()))] if settings.clip.keep_embeddings else []
    return pa.schema([*SEEN, *KNOWN, *scores, *embedding])


def known_of_sources(download: StageFolder, record: Record) -> dict[str, dict[str, Any]]:
    """key -> what the ledger of a shard says of the file as it came; nothing where there is no ledger."""
    name = f"{shard_name(record.shard or 0)}.parquet"
    if name not in record.files:
        return {}
    rows = pq.read_table(download.data(name), columns=["key", "original_width", "original_height", "md5", "sha256"])
    return {row["key"]: {"original_width": row["original_width"], "original_height": row["original_height"],
                         "md5_of_source": row["md5"], "sha256_of_source": row["sha256"]}
            for row in rows.to_pylist()}  # fmt: skip


def sizes(job: Job) -> dict[str, int]:
    """What makes a worker take more memory or less."""
    clip = job.what["dataset.filter_images"].clip
    return {} if clip is None else {"dataset.filter_images.clip.batch_size": clip.batch_size}


class Worker:
    """Judges shards; holds the networks that score, where there are any, on the device that its cluster gives it."""

    def __init__(self, job: Job) -> None:
        self.job, self.settings = job, job.what["dataset.filter_images"]
        self.scorer: Any = None
        if self.settings.clip is not None or self.settings.heads:
            from pipelines.selecting.scores import Scorer  # torch and open_clip: four seconds that only scores need

            self.scorer = Scorer(self.settings, device_of(job.how.cluster.filter_images.num_gpus, "filter_images"))

    def run_shard(self, shard: int) -> Record:
        """Judges the pictures of one shard and commits what was seen."""
        name, download = shard_name(shard), self.job.inputs["download"]
        source = download.record(shard)
        if source is None:
            raise FileNotFoundError(f"download has no shard {name}; run +stage=download first")
        known = known_of_sources(download, source)
        seen = sorted(self._look(download.data(f"{name}.tar")), key=lambda row: row["key"])
        rows = [{**row, **known.get(row["key"], {})} for row in seen]
        dropped = Counter(row["verdict"] for row in rows if row["verdict"])
        table = pa.Table.from_pylist(rows, schema=schema(self.settings))
        with self.job.output.attempt(shard, self.job.fingerprint) as attempt:
            pq.write_table(table, attempt.path / f"{name}.parquet", compression="zstd")
            return attempt.commit(
                rows=source.samples,
                samples=len(rows) - dropped.total(),
                dropped=dict(dropped),
                inputs={f"download/{name}": source.digest},
            )

    def _look(self, tar: Path) -> Iterator[dict[str, Any]]:
        """One row for each sample of a tar; those that are kept are scored, a batch at a time."""
        waiting: list[tuple[dict[str, Any], np.ndarray, str]] = []
        for key, data, caption in pictures_of(tar):
            row = {"key": key, "sha256": hashlib.sha256(data).hexdigest(), "width": 0, "height": 0, "phash": 0}
            try:
                rgb = decode_rgb(data)
            except ImageError as error:
                yield {**row, "verdict": f"undecodable_{error.reason}"}
                continue
            phash = int(str(imagehash.phash(Image.fromarray(rgb))), 16)
            row |= {"width": rgb.shape[1], "height": rgb.shape[0], "phash": phash}
            row["verdict"] = judge(rgb, self.settings)
            if self.scorer is None or row["verdict"]:
                yield row
                continue
            waiting.append((row, rgb, caption.decode("utf-8", "replace")))
            if len(waiting) == self.settings.clip.batch_size:
                yield from self._scored(waiting)
                waiting = []
        yield from self._scored(waiting)

    def _scored(self, waiting: list[tuple[dict[str, Any], np.ndarray, str]]) -> Iterator[dict[str, Any]]:
        from pipelines.selecting.scores import Picture

        scores = self.scorer([Picture(rgb, caption) for _, rgb, caption in waiting]) if waiting else []
        for (row, _, _), score in zip(waiting, scores, strict=True):
            yield {**row, **score}


def write_empty(job: Job, shard: int, folder: Path) -> dict[str, Any]:
    """The file of a shard of which nothing was seen."""
    table = pa.Table.from_pylist([], schema=schema(job.what["dataset.filter_images"]))
    pq.write_table(table, folder / f"{shard_name(shard)}.parquet", compression="zstd")
    return {}


def run_shard(job: Job, shard: int) -> Record:
    """One shard by a worker of its own."""
    return Worker(job).run_shard(shard)

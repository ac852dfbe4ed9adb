"""Looks at every downloaded picture and writes what it saw: true size, hashes, and a verdict by reason. No pixels.

download/000042.tar -> filter_images/000042.parquet, one row for each picture in key order:

    key, width, height, sha256 of the bytes, phash (64 bits), verdict ("" is kept)

Only cheap, permanent rules act here, each on one picture alone. What needs the whole set or a threshold that people
change (near-duplicates, scores) is a selection and re-encodes nothing: pipelines/selection.py.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from typing import Any

import imagehash
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from ldm.images import ImageError, decode_rgb
from ldm.shards import iterate_tar
from pipelines.dag import Job
from pipelines.manifest import Record, shard_name
from pipelines.settings import FilterImagesConfig

PICTURES = ("jpg", "png", "webp")
SCHEMA = pa.schema([
    ("key", pa.string()), ("width", pa.int32()), ("height", pa.int32()), ("sha256", pa.string()),
    ("phash", pa.uint64()), ("verdict", pa.string()),
])  # fmt: skip


def picture_of(fields: dict[str, bytes]) -> bytes:
    """The encoded picture of a sample, whatever its format. Raises KeyError when there is none."""
    return next(fields[name] for name in PICTURES if name in fields)


def judge(data: bytes, settings: FilterImagesConfig) -> dict[str, Any]:
    """What is known of one picture, and the verdict on it."""
    seen = {"sha256": hashlib.sha256(data).hexdigest(), "width": 0, "height": 0, "phash": 0}
    try:
        rgb = decode_rgb(data)
    except ImageError as error:
        return {**seen, "verdict": f"undecodable_{error.reason}"}
    height, width = rgb.shape[:2]
    seen.update(width=width, height=height, phash=int(str(imagehash.phash(Image.fromarray(rgb))), 16))
    if min(width, height) < settings.min_size:
        return {**seen, "verdict": "too_small"}
    if max(width, height) > settings.max_aspect * min(width, height):
        return {**seen, "verdict": "extreme_shape"}
    return {**seen, "verdict": ""}


def run_shard(job: Job, shard: int) -> Record:
    """Judges the pictures of one shard and commits the verdicts."""
    settings = job.what["dataset.filter_images"]
    name = shard_name(shard)
    source = job.inputs["download"].record(shard)
    if source is None:
        raise FileNotFoundError(f"download has no shard {name}; run +stage=download first")
    tar = job.inputs["download"] / f"{name}.tar"
    rows = [{"key": key, **judge(picture_of(fields), settings)} for key, fields in iterate_tar(tar)]
    dropped = Counter(row["verdict"] for row in rows if row["verdict"])
    with job.output.attempt(shard, job.fingerprint) as attempt:
        pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), attempt.path / f"{name}.parquet", compression="zstd")
        return attempt.commit(
            rows=source.samples,
            samples=len(rows) - dropped.total(),
            dropped=dict(dropped),
            inputs={f"download/{name}": source.digest},
        )

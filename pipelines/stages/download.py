"""Fetches the pictures of a shard with img2dataset, through its three seams, and believes nothing that it says.

filter_metadata/000042.parquet -> download/000042.tar {key.jpg, key.txt, key.json} and download/000042.parquet, the
ledger: every row with its status and, where there is no picture, one word that says why.

The seams: our fetcher in place of its own (safe and polite, pipelines/fetch.py), our resizer (right pixels,
ldm/images.py), our writer (key order, fixed headers). img2dataset counts a picture as a success before it is written
and swallows errors while writing, so members, ledger and rows are counted against each other before the commit.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ldm.images import ImageError, decode_rgb, encode_jpeg, resize_shorter
from ldm.shards import iterate_tar
from pipelines.dag import Job
from pipelines.fetch import Fetcher
from pipelines.manifest import Record, shard_name
from pipelines.settings import DownloadConfig
from pipelines.wire import FetchError

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # it would call home when img2dataset imports it
SHARD_DIGITS = 6
SCHEMA = pa.schema([
    ("key", pa.string()), ("url", pa.string()), ("status", pa.string()), ("reason", pa.string()),
    ("width", pa.int32()), ("height", pa.int32()), ("original_width", pa.int32()), ("original_height", pa.int32()),
])  # fmt: skip


class YieldError(RuntimeError):
    """So few pictures arrive that something must be broken."""


class SortedWriter:
    """img2dataset's writer seam: keeps a shard's samples and writes them in key order when it is closed."""

    def __init__(
        self, shard_id: int, output_folder: str, save_caption: bool, oom_shard_count: int, schema: Any,
        encode_format: str,
    ) -> None:  # fmt: skip
        self.base = Path(output_folder) / shard_name(shard_id)
        self.rows: dict[str, tuple[bytes | None, str, dict[str, Any]]] = {}

    def write(self, picture: bytes | None, key: str, caption: str, meta: dict[str, Any]) -> None:
        self.rows[key] = (picture, caption, meta)

    def close(self) -> None:
        import tarfile

        ledger = []
        with tarfile.open(self.base.with_suffix(".tar"), "w", format=tarfile.USTAR_FORMAT) as tar:
            for key, (picture, caption, meta) in sorted(self.rows.items()):
                reason = "" if picture is not None else str(meta["error_message"])
                sizes = {name: meta[name] for name in ("width", "height", "original_width", "original_height")}
                ledger.append({"key": key, "url": meta["url"], "status": meta["status"], "reason": reason, **sizes})
                if picture is not None:
                    note = json.dumps({"url": meta["url"], **sizes}, sort_keys=True, ensure_ascii=False)
                    for suffix, data in (("jpg", picture), ("json", note.encode()), ("txt", caption.encode())):
                        member = tarfile.TarInfo(f"{key}.{suffix}")
                        member.size = len(data)
                        tar.addfile(member, io.BytesIO(data))
        table = pa.Table.from_pylist(ledger, schema=SCHEMA)
        pq.write_table(table, self.base.with_suffix(".parquet"), compression="zstd")


class PixelResizer:
    """img2dataset's resizer seam: decodes with ldm.images, makes large pictures smaller, stores JPEG."""

    def __init__(self, settings: DownloadConfig) -> None:
        self.settings = settings

    def __call__(self, stream: io.BytesIO, bounding_boxes: Any = None) -> tuple[Any, ...]:
        """(bytes or None, width, height, original width, original height, reason or None)."""
        try:
            rgb = decode_rgb(stream.getvalue(), max_pixels=self.settings.max_pixels)
        except ImageError as error:
            return None, None, None, None, None, error.reason
        small = resize_shorter(rgb, self.settings.image_size)
        (height, width), (original_height, original_width) = small.shape[:2], rgb.shape[:2]
        data = encode_jpeg(small, self.settings.encode_quality)
        return data, width, height, original_width, original_height, None


@contextlib.contextmanager
def fetching_with(fetcher: Fetcher) -> Iterator[None]:
    """img2dataset's fetcher seam: for the time of the block it fetches with ours, which must never raise in there."""
    import img2dataset.downloader as module

    def fetch(row: tuple[int, str], **_: Any) -> tuple[int, io.BytesIO | None, str | None]:
        number, url = row
        try:
            return number, io.BytesIO(fetcher.fetch(url)), None
        except FetchError as error:
            return number, None, error.reason

    original = module.download_image_with_retry
    module.download_image_with_retry = fetch
    try:
        yield
    finally:
        module.download_image_with_retry = original


def run_shard(job: Job, shard: int) -> Record:
    """Downloads one shard and commits what came. Raises YieldError below the configured floor."""
    import img2dataset.downloader as module

    settings: DownloadConfig = job.what["dataset.download"]
    name, source = shard_name(shard), job.inputs["filter_metadata"].record(shard)
    if source is None:
        raise FileNotFoundError(f"filter_metadata has no shard {name}; run +stage=filter_metadata first")
    rows = pq.read_table(job.inputs["filter_metadata"] / f"{name}.parquet", columns=["key", "url", "caption"])
    logging.getLogger("PIL").setLevel(logging.ERROR)
    with job.output.attempt(shard, job.fingerprint) as attempt:
        feather = attempt.path / "input.feather"  # img2dataset deletes it at the end
        asked = rows.select(["url", "caption"])
        with pa.OSFile(str(feather), "wb") as sink, pa.ipc.new_file(sink, asked.schema) as writer:
            writer.write_table(asked)
        key_digits = len(rows["key"][0].as_py()) - SHARD_DIGITS
        downloader = module.Downloader(
            SortedWriter, PixelResizer(settings), settings.threads, True, False, str(attempt.path), ["url", "caption"],
            settings.deadline_seconds, 10**key_digits, SHARD_DIGITS, None, None, "jpg", 0, None, None,
        )  # fmt: skip
        with fetching_with(Fetcher(settings, job.how.connect)):
            downloader.download_shard((shard, str(feather)))
        (attempt.path / f"{name}_stats.json").unlink()  # times and guesses; the ledger says what happened
        dropped = verify(attempt.path / name, rows["key"].to_pylist())
        kept = rows.num_rows - dropped.total()
        if kept < settings.min_yield * rows.num_rows:
            raise YieldError(
                f"shard {name}: {kept} of {rows.num_rows} pictures arrived, fewer than dataset.download.min_yield="
                f"{settings.min_yield}; reasons: {dict(dropped.most_common(4))}. Mend the cause, or lower the floor"
            )
        return attempt.commit(rows=rows.num_rows, samples=kept, dropped=dict(dropped),
                              inputs={f"filter_metadata/{name}": source.digest})


def verify(base: Path, keys: list[str]) -> Counter[str]:
    """Counts tar, ledger and rows against each other; returns the rows without a picture by reason.

    Raises RuntimeError when they differ: img2dataset loses samples in silence.
    """
    ledger = pq.read_table(base.with_suffix(".parquet")).to_pylist()
    arrived = {row["key"] for row in ledger if row["status"] == "success"}
    members = {key for key, fields in iterate_tar(base.with_suffix(".tar")) if {"jpg", "txt"} <= fields.keys()}
    if sorted(row["key"] for row in ledger) != sorted(keys) or members != arrived:
        raise RuntimeError(
            f"{base.name}: {len(keys)} rows were asked for, the ledger has {len(ledger)}, {len(arrived)} of them with "
            f"success, and the tar holds {len(members)} samples: img2dataset lost some"
        )
    return Counter(row["reason"] for row in ledger if row["status"] != "success")

"""Fetches the pictures of a shard with img2dataset, through its three seams, and believes nothing that it says.

filter_metadata/000042.parquet -> download/000042.tar {key.jpg, key.json, key.txt} and download/000042.parquet, the
ledger: every row with its status, hashes of the file that came and, where there is no picture, one word that says why.

The seams: our fetcher in place of its own (safe and polite, pipelines/fetch.py), our resizer (right pixels,
ldm/images.py), our writer (key order, fixed headers). img2dataset counts a picture as a success before it is written
and swallows errors while writing, so members, ledger, rows and its own claim are counted against each other before the
commit. A shard's samples are held in memory until it is whole.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import json
import logging
import os
import sys
import tarfile
from collections import Counter
from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from PIL import __version__ as pillow_version

from ldm.images import WHITE, ImageError, decode_small, encode_jpeg, encode_png, without_notes
from ldm.shards import iterate_tar
from pipelines.dag import Job
from pipelines.fetch import STAND_IN_GONE, Fetcher
from pipelines.fetching.budgets import Ask, HostBudgets
from pipelines.fetching.room import Body, Share
from pipelines.fetching.wire import FetchError
from pipelines.manifest import Record, read_json, shard_name
from pipelines.quarantine import QUARANTINED
from pipelines.settings import DownloadConfig

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # it would call home if anything imported it
ENCODERS = {"jpg": lambda rgb, quality: encode_jpeg(rgb, quality), "png": lambda rgb, quality: encode_png(rgb)}
SHARD_DIGITS = 6
SIZES = ("width", "height", "original_width", "original_height")
HASHES = ("md5", "sha256")  # of the file as it came: lists of pictures that must go name them by one or the other
SCHEMA = pa.schema([
    *((name, pa.string()) for name in ("key", "url", "status", "reason")), *((name, pa.int32()) for name in SIZES),
    *((name, pa.string()) for name in HASHES),
])  # fmt: skip
GIVEN_UP = "given_up"  # a URL that was not asked for any more; no ledger ever holds it
NOT_JUDGED: dict[str, tuple[int, int]] = {}  # output -> (rows, pictures) of shards too small to say anything


class YieldError(RuntimeError):
    """So few pictures arrive that something must be broken."""

    stops_the_run = True


class StandInError(RuntimeError):
    """The server behind dataset.connect has ended, so that nothing can be said about its URLs."""

    stops_the_run = True


class CanaryError(RuntimeError):
    """The picture libraries of a worker do not do what they should."""

    of_the_machine = True


class Arrivals:
    """What has come of one shard: hashes, and counts that say early when so little comes that something is broken.

    Rows that failed before and are tried again count for nothing: little comes of them, and nothing is broken.
    """

    def __init__(self, settings: DownloadConfig, retried: AbstractSet[int] = frozenset()) -> None:
        self.settings, self.retried = settings, retried
        self.hashes: dict[int, tuple[str, str]] = {}
        self.asked, self.arrived, self.given_up = 0, 0, False

    def note(self, number: int, body: bytes | memoryview) -> None:
        self.hashes[number] = (
            hashlib.md5(body, usedforsecurity=False).hexdigest(), hashlib.sha256(body).hexdigest(),
        )  # fmt: skip

    def count(self, number: int, picture: bool) -> None:
        """Counts one row; from `yield_after` rows on the shard is given up for good when the floor is missed."""
        if number in self.retried:
            return
        self.asked += 1
        self.arrived += picture
        enough = self.asked >= self.settings.yield_after
        self.given_up |= enough and self.arrived < self.settings.min_yield * self.asked


# -- the seams --------------------------------------------------------------------------------------------------------
class SortedWriter:
    """img2dataset's writer seam: keeps a shard's samples and writes them in key order when it is closed."""

    def __init__(
        self, shard_id: int, output_folder: str, save_caption: bool, oom_shard_count: int, schema: Any,
        encode_format: str, arrivals: Arrivals | None = None,
    ) -> None:  # fmt: skip
        self.base, self.suffix = Path(output_folder) / shard_name(shard_id), encode_format
        self.arrivals = arrivals  # it fills while the shard is fetched
        self.rows: dict[str, tuple[bytes | None, str, dict[str, Any]]] = {}

    def write(self, picture: bytes | None, key: str, caption: str, meta: dict[str, Any]) -> None:
        self.rows[key] = (picture, caption, meta)
        if self.arrivals is not None and meta["error_message"] != GIVEN_UP:
            self.arrivals.count(row_number(key), picture is not None)

    def close(self) -> None:
        ledger, hashes = [], self.arrivals.hashes if self.arrivals is not None else {}
        with tarfile.open(self.base.with_suffix(".tar"), "w", format=tarfile.USTAR_FORMAT) as tar:
            for key, (picture, caption, meta) in sorted(self.rows.items()):
                reason = "" if picture is not None else str(meta["error_message"])
                sizes = {name: meta[name] for name in SIZES}
                came = dict(zip(HASHES, hashes.get(row_number(key), (None, None)), strict=True))
                row = {"key": key, "url": meta["url"], "status": meta["status"], "reason": reason}
                ledger.append({**row, **sizes, **came})
                if picture is not None:
                    note = json.dumps({"url": meta["url"], **sizes}, sort_keys=True, ensure_ascii=False)
                    for suffix, data in ((self.suffix, picture), ("json", note.encode()), ("txt", caption.encode())):
                        member = tarfile.TarInfo(f"{key}.{suffix}")  # owner, time and mode are the same for all
                        member.size = len(data)
                        tar.addfile(member, io.BytesIO(data))
        table = pa.Table.from_pylist(ledger, schema=SCHEMA)
        pq.write_table(table, self.base.with_suffix(".parquet"), compression="zstd")


def row_number(key: str) -> int:
    """The place in its shard of the row with this key."""
    return int(key[SHARD_DIGITS:])


class PixelResizer:
    """img2dataset's resizer seam: decodes with ldm.images, makes large pictures smaller, stores JPEG or PNG.

    A JPEG that may stay as it is keeps its bytes, without the notes in them.
    """

    def __init__(self, settings: DownloadConfig) -> None:
        if settings.encode_format not in ENCODERS:
            expected = " or ".join(ENCODERS)
            raise ValueError(f"dataset.download.encode_format={settings.encode_format}; expected {expected}")
        self.settings, self.encode = settings, ENCODERS[settings.encode_format]

    def __call__(self, stream: io.BytesIO | Body, bounding_boxes: Any = None) -> tuple[Any, ...]:
        """(bytes or None, width, height, original width, original height, reason or None)."""
        body = stream.getvalue()
        try:
            small, original, as_it_came = decode_small(
                body, self.settings.image_size, max_pixels=self.settings.max_pixels
            )
        except ImageError as error:
            return None, None, None, None, None, error.reason
        (height, width), (original_height, original_width) = small.shape[:2], original
        data = self._stored(small, body if as_it_came else None)
        return data, width, height, original_width, original_height, None

    def _stored(self, rgb: np.ndarray, jpeg: bytes | None) -> bytes:
        if jpeg is not None and self.settings.encode_format == "jpg":  # to encode it anew would only lose quality
            with contextlib.suppress(ValueError):  # Pillow bears markers that the standard does not allow
                return without_notes(jpeg)
        return self.encode(rgb, self.settings.encode_quality)


@cache
def fetcher_of_process(settings: DownloadConfig, connect: str | None) -> Fetcher:
    """One for all shards of a process, so that budgets, robots.txt and connections outlast a shard."""
    return Fetcher(settings, connect)


def load_downloader() -> Any:
    """The module img2dataset.downloader, without its package.

    The package would load torch, albumentations and a command line: five seconds and 600 MB in every worker.
    """
    if "img2dataset" not in sys.modules:
        spec = importlib.util.find_spec("img2dataset")
        if spec is None:
            raise ModuleNotFoundError("no module img2dataset; install it with: pip install 'img2dataset>=1.47,<1.48'")
        sys.modules["img2dataset"] = importlib.util.module_from_spec(spec)  # made, but not run
    import img2dataset.downloader

    return img2dataset.downloader


@contextlib.contextmanager
def fetching_with(fetcher: Fetcher, arrivals: Arrivals) -> Iterator[None]:
    """img2dataset's fetcher seam: for the time of the block it fetches with ours, which must never raise in there."""
    module = load_downloader()

    def fetch(row: tuple[int, str], **_: Any) -> tuple[int, Body | None, str | None]:
        number, url = row
        if arrivals.given_up:
            return number, None, GIVEN_UP
        share = Share(fetcher.room)
        try:
            body = fetcher.fetch(url, share)
        except FetchError as error:
            return number, None, error.reason
        arrivals.note(number, body)
        return number, Body(body, share), None

    original = module.download_image_with_retry
    module.download_image_with_retry = fetch
    try:
        yield
    finally:
        module.download_image_with_retry = original


# -- one shard --------------------------------------------------------------------------------------------------------
def shared(job: Job) -> type[HostBudgets] | None:
    """What the workers of all runs share one instance of, in an actor of pipelines/cluster.py."""
    return None if job.what["dataset.download"].requests_per_second is None else HostBudgets


def run_shard(job: Job, shard: int, ask: Ask | None = None) -> Record:
    """Downloads one shard and commits what came; `ask` gives the turns of hosts that other workers ask too.

    Raises YieldError below the configured floor, and StandInError when the embedded web ends meanwhile: it ends with
    the driver, and a worker that outlives both must not blame the URLs.
    """
    settings: DownloadConfig = job.what["dataset.download"]
    name, source = shard_name(shard), job.inputs["filter_metadata"].record(shard)
    if source is None:
        raise FileNotFoundError(f"filter_metadata has no shard {name}; run +stage=filter_metadata first")
    check_canary(settings)
    rows = pq.read_table(job.inputs["filter_metadata"].data(f"{name}.parquet"), columns=["key", "url", "caption"])
    with job.output.attempt(shard, job.fingerprint) as attempt:
        base = attempt.path / name
        arrivals, fetcher = begin_count(job, shard), fetcher_of_process(settings, job.how.connect)
        if ask is not None:
            fetcher.share(ask)
        said = _download(rows, shard, attempt.path, settings, fetcher, arrivals)
        dropped = verify(base, rows["key"].to_pylist(), settings.encode_format, said)
        Path(f"{base}_stats.json").unlink()  # times and guesses; the ledger says what happened
        if dropped[STAND_IN_GONE]:
            raise StandInError(
                f"shard {name}: the server at dataset.connect={job.how.connect} has ended, expected it to answer until "
                f"the end; nothing of the shard is committed. The same command starts it and goes on"
            )
        if arrivals.given_up:
            del dropped[GIVEN_UP]
            raise YieldError(
                f"shard {name}: {arrivals.arrived} of {arrivals.asked} pictures arrived, fewer than dataset.download."
                f"min_yield={settings.min_yield}; reasons: {dict(dropped.most_common(4))}. Mend the cause, or lower "
                f"the floor: the same command with a lower dataset.download.min_yield goes on from here"
            )
        end_count(job, arrivals)
        kept = rows.num_rows - dropped.total()
        return attempt.commit(rows=rows.num_rows, samples=kept, dropped=dict(dropped),
                              inputs={f"filter_metadata/{name}": source.digest},
                              facts={"background": list(WHITE)})


def begin_count(job: Job, shard: int) -> Arrivals:
    """The counts of a shard that begins; one of too few rows to be judged goes on where its worker left the last one.

    They are kept in the worker and not on disk, so that a command that is given again judges only what it fetches.
    """
    retried, rows = set(), pq.ParquetFile(job.inputs["filter_metadata"].data(f"{shard_name(shard)}.parquet"))
    if "retry_of" in rows.schema_arrow.names:
        keys = rows.read(["retry_of"])["retry_of"].to_pylist()
        retried = {number for number, key in enumerate(keys) if key is not None}
    arrivals = Arrivals(job.what["dataset.download"], retried)
    if rows.metadata.num_rows - len(retried) < arrivals.settings.yield_after:
        arrivals.asked, arrivals.arrived = NOT_JUDGED.pop(str(job.output.path), (0, 0))
    return arrivals


def end_count(job: Job, arrivals: Arrivals) -> None:
    """Keeps the counts of a shard that was too small to be judged for the next one."""
    if arrivals.asked < arrivals.settings.yield_after:
        NOT_JUDGED[str(job.output.path)] = arrivals.asked, arrivals.arrived


def write_empty(job: Job, shard: int, folder: Path) -> dict[str, Any]:
    """The files of a shard whose every row is quarantined."""
    name, settings = shard_name(shard), job.what["dataset.download"]
    rows = pq.read_table(job.inputs["filter_metadata"].data(f"{name}.parquet"), columns=["key", "url", "caption"])
    writer = SortedWriter(shard, str(folder), True, SHARD_DIGITS, None, settings.encode_format)
    for row in rows.to_pylist():
        meta = {"url": row["url"], "status": QUARANTINED, "error_message": QUARANTINED, **dict.fromkeys(SIZES)}
        writer.write(None, row["key"], row["caption"], meta)
    writer.close()
    return {}


def _download(
    rows: pa.Table, shard: int, folder: Path, settings: DownloadConfig, fetcher: Fetcher, arrivals: Arrivals
) -> str:
    """Lets img2dataset fill a folder; returns what it said, which is where it reports the errors that it swallows."""
    module = load_downloader()
    logging.getLogger("PIL").setLevel(logging.ERROR)
    asked, feather = rows.select(["url", "caption"]), folder / "input.feather"  # img2dataset deletes it at the end
    with pa.OSFile(str(feather), "wb") as sink, pa.ipc.new_file(sink, asked.schema) as writer:
        writer.write_table(asked)
    key_digits = len(rows["key"][0].as_py()) - SHARD_DIGITS
    downloader = module.Downloader(
        partial(SortedWriter, arrivals=arrivals), PixelResizer(settings), settings.threads, True, False,
        str(folder), ["url", "caption"], settings.deadline_seconds, 10**key_digits, SHARD_DIGITS, None, None,
        settings.encode_format, 0, None, None,
    )  # fmt: skip
    said = io.StringIO()
    with fetching_with(fetcher, arrivals), contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        downloader.download_shard((shard, str(feather)))
    return said.getvalue()


def verify(base: Path, keys: list[str], suffix: str, said: str = "") -> Counter[str]:
    """Counts tar, ledger, rows and claim against each other; returns the rows without a picture by reason.

    Raises RuntimeError when they differ: img2dataset loses samples in silence.
    """
    ledger = pq.read_table(base.with_suffix(".parquet")).to_pylist()
    claim = read_json(f"{base}_stats.json")
    arrived = {row["key"] for row in ledger if row["status"] == "success"}
    whole = {suffix, "json", "txt"}
    members = {key for key, fields in iterate_tar(base.with_suffix(".tar")) if fields.keys() == whole}
    found = sorted(row["key"] for row in ledger)
    if found != sorted(keys) or members != arrived or (claim["count"], claim["successes"]) != (len(keys), len(arrived)):
        raise RuntimeError(
            f"{base.name}: {len(keys)} rows were asked for; the ledger has {len(found)}, {len(arrived)} of them with "
            f"success; the tar holds {len(members)} whole samples; img2dataset claims {claim['successes']} of "
            f"{claim['count']}. It lost some, and said: {said[-600:].strip() or 'nothing'}"
        )
    return Counter(row["reason"] for row in ledger if row["status"] != "success")


# -- the canary -------------------------------------------------------------------------------------------------------
QUARTERS = np.array([[[220, 30, 30], [30, 180, 40]], [[40, 60, 210], [240, 220, 60]]], np.uint8)  # upright
CANARY_LEVELS = 12  # of 255, by which a colour may differ


@cache
def check_canary(settings: DownloadConfig) -> None:
    """Sends a known picture through the resizer, once in each process. Raises CanaryError when another comes out.

    Releases of picture libraries have broken decoding or resizing before, and runs went on with rubbish or nothing.
    """
    half = settings.image_size // 2 + 16
    upright = QUARTERS.repeat(3 * half // 2, 0).repeat(half, 1)
    note, lying = Image.Exif(), io.BytesIO()
    note[0x0112] = 6  # EXIF: turn it by a quarter to see it upright
    Image.fromarray(np.ascontiguousarray(np.rot90(upright))).save(lying, "JPEG", quality=95, exif=note)
    data, width, height, *_, reason = PixelResizer(replace(settings, max_pixels=1 << 30))(lying)
    size = (settings.image_size, round(settings.image_size * upright.shape[0] / upright.shape[1]))
    problem = reason or ((width, height) != size and f"{width} x {height}, expected {size[0]} x {size[1]}")
    if not problem:
        with Image.open(io.BytesIO(data)) as picture:
            pixels = np.asarray(picture.convert("RGB")).astype(int)
        rows, columns = (slice(side // 4, None, side // 2) for side in pixels.shape[:2])
        seen = pixels[rows, columns][:2, :2]
        problem = np.abs(seen - QUARTERS).max() > CANARY_LEVELS and f"{seen.tolist()}, expected {QUARTERS.tolist()}"
    if problem:
        raise CanaryError(
            f"a known picture came out of the resizer as {problem}. The picture libraries of this worker (Pillow "
            f"{pillow_version}) are not to be trusted; restore them: pip install -c infra/constraints.txt -e ."
        )

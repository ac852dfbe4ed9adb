"""The embedded data set: a small real web of captioned pictures on loopback, as unkind as the real one.

`write_metadata` writes what a crawl of it would list, `serving` lets it answer for the time of a block, and
`expected_funnel` says how many rows must fall where, from the plan alone.
"""

from __future__ import annotations

import dataclasses
import hashlib
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.embedded_web.plan import ENDLESS_BYTES, FATE, Row, plan
from pipelines.manifest import write_whole
from pipelines.settings import SampleWebConfig

if TYPE_CHECKING:
    from pipelines.config import DatasetConfig

ROOT = Path(__file__).resolve().parent.parent
LOOPBACK = "127.0.0.1"


# -- what a crawl lists -----------------------------------------------------------------------------------------------
def write_metadata(config: SampleWebConfig, path: Path) -> None:
    """Writes a parquet file with LAION's columns; the same bytes for the same settings. The scores are synthetic."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from pipelines.embedded_web.drawings import ATTRIBUTION, LICENSE

    types = {"SAMPLE_ID": pa.int64(), "URL": pa.string(), "TEXT": pa.string(), "WIDTH": pa.int32(),
             "HEIGHT": pa.int32(), "LICENSE": pa.string(), "NSFW": pa.string(), "similarity": pa.float64(),
             "punsafe": pa.float32(), "pwatermark": pa.float32(), "hash": pa.int64()}  # fmt: skip
    notes = {"scores": f"synthetic: similarity, punsafe, pwatermark and NSFW are drawn from seed {config.seed}",
             "pictures": ATTRIBUTION}  # fmt: skip
    schema = pa.schema(list(types.items()), metadata=notes)
    rows = [{**_listed(row), "SAMPLE_ID": i, "LICENSE": LICENSE} for i, row in enumerate(plan(config))]
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), sink, compression="snappy")
    write_whole(path, sink.getvalue().to_pybytes())


def _listed(row: Row) -> dict[str, Any]:
    told = f"{row.url}{row.caption}".encode()
    return {
        "URL": row.url,
        "TEXT": row.caption,
        "WIDTH": row.width,
        "HEIGHT": row.height,
        "NSFW": "UNLIKELY" if row.punsafe < 0.2 else "UNSURE" if row.punsafe < 0.6 else "NSFW",
        "similarity": row.similarity,
        "punsafe": row.punsafe,
        "pwatermark": row.pwatermark,
        "hash": int.from_bytes(hashlib.sha256(told).digest()[:8], "big", signed=True),  # of the text, as in LAION
    }


# -- what must become of it -------------------------------------------------------------------------------------------
def expected_funnel(dataset: DatasetConfig) -> dict[str, dict[str, int]]:
    """Stage -> {reason: rows that fall there}, and "selection" -> near-duplicates, from the plan and nothing else.

    Raises ValueError where the settings are outside of what the plan was made for, so that rows would fall otherwise.
    """
    if dataset.sample_web is None:
        raise ValueError("dataset.sample_web is null: nothing is known of what the web holds")
    _check_fits(dataset)
    funnel: dict[str, Counter[str]] = {}
    for row in plan(dataset.sample_web):
        stage, reason = FATE[row.kind]
        if stage:
            funnel.setdefault(stage, Counter())[reason] += 1
    return {stage: dict(reasons) for stage, reasons in funnel.items()}


def _check_fits(dataset: DatasetConfig) -> None:
    first, download, images = dataset.filter_metadata, dataset.download, dataset.filter_images
    low, high = first.bounds.get("similarity", [None, None])
    ranges: dict[str, tuple[float | None, float, float]] = {  # setting -> (value, lowest, highest) that the plan bears
        "filter_metadata.min_size": (first.min_size, 65, 130),
        "filter_metadata.max_aspect": (first.max_aspect, 1.34, 4.4),
        "filter_metadata.min_caption_chars": (first.min_caption_chars, 3, 3),
        "filter_metadata.bounds.similarity[0]": (low, 0.27, 0.29),
        "filter_metadata.bounds.similarity[1]": (high, 0.42, 1.9),
        "filter_metadata.bounds.punsafe[1]": (first.bounds.get("punsafe", [None, None])[1], 0.31, 0.59),
        "filter_metadata.bounds.pwatermark[1]": (first.bounds.get("pwatermark", [None, None])[1], 0.61, 0.84),
        "download.image_size": (download.image_size, images.min_size, 10**9),
        "download.max_pixels": (download.max_pixels, 400 * 534, 30_000**2 - 1),
        "download.max_bytes": (download.max_bytes, 500_000, ENDLESS_BYTES - 1),
        "download.max_redirects": (download.max_redirects, 2, 20),
        "download.respect_robots": (download.respect_robots, 1, 1),
        "filter_images.min_size": (images.min_size, 65, 130),
        "filter_images.max_aspect": (images.max_aspect, 1.6, 3.9),
    }
    wrong = [f"dataset.{name}={value} (expected {least} to {most})" for name, (value, least, most) in ranges.items()
             if value is None or not least <= value <= most]  # fmt: skip
    if wrong:
        raise ValueError(f"the embedded web was not planned for {'; '.join(wrong)}")


# -- where it answers -------------------------------------------------------------------------------------------------
@contextmanager
def serving(dataset: DatasetConfig) -> Iterator[str | None]:
    """For the time of the block the embedded web answers on the address that it yields, "127.0.0.1:PORT".

    Where dataset.sample_web is null nothing is served, and dataset.connect is yielded as it is.
    """
    if dataset.sample_web is None:
        yield dataset.connect
        return
    host, _, port = (dataset.connect or f"{LOOPBACK}:0").rpartition(":")
    if host != LOOPBACK or not port.isdigit():
        raise ValueError(
            f"dataset.connect={dataset.connect}, but the embedded web answers on loopback only: "
            f"expected {LOOPBACK}:PORT or null; for a web of your own set dataset.sample_web=null"
        )
    settings = [f"{name}={value}" for name, value in dataclasses.asdict(dataset.sample_web).items()]
    process = subprocess.Popen(
        [sys.executable, "-m", "pipelines.embedded_web.server", *settings, f"port={port}"],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        start_new_session=True,  # Ctrl-C is for the driver, which may still want to finish a shard
    )  # fmt: skip
    assert process.stdin is not None and process.stdout is not None
    try:
        address = process.stdout.readline().strip()
        if not address:
            raise RuntimeError(f"the embedded web ended with {process.wait()} before it answered; it said why above")
        yield address
    finally:
        process.stdin.close()
        process.terminate()
        process.wait()
        process.stdout.close()

"""Report, status, selection and the search for what must go read shards in a bucket as they read them on a disk."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from pipelines import status
from pipelines.config import plain
from pipelines.dag import Dag
from pipelines.journal import Journal, journal_path
from pipelines.report import write_report
from pipelines.selecting.removed import describe_removed
from pipelines.selection import REASONS
from pipelines.stages.train import prepare
from tests.pipelines.small_cache import config_of, make_cache
from tests.s3_server import BUCKET, S3Server


def told(outputs: Path, *overrides: str) -> dict[str, Any]:
    """What is said of a run whose shards lie where the overrides say."""
    make_cache(outputs, *overrides, shards=3)
    config = config_of(outputs, *overrides, "dataset.selection.near_duplicate_bits=20")
    dag = Dag(config)
    train = dag.refresh("train").job
    train.output.write_plan(dag.plan("train"))
    prepared = prepare(train)
    said = Journal(journal_path(dag.run_folder, "run"))
    said.status("RUNNING")
    said.params(plain(config))
    said.close()
    (outputs / "removed.txt").write_text("00000203\nhttp://pictures.example/00000001\n")
    page = write_report(dag.run_folder).read_text()
    parts = re.findall(r'<section id="(where-every|what-the-data|examples)[^>]*>(.*?)</section>', page, re.DOTALL)
    return {
        "report": dict(parts), "status": status.describe(config)[1:], "reasons": prepared.reasons,
        "removed": [line.replace(str(outputs), "") for line in describe_removed(config, outputs / "removed.txt")],
        "selection": (train.output / "selection.parquet").read_bytes(), "why": (train.output / REASONS).read_bytes(),
    }  # fmt: skip


@pytest.mark.slow
def test_what_is_said_of_shards_in_a_bucket_is_what_is_said_of_shards_on_a_disk(s3: S3Server, tmp_path: Path) -> None:
    on_disk = told(tmp_path / "disk")
    cache = f"cluster.cache.folder={tmp_path / 'cache'}"
    on_s3 = told(tmp_path / "s3", f"paths.shards=s3://{BUCKET}/shards", cache)
    assert on_s3 == on_disk
    assert any(key.endswith("/filter_images/000002.parquet") for key in s3.keys("shards/"))
    assert not list((tmp_path / "s3").rglob("00000?.*"))
    page, reasons = on_disk["report"], on_disk["reasons"]
    assert set(page) == {"where-every", "what-the-data", "examples"}
    assert reasons["near_duplicate"] and "Dropped: near duplicate" in page["examples"]
    assert "18 as measured" in page["what-the-data"] and "18 in = 18 out" in page["where-every"]

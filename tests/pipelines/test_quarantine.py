"""Shards that keep failing are left out by name, as many as may be, and come back when they are mended."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest

from ldm.node_cache import DamagedFile
from ldm.shards import CorruptSample
from pipelines import cluster, extend, quarantine, report, run, status
from pipelines.config import compose
from pipelines.dag import Dag
from pipelines.manifest import StaleError
from pipelines.selection import all_samples, select
from pipelines.stages import download
from pipelines.stages.train_autoencoder import read_pictures
from pipelines.training_set import closed_records, shard_infos
from pipelines.verify import verify
from tests.pipelines.small_cache import config_of, make_downloads

STAGES = ["filter_images", "precompute_latents"]
SHARDS, ROWS = 3, 4
KIND = 156  # where the header of a member says what it is


@pytest.fixture(scope="module")
def ray_here() -> Iterator[None]:
    with cluster.connect(compose([]).cluster):
        yield


def dag_of(outputs: Path, *overrides: str) -> Dag:
    dag = Dag(config_of(outputs, *overrides))
    for stage in STAGES:
        dag.refresh(stage)
    return dag


def go(outputs: Path, most: int, *overrides: str, stages: list[str] = STAGES) -> Dag:
    """What the command does once Ray is there."""
    dag = Dag(config_of(outputs, f"cluster.max_quarantined_shards={most}", *overrides))
    with ExitStack() as stack:
        run._statuses(dag, stages, stack)
        if dag.config.overwrite:
            run._forget_quarantined(dag, stages, stack)
        for stage in stages:
            dag.refresh(stage)
            run.begin(dag, stage)
        run._stream(dag, stages, list(range(SHARDS)), None, lambda stage, record: None)
        assert all(run._close(dag, stage) for stage in stages)
    return dag


def damage(outputs: Path, shard: int, kind: bytes = b"2") -> None:
    """Makes a link of the first member of a download, or a file of it again."""
    with open(outputs / f"small/download/{shard:06d}.tar", "r+b") as tar:
        tar.seek(KIND)
        tar.write(kind)


def written(outputs: Path) -> dict[str, int]:
    """When the records of both stages were written."""
    return {f"{stage} {path.stem}": path.stat().st_mtime_ns for stage in STAGES
            for path in (outputs / "small" / stage).glob("[0-9]*.json")}  # fmt: skip


def test_a_shard_that_keeps_failing_is_left_out_by_name(
    ray_here: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_downloads(Dag(config_of(tmp_path)), SHARDS, ROWS)
    damage(tmp_path, 1)
    with pytest.raises(cluster.ShardsFailed, match="filter_images: shard 1 failed.*CorruptSample.*00000100.png"):
        go(tmp_path, 0, stages=["filter_images"])
    assert sorted(before := written(tmp_path)) == ["filter_images 000000", "filter_images 000002"]
    status_of = go(tmp_path, 1, stages=["filter_images"]).statuses["filter_images"]
    said = capsys.readouterr().out
    assert "shard 1 failed and is tried again" in said and "shard 1 is quarantined: CorruptSample" in said
    assert status_of.done and before.items() <= written(tmp_path).items()
    assert status_of.funnel == {"rows": SHARDS * ROWS, "samples": (SHARDS - 1) * ROWS, "dropped": {"quarantined": ROWS}}
    assert "00000100.png" in quarantine.quarantined(status_of.records.values())[1]
    assert verify(tmp_path / "small/filter_images", 1).findings == []
    lines = "\n".join(status.describe(config_of(tmp_path)))
    assert "shard 000001 is quarantined: CorruptSample" in lines and "+stage=filter_images overwrite=true" in lines
    assert "shard 000001 is quarantined" in report.write_report(tmp_path / "small").read_text()


@pytest.mark.slow
def test_later_stages_find_an_empty_shard_and_once_it_is_mended_all_of_it(
    ray_here: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_downloads(Dag(config_of(tmp_path)), SHARDS, ROWS)
    damage(tmp_path, 1)
    dag = go(tmp_path, 1)
    assert dag.statuses["precompute_latents"].funnel == {"rows": 8, "samples": 8, "dropped": {}}
    check_what_training_sees(dag)
    for stage in STAGES:
        assert verify(tmp_path / "small" / stage, 1).findings == []

    damage(tmp_path, 2)
    for stage in STAGES:
        (tmp_path / "small" / stage / "000002.json").unlink()
    with pytest.raises(cluster.ShardsFailed, match="more than cluster.max_quarantined_shards=1 of a stage"):
        go(tmp_path, 1)
    for shard in (1, 2):
        damage(tmp_path, shard, b"0")
    go(tmp_path, 1)
    assert quarantine.quarantined(dag_of(tmp_path).statuses["filter_images"].records.values()).keys() == {1}

    before = written(tmp_path)
    dag = go(tmp_path, 0, "overwrite=true")
    assert "filter_images tries again what was quarantined: 1" in capsys.readouterr().out
    after = written(tmp_path)
    assert {name for name in after if after[name] != before[name]} == {f"{stage} 000001" for stage in STAGES}
    assert [dag.statuses[stage].funnel["samples"] for stage in STAGES] == [SHARDS * ROWS] * 2
    assert verify(tmp_path / "small", 1).findings == []


def check_what_training_sees(dag: Dag) -> None:
    """The other shards, as if there were no such one."""
    jobs = {stage: dag.statuses[stage].job for stage in STAGES}
    latents, images = jobs["precompute_latents"].output, jobs["filter_images"].output
    assert [len(shard_infos(latents, record)) for record in closed_records(latents).values()] == [1, 0, 1]
    assert len(read_pictures(jobs["precompute_latents"], 32)[1]) == (SHARDS - 1) * ROWS
    metadata = dag.statuses["filter_metadata"].job.output
    limits = dag.config.cluster.filter_metadata
    known = all_samples(metadata, images, range(SHARDS))
    masks = select(known, dag.config.dataset.selection, limits, dag.run_folder).masks()
    assert [len(mask) for mask in masks.values()] == [ROWS, 0, ROWS]


@pytest.mark.slow
def test_what_was_made_of_a_quarantined_shard_is_stale_when_that_alone_is_tried_again(
    ray_here: None, tmp_path: Path
) -> None:
    make_downloads(Dag(config_of(tmp_path)), SHARDS, ROWS)
    damage(tmp_path, 1)
    go(tmp_path, 1)
    damage(tmp_path, 1, b"0")
    dag = Dag(config_of(tmp_path, "overwrite=true"))
    with ExitStack() as stack:
        dag.refresh("filter_images")
        assert run._forget_quarantined(dag, ["filter_images"], stack) == {1}
    dag.refresh("filter_images")
    run._stream(dag, ["filter_images"], list(range(SHARDS)), None, lambda stage, record: None)
    assert run._close(dag, "filter_images")
    with pytest.raises(StaleError, match=r"000001.json was made from filter_images/000001 .*\+stage=precompute_lat"):
        dag.refresh("precompute_latents")


def test_the_rows_of_a_quarantined_download_can_be_fetched_in_a_later_edition(tmp_path: Path) -> None:
    dag = Dag(config_of(tmp_path))
    make_downloads(dag, 2, ROWS)
    job = dag.statuses["download"].job
    record = quarantine.give_up(job, 1, "x" * 5000)
    assert (record.rows, record.samples, record.dropped) == (ROWS, 0, {"quarantined": ROWS})
    assert job.output.record_path(1).stat().st_size < 2048 and list(record.inputs) == ["filter_metadata/000001"]
    ledger = pq.read_table(job.output / "000001.parquet")
    assert ledger.schema.equals(download.SCHEMA) and set(ledger["reason"].to_pylist()) == {"quarantined"}
    pq.write_table(ledger.slice(0, 0), job.output / "000000.parquet")  # that of a shard that lost nothing
    metadata = job.inputs["filter_metadata"]
    assert extend.failures(metadata, job.output) == {"quarantined": ROWS}
    again = list(extend.failed_rows(metadata, job.output, {"quarantined"}))
    assert [table["retry_of"].to_pylist() for table in again] == [[f"0000010{i}" for i in range(ROWS)]]


def test_a_shard_that_was_made_before_its_worker_died_is_not_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dag = Dag(config_of(tmp_path, "cluster.max_quarantined_shards=2"))
    make_downloads(dag, 2, ROWS)
    made, deaths = dag.statuses["download"].records, [1, 1]

    def stream(*_: Any) -> None:
        if deaths:
            raise cluster.ShardsFailed("killed", {("download", deaths.pop()): "WorkerCrashedError"})

    monkeypatch.setattr(cluster, "stream", stream)
    run._stream(dag, ["download"], [0, 1], None, lambda stage, record: None)
    assert not deaths and dag.refresh("download").records == made


@pytest.mark.parametrize("cause, own", [
    (ValueError("a picture"), True), (CorruptSample("a tar"), True), (OSError(28, "No space left on device"), False),
    (FileNotFoundError("weights"), False), (MemoryError(), False), (ModuleNotFoundError("open_clip"), False),
    (DamagedFile("an object"), False), (download.CanaryError("a library"), False), (download.YieldError("all"), False),
])  # fmt: skip
def test_only_what_lies_in_a_shard_is_its_own(cause: Exception, own: bool) -> None:
    error: Any = SimpleNamespace(cause=cause)
    assert cluster._is_own(error) is own


def test_a_worker_that_cannot_begin_is_no_matter_of_a_shard() -> None:
    error: Any = SimpleNamespace(cause=None, actor_init_failed=True)
    assert not cluster._is_own(error)

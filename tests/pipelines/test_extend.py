"""Editions: what failed is tried again and new rows come in, in new shards; nothing that is done is touched."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ldm.images import encode_png
from pipelines import extend
from pipelines.config import Config, ConfigError, compose
from pipelines.dag import Dag, connected
from pipelines.manifest import StageFolder, edition_digests, sum_funnel
from pipelines.run import _close
from pipelines.stages import download, filter_metadata
from tests.pipelines.unkind_server import Unkind, unkind_server

COLUMNS = "{url: URL, caption: TEXT, width: null, height: null, similarity: null, punsafe: null, pwatermark: null}"


@pytest.fixture
def address(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    picture = encode_png(np.full((120, 130, 3), 77, np.uint8))
    monkeypatch.setattr(Unkind, "on_good", lambda self: self.answer(200, picture))
    monkeypatch.setattr(Unkind, "robots", {"status": 404})
    Unkind.hits.clear()
    with unkind_server() as address:
        yield address


def write(folder: Path, name: str, paths: list[str]) -> None:
    rows = [{"URL": f"http://a.test/{path}", "TEXT": f"caption of {path}"} for path in paths]
    pq.write_table(pa.Table.from_pylist(rows), folder / f"{name}.parquet")


def config_of(folder: Path, *overrides: str) -> Config:
    return compose([
        f"paths.outputs={folder}/outputs", f"dataset.source.metadata={folder}/*.parquet",
        f"dataset.source.columns={COLUMNS}", "dataset.filter_metadata.shard_samples=4", "dataset.sample_web=null",
        "dataset.download.retries=0", "dataset.download.respect_robots=false", *overrides,
    ])  # fmt: skip


def finish(config: Config, address: str) -> Dag:
    """What `python -m pipelines.run` does for these two stages, in this process."""
    dag = Dag(config)
    first = dag.refresh("filter_metadata")
    if not first.done:
        files = filter_metadata.source_files(first.job)
        funnel = filter_metadata.run(first.job, files)
        first.job.output.write_plan(dag.plan("filter_metadata"))
        records = list(first.job.output.committed().values())
        sources = filter_metadata.sources(first.job, files)
        first.job.output.close(first.job.fingerprint, records, funnel, sources=sources)
        dag.refresh("filter_metadata")
    status = dag.refresh("download")
    if status.job.output.read_plan() is None:
        status.job.output.write_plan(dag.plan("download"))
    for shard in status.todo:
        download.run_shard(connected(status.job, address), shard)
    assert _close(dag, "download")
    return dag


def contents(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "manifest.parquet"]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def ledger(dag: Dag) -> dict[str, str]:
    """url -> reason, of its last try."""
    folder = dag.statuses["download"].job.output
    rows = [row for shard in folder.committed() for row in pq.read_table(folder / f"{shard:06d}.parquet").to_pylist()]
    return {row["url"]: row["reason"] for row in rows}


def manifests(dag: Dag) -> list[dict[str, Any]]:
    found = [dag.statuses[stage].job.output.manifest() for stage in ("filter_metadata", "download")]
    return [manifest for manifest in found if manifest is not None]


def test_what_failed_comes_again_in_new_shards_and_nothing_done_is_touched(
    tmp_path: Path, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, "part-0", ["good?1", "failing?1", "missing?1", "good?2", "failing?2", "good?3"])
    config = config_of(tmp_path)
    dag = finish(config, address)
    before, first = contents(tmp_path / "outputs"), [edition_digests(manifest) for manifest in manifests(dag)]
    assert Counter(ledger(dag).values()) == {"": 3, "http_500": 2, "http_404": 1}

    picture = encode_png(np.full((120, 130, 3), 9, np.uint8))
    monkeypatch.setattr(Unkind, "on_failing", lambda self: self.answer(200, picture))
    assert "Edition 2: 2 rows in 1 new shards" in extend.extend(config, {"transient"})
    dag = finish(config, address)
    assert Counter(ledger(dag).values()) == {"": 5, "http_404": 1}
    after = contents(tmp_path / "outputs")
    assert {name: after[name] for name in before} == before
    for manifest, old in zip(manifests(dag), first, strict=True):
        assert manifest["edition"] == 2 and edition_digests(manifest)[:1] == old
        assert [row["edition"] for row in manifest["shards"]] == [1, 1, 2]
    rows = pq.read_table(tmp_path / "outputs/openmoji/filter_metadata/000002.parquet").to_pylist()
    assert [(row["key"], row["retry_of"]) for row in rows] == [("0000020", "0000001"), ("0000021", "0000010")]
    funnels = [manifest["funnel"] for manifest in manifests(dag)]
    assert funnels[0]["samples"] == funnels[1]["rows"] == 8
    assert funnels[1] == sum_funnel(list(dag.statuses["download"].records.values()))

    assert "failed and were not tried again: http_404 1" in extend.extend(config, {"transient"})
    hits = Unkind.hits["/missing?1"]
    extend.extend(config, {"http_404"})
    finish(config, address)
    assert Unkind.hits["/missing?1"] == hits + 1
    assert extend.failures(*folders(dag)) == {"http_404": 1}, "the last try is the one that counts"


def folders(dag: Dag) -> tuple[Any, Any]:
    return tuple(dag.statuses[stage].job.output for stage in ("filter_metadata", "download"))  # type: ignore[return-value]


def test_new_metadata_comes_in_without_what_the_old_has(tmp_path: Path, address: str) -> None:
    write(tmp_path, "part-1", ["good?1", "good?2", "missing?1"])
    config = config_of(tmp_path)
    finish(config, address)
    before = contents(tmp_path / "outputs")
    write(tmp_path, "part-0", ["good?5", "good?1", "good?6", "good?5"])  # its name comes first; its rows do not
    said = extend.extend(config, {"all"})
    assert "Edition 2: 3 rows in 1 new shards (2 new rows fell: {'duplicate_url_caption': 2})" in said
    dag = finish(config, address)
    rows = pq.read_table(tmp_path / "outputs/openmoji/filter_metadata/000001.parquet").to_pylist()
    assert [row["url"].rpartition("/")[2] for row in rows] == ["missing?1", "good?5", "good?6"]
    assert manifests(dag)[0]["funnel"] == {"rows": 8, "samples": 6, "dropped": {"duplicate_url_caption": 2}}
    after = contents(tmp_path / "outputs")
    assert {name: after[name] for name in before} == before
    assert "Nothing to add" in extend.extend(config, set())


def test_an_edition_that_was_cut_off_does_no_harm_and_comes_out_the_same(
    tmp_path: Path, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, "part-0", ["good?1"])
    config = config_of(tmp_path)
    finish(config, address)
    write(tmp_path, "part-1", [f"good?{i}" for i in range(2, 12)])
    def die(*_: Any, **__: Any) -> str:
        raise KeyboardInterrupt

    close = StageFolder.close
    monkeypatch.setattr(StageFolder, "close", die)
    with pytest.raises(KeyboardInterrupt):
        extend.extend(config, set())
    monkeypatch.setattr(StageFolder, "close", close)
    assert Dag(config).refresh("download").done, "shards of an edition that is not closed are not there yet"
    cut_off = contents(tmp_path / "outputs/openmoji/filter_metadata")
    assert "Edition 2: 10 rows in 3 new shards" in extend.extend(config, set())
    assert contents(tmp_path / "outputs/openmoji/filter_metadata") == cut_off
    assert len(finish(config, address).statuses["download"].records) == 4


def test_what_dead_workers_left_goes_when_the_stage_closes(tmp_path: Path, address: str) -> None:
    write(tmp_path, "part-0", ["good?1"])
    left = tmp_path / "outputs/openmoji/download/.attempts/000000-of-a-dead-worker"
    left.mkdir(parents=True)
    finish(config_of(tmp_path), address)
    assert not left.exists()


def test_requests_that_do_not_fit_are_refused(tmp_path: Path, address: str) -> None:
    write(tmp_path, "part-0", ["good?1", "missing?1"])
    config = config_of(tmp_path)
    with pytest.raises(ConfigError, match="filter_metadata in .* is not finished"):
        extend.extend(config, set())
    finish(config, address)
    with pytest.raises(ConfigError, match=r"retry=http_403: nothing failed for that; expected .*http_404 \(1\)"):
        extend.extend(config, {"http_403"})
    write(tmp_path, "part-0", ["good?1", "missing?1", "good?2"])
    with pytest.raises(ValueError, match="rows of closed editions stay as they are"):
        extend.extend(config, set())

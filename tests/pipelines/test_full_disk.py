"""A disk that fills up in the middle of a shard: told as such, by its path; what was committed stays."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines import cluster, run
from pipelines.dag import Dag, connected
from pipelines.settings import Resources
from pipelines.verify import verify
from tests.pipelines.full_disk import FROM_SHARD
from tests.pipelines.test_extend import address, config_of, contents, finish, write

__all__ = ["address"]  # a fixture
SHARDS = 4


@pytest.fixture
def ray_here(tmp_path: Path) -> Iterator[None]:
    with cluster.connect(config_of(tmp_path).cluster):
        yield


def stream(dag: Dag, address: str, module: str) -> None:
    status = dag.refresh("download")
    step = cluster.Step(connected(status.job, address), Resources(0.5, 0, 1), set(status.todo), module)
    cluster.stream([step], list(status.todo), lambda stage, record: None)


@pytest.mark.slow  # it starts a Ray of its own
def test_a_stage_stops_with_what_to_free_keeps_what_is_whole_and_goes_on_to_the_same_bytes(
    ray_here: None, tmp_path: Path, address: str
) -> None:
    write(tmp_path, "part-0", [f"good?{i}" for i in range(4 * SHARDS)])
    finish(config_of(tmp_path, f"paths.outputs={tmp_path}/undisturbed"), address)
    dag = Dag(config_of(tmp_path, f"paths.outputs={tmp_path}/full"))
    run_rows(dag)
    folder = dag.refresh("download").job.output
    folder.write_plan(dag.plan("download"))

    with pytest.raises(cluster.ShardsFailed) as error:
        stream(dag, address, "tests.pipelines.full_disk")
    said = str(error.value)
    assert f"shard {FROM_SHARD} and {SHARDS - FROM_SHARD - 1} more failed" in said and "disk full: OSError" in said
    assert f"{folder.path} is where download writes. Free space there" in said and "goes on" in said
    assert not error.value.own, "no shard is quarantined for it"
    assert folder.shards() == list(range(FROM_SHARD)) and not list(folder.path.glob(".attempts/*"))
    assert verify(folder.path, workers=1).findings == []

    stream(dag, address, "pipelines.stages.download")
    assert run._close(dag, "download")
    made, whole = (contents(tmp_path / name / "openmoji/download") for name in ("full", "undisturbed"))
    assert made == whole and len(made) == 3 * SHARDS + 1


def run_rows(dag: Dag) -> None:
    """filter_metadata, whose records are all that download looks at."""
    from pipelines.stages import filter_metadata

    job = dag.refresh("filter_metadata").job
    files = filter_metadata.source_files(job)
    funnel = filter_metadata.run(job, files)
    job.output.write_plan(dag.plan("filter_metadata"))
    records = list(job.output.committed().values())
    job.output.close(job.fingerprint, records, funnel, sources=filter_metadata.sources(job, files))
    dag.refresh("filter_metadata")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_the_driver_tells_a_full_disk_too_and_nothing_else_as_one(tmp_path: Path, number: int) -> None:
    job = Dag(config_of(tmp_path)).job("filter_metadata")
    with pytest.raises(cluster.StageFailed, match=r"filter_metadata failed: disk full: OSError: .*/filter_metadata is"):
        with cluster.on_the_driver(job):
            raise OSError(number, "no room")
    with pytest.raises(FileNotFoundError), cluster.on_the_driver(job):
        raise FileNotFoundError(errno.ENOENT, "nothing there")

"""A disk that fills up within a shard or a training: told as such, by its path; what was committed stays."""

from __future__ import annotations

import errno
import json
import resource
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ldm.training.checkpoint import problems
from pipelines import cluster, run
from pipelines.dag import Dag, connected
from pipelines.journal import journal_path
from pipelines.lock import lock
from pipelines.settings import Resources
from pipelines.tracking import Tracker
from pipelines.verify import verify
from tests.pipelines.full_disk import FROM_SHARD
from tests.pipelines.small_cache import make_cache
from tests.pipelines.test_extend import address, config_of, contents, finish, write
from tests.pipelines.test_stopping import ROOT, SETTINGS, command, rank_pids, step_of, told

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


# ---- what is written when a run ends --------------------------------------------------------------------------------
@contextmanager
def no_file_grows_beyond(size: int) -> Iterator[None]:
    """As if the disk of this process were full."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_what_is_written_at_the_end_takes_no_place_of_what_ended_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dag = Dag(config_of(tmp_path, "tracking=journal"))
    dag.refresh("filter_metadata")
    folder = dag.statuses["filter_metadata"].job.output
    (folder.path / "run.json").parent.mkdir(parents=True)
    long = "x" * (1 << 20)  # more than what pytest keeps of a test's words
    (folder.path / "run.json").write_text(json.dumps({"runs": [long]}))
    with no_file_grows_beyond(1 << 19), pytest.raises(cluster.StageFailed, match="disk full: make room there"):
        with lock(tmp_path / "lock", "a test"), Tracker.open(dag.config.tracking, dag.run_folder) as tracker:
            with tracker.stage("filter_metadata"), run._noted(dag, "filter_metadata", "a command"):
                for of in ("run", "filter_metadata"):
                    with no_file_grows_beyond(1 << 21), open(journal_path(dag.run_folder, of), "a") as file:
                        file.write(long + "\n")
                raise cluster.StageFailed("disk full: make room there")
    said = capsys.readouterr().err
    assert "no note of it in run.json: OSError: [Errno 27] File too large" in said
    assert said.count("does not say how it ended: [Errno 27]") == 2
    assert not (tmp_path / "lock").exists() and json.loads((folder.path / "run.json").read_text()) == {"runs": [long]}


@pytest.mark.parametrize(("number", "code"), [(errno.ENOSPC, 1), (errno.EDQUOT, 1), (errno.EIO, None)])
def test_a_full_disk_beside_the_stages_is_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int, code: int | None
) -> None:
    def no_room(*_: object) -> int:
        raise OSError(number, "no room", "report.html")

    monkeypatch.setattr(run, "run", no_room)
    if code is None:
        with pytest.raises(OSError, match="no room"):
            run.main([])
    else:
        assert run.main([]) == code and "'report.html'. Make room there; the same command" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("whose", ["rank 1", "everybody"])
def test_training_ends_with_what_to_free_and_goes_on_from_the_last_checkpoint(tmp_path: Path, whose: str) -> None:
    """From some moment on no file of one process grows, or none of all processes, the driver among them."""
    outputs, every = tmp_path / "outputs", 20
    make_cache(outputs, *SETTINGS, shards=2)
    overrides = [f"cluster.train.run.checkpoint_every_steps={every}", "cluster.train.max_failures=3"]
    whole = command(outputs, "training.max_steps=100000", *overrides)
    process = subprocess.Popen(whole, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 400
    while step_of(outputs) < every:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    ranks, before = rank_pids(outputs), step_of(outputs)
    assert ranks.keys() == {0, 1}
    began = time.monotonic()
    for pid in [ranks[1]] if whose == "rank 1" else [*ranks.values(), process.pid]:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
    said = process.communicate(timeout=200)[0]
    last = step_of(outputs)
    print(f"full disk of {whose}: ended after {time.monotonic() - began:.1f} s, at checkpoint {last}, {said[-400:]}")
    # MLflow may have more to say of its own files; the last word is ours.
    assert process.returncode == 1 and said.strip().splitlines()[-1].startswith("train failed, "), said
    assert "restart" not in said, said
    assert f"{outputs / 'small/train'}" in said and "File too large" in said and "same command goes on" in said, said
    assert before <= last < before + 3 * every and problems(outputs / f"small/train/step-{last:08d}") == []
    assert not (outputs / "small/train/lock").exists()

    goal = max(told(outputs)) + 2
    again = command(outputs, f"training.max_steps={goal}", *overrides)
    assert subprocess.run(again, cwd=ROOT, timeout=400).returncode == 0 and step_of(outputs) == goal

"""Which errors of training end the run, which start its processes again, and what is told of it when it happens."""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.train import WorkerGroupError
from ray.train.torch import TorchTrainer
from torch.distributed import DistBackendError

from ldm.storage import StorageError
from ldm.training.bad_batches import TooManyBadBatches
from ldm.training.checkpoint import NotWhole
from ldm.training.out_of_memory import TooLittleMemory
from ldm.training.saving import DiskFull
from pipelines import cluster
from pipelines.config import compose
from pipelines.dag import Dag, How, Job
from pipelines.journal import journal_path, read_entries
from pipelines.launching import launch
from pipelines.manifest import StageFolder

AGAIN = [
    TooManyBadBatches("this is batch 3 that is no good"),
    NotWhole("no checkpoint is whole"),
    DiskFull("could not be written"),
    OSError(errno.ENOSPC, "No space left on device"),
    ValueError("training.batch_size is 7"),
    KeyError("unet"),
    FileNotFoundError("plan.json"),
    TooLittleMemory("CUDA out of memory"),
    AssertionError("ZeRO stage 2 does not support this"),
    NotImplementedError("not with this optimizer"),
]
PASSING = [
    RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer"),
    DistBackendError("NCCL error"),
    ConnectionResetError("reset"),
    OSError(errno.EIO, "Input/output error"),
    StorageError("s3://bucket/x: timed out"),
    ray.exceptions.ActorDiedError(),
]


def job_of(outputs: Path, max_failures: int, *overrides: str) -> Job:
    settings = [f"paths.outputs={outputs}", f"cluster.train.max_failures={max_failures}", *overrides]
    dag = Dag(compose(settings))
    how = How(dag.config.cluster, dag.config.tracking, None, str(dag.run_folder))
    return Job("train", {}, "", StageFolder(dag.home("train"), "train"), {}, how)


def told(job: Job) -> list[dict[str, str]]:
    """The tags that MLflow gets of restarts, in order."""
    path = journal_path(job.how.run, "train", "launch")
    return [entry["values"] for entry in read_entries(path)[0] if entry["kind"] == "tags"]


def fails(
    monkeypatch: pytest.MonkeyPatch, *groups: dict[int, Exception], on_fit: Callable[[], object] = int
) -> list[int]:
    """Lets the groups of training end so, one after the other, the last again and again. Returns a list of them."""
    begun: list[int] = []

    def fit(*_: Any) -> None:
        begun.append(1)
        on_fit()
        raise WorkerGroupError("", groups[min(len(begun), len(groups)) - 1])

    monkeypatch.setattr(TorchTrainer, "__init__", lambda *_, **__: None)
    monkeypatch.setattr(TorchTrainer, "fit", fit)
    return begun


@pytest.mark.parametrize("error", AGAIN + PASSING, ids=lambda error: type(error).__name__)
def test_what_would_come_again_ends_the_run_and_what_passes_is_tried_again(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rank 0 noticed no more than that rank 1 was gone."""
    begun = fails(monkeypatch, {0: RuntimeError("Connection closed by peer"), 1: error})
    job, again = job_of(tmp_path, 2), error in AGAIN
    tells_more = again or not isinstance(error, RuntimeError)
    words = f"1: .*{type(error).__name__}" if tells_more else "0: RuntimeError: Connection closed by peer"
    with pytest.raises(cluster.StageFailed, match=f"first in rank {words}"):
        launch(print, {}, job, tmp_path / "stop")
    said = capsys.readouterr().out
    assert len(begun) == (1 if again else 3) and ("restart 2: failure 2 of 2" in said) != again
    assert [list(tags) for tags in told(job)] == ([] if again else [["restart/1"], ["restart/2"]])
    assert not [word for tags in told(job) for word in tags.values() if len(word.splitlines()) > 1]


def test_a_full_disk_of_one_rank_is_told_with_the_place_to_make_room_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fails(monkeypatch, {0: RuntimeError("Connection closed"), 1: OSError(errno.ENOSPC, "No space left on device")})
    job = job_of(tmp_path, 2)
    with pytest.raises(cluster.StageFailed) as error:
        launch(print, {}, job, tmp_path / "stop")
    said = str(error.value)
    assert "first in rank 1: disk full: OSError: [Errno 28]" in said
    assert f"{job.output.path} is where train writes. Free space there" in said


@pytest.mark.parametrize("stopped", [True, False])
def test_a_group_that_was_asked_to_stop_is_not_started_again(
    stopped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The twin, which nobody asked, is started as often as it may be."""
    stop = tmp_path / "stop"
    begun = fails(monkeypatch, {0: RuntimeError("lost")}, on_fit=stop.touch if stopped else int)
    words = "was asked to stop and failed before all was saved" if stopped else "train failed"
    with pytest.raises(cluster.StageFailed, match=f"{words}, first in rank 0: RuntimeError: lost"):
        launch(print, {}, job_of(tmp_path, 2), stop)
    assert len(begun) == (1 if stopped else 3)
    if stopped:
        assert launch(print, {}, job_of(tmp_path, 2), stop) is None and len(begun) == 1  # nor is it started at all


def test_processes_that_were_asked_to_leave_are_no_failures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    job, left = job_of(tmp_path, 1), {1: cluster.Left("SIGTERM asked this process to leave")}
    begun = fails(monkeypatch, left, left, left, {0: RuntimeError("lost")})
    with pytest.raises(cluster.StageFailed, match="RuntimeError: lost"):
        launch(print, {}, job, tmp_path / "stop")
    assert len(begun) == 5
    names = [name for tags in told(job) for name in tags]
    assert names == [f"restart/{count}" for count in (1, 2, 3, 4)]
    assert "restart 3: first in rank 1: Left: SIGTERM asked" in capsys.readouterr().out

    stop = tmp_path / "stop"
    begun = fails(monkeypatch, left, on_fit=stop.touch)  # all of them, and the driver too
    launch(print, {}, job, stop)
    assert len(begun) == 1 and len(told(job)) == 4


def test_stacks_are_told_when_they_come_and_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = job_of(tmp_path, 2, "cluster.train.run.hang_seconds=7")
    folder = job.output / "stacks"
    folder.mkdir(parents=True)
    (folder / "rank-00000-1.txt").write_text("of an earlier run")
    (folder / "rank-00001-1.txt").touch()  # it is running
    rank = iter(range(9))
    died = {1: ray.exceptions.ActorDiedError()}
    fails(monkeypatch, died, on_fit=lambda: (folder / f"rank-0000{next(rank)}-2.txt").write_text("stack") and None)
    with pytest.raises(cluster.StageFailed, match="had stood still for 7.0 s; .*/rank-00002-2.txt$"):
        launch(print, {}, job, tmp_path / "stop")
    first, second = ("".join(tags.values()) for tags in told(job))
    assert first.endswith(f"what each process was doing: {folder / 'rank-00000-2.txt'}")
    assert second.endswith(f"what each process was doing: {folder / 'rank-00001-2.txt'}")


# -- on a real Ray ----------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def ray_here() -> Iterator[None]:
    with cluster.connect(compose([]).cluster):
        yield


def worker(arguments: dict[str, Any], should_leave: Callable[[], bool]) -> None:
    """Notes its try; then the second process meets its fault, while the first waits for it."""
    import torch.distributed as dist

    notes = Path(arguments["folder"]) / f"tries-{dist.get_rank()}"
    with open(notes, "a") as file:
        file.write("x")
    if dist.get_rank() == 1:
        arguments["fault"](len(notes.read_text()))
        while arguments["fault"] is asked_to_leave_once and len(notes.read_text()) == 1 and not should_leave():
            time.sleep(0.05)
    dist.barrier()


def too_many(tries: int) -> None:
    raise TooManyBadBatches(f"try {tries}")


def killed_once(tries: int) -> None:
    if tries == 1:
        os.kill(os.getpid(), signal.SIGKILL)


def asked_to_leave_once(tries: int) -> None:
    if tries == 1:
        os.kill(os.getpid(), signal.SIGTERM)


def broken(tries: int) -> None:
    raise RuntimeError(f"device lost in try {tries}")


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("fault", "tries", "failures", "message"),
    [(too_many, 1, 1, "try 1"), (killed_once, 2, 1, None), (asked_to_leave_once, 2, 0, None),
     (broken, 2, 1, "device lost in try 2"), (killed_once, 1, 0, "")],  # the last one's twin: no restart is allowed
)  # fmt: skip
def test_processes_begin_again_or_not(
    ray_here: None, tmp_path: Path, fault: Callable[[int], None], tries: int, failures: int, message: str | None
) -> None:
    job, arguments = job_of(tmp_path, failures), {"folder": str(tmp_path), "fault": fault}
    if message is None:
        launch(worker, arguments, job, tmp_path / "stop")
    else:
        with pytest.raises(cluster.StageFailed, match=f"first in rank .*{message}"):
            launch(worker, arguments, job, tmp_path / "stop")
    assert [(tmp_path / f"tries-{rank}").read_text() for rank in (0, 1)] == ["x" * tries] * 2
    assert len(told(job)) == tries - 1

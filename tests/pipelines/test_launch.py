"""Which errors of training end the run, and which start its processes again."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.train import WorkerGroupError
from torch.distributed import DistBackendError

from ldm.storage import StorageError
from ldm.training.bad_batches import TooManyBadBatches
from ldm.training.checkpoint import DiskFull, NotWhole
from pipelines import cluster
from pipelines.config import compose
from pipelines.settings import TrainResources

AGAIN = [
    TooManyBadBatches("this is batch 3 that is no good"),
    NotWhole("no checkpoint is whole"),
    DiskFull("could not be written"),
    OSError(errno.ENOSPC, "No space left on device"),
    ValueError("training.batch_size is 7"),
    KeyError("unet"),
    FileNotFoundError("plan.json"),
]
PASSING = [
    RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer"),
    DistBackendError("NCCL error"),
    ConnectionResetError("reset"),
    OSError(errno.EIO, "Input/output error"),
    StorageError("s3://bucket/x: timed out"),
    ray.exceptions.ActorDiedError(),
]


def resources(max_failures: int) -> TrainResources:
    return replace(compose([]).cluster.train, max_failures=max_failures)


@pytest.mark.parametrize("error", AGAIN + PASSING, ids=lambda error: type(error).__name__)
def test_what_would_come_again_ends_the_run_and_what_passes_is_tried_again(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rank 0 noticed no more than that rank 1 was gone."""
    begun: list[int] = []

    def train_once(*_: Any) -> None:
        begun.append(1)
        raise WorkerGroupError("", {0: RuntimeError("Connection closed by peer"), 1: error})

    monkeypatch.setattr(cluster, "_train_once", train_once)
    again = error in AGAIN
    told = f"first in rank 1: {type(error).__name__}" if again else "first in rank 0: RuntimeError: Connection closed"
    with pytest.raises(cluster.StageFailed, match=told):
        cluster.launch_training(print, {}, resources(2), tmp_path)
    said = capsys.readouterr().out
    assert len(begun) == (1 if again else 3) and ("restart 2 of 2" in said) != again


# -- on a real Ray ----------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def ray_here() -> Iterator[None]:
    with cluster.connect(compose([]).cluster):
        yield


def worker(arguments: dict[str, Any]) -> None:
    """Notes its try; then the second process meets its fault, while the first waits for it."""
    import torch.distributed as dist

    notes = Path(arguments["folder"]) / f"tries-{dist.get_rank()}"
    with open(notes, "a") as file:
        file.write("x")
    if dist.get_rank() == 1:
        arguments["fault"](len(notes.read_text()))
    dist.barrier()


def too_many(tries: int) -> None:
    raise TooManyBadBatches(f"try {tries}")


def killed_once(tries: int) -> None:
    if tries == 1:
        os.kill(os.getpid(), signal.SIGKILL)


def broken(tries: int) -> None:
    raise RuntimeError(f"device lost in try {tries}")


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("fault", "tries", "message"), [(too_many, 1, "try 1"), (killed_once, 2, None), (broken, 2, "device lost in try 2")]
)
def test_processes_begin_again_or_not(
    ray_here: None, tmp_path: Path, fault: Callable[[int], None], tries: int, message: str | None
) -> None:
    arguments = {"folder": str(tmp_path), "fault": fault}
    if message is None:
        cluster.launch_training(worker, arguments, resources(1), tmp_path / "scratch")
    else:
        with pytest.raises(cluster.StageFailed, match=f"first in rank 1: .*{message}"):
            cluster.launch_training(worker, arguments, resources(1), tmp_path / "scratch")
    assert [(tmp_path / f"tries-{rank}").read_text() for rank in (0, 1)] == ["x" * tries] * 2

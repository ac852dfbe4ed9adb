"""The same training in processes that torchrun and DeepSpeed's launcher start, without Ray."""

from __future__ import annotations

import io
import os
import socket
import subprocess
import sys
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import pytest

from pipelines import torchrun
from pipelines.journal import RUN, journal_path, read_entries
from pipelines.manifest import read_json
from pipelines.stages import train
from tests.ldm.training import processes
from tests.pipelines.small_cache import make_cache
from tests.pipelines.test_stopping import ROOT, SETTINGS, command, step_of, told

LAUNCHERS = {
    "torchrun": ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "PORT", "-m"],
    "deepspeed": ["-m", "deepspeed.launcher.runner", "--num_accelerators", "2", "--master_port", "PORT", "--module"],
}


def free_port() -> str:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return str(taken.getsockname()[1])


def train_and_listen(overrides: list[str]) -> tuple[int, str]:
    """(exit code, what was said) of one process."""
    said = io.StringIO()
    with redirect_stderr(said):
        code = torchrun.main(overrides)
    return code, said.getvalue().strip()


def test_where_the_first_process_cannot_prepare_the_others_say_so_and_end_too(tmp_path: Path) -> None:
    make_cache(tmp_path, *SETTINGS, shards=1)
    overrides = [*command(tmp_path)[4:], "training.resume=step-7"]
    first, second = processes.run(train_and_listen, overrides, world_size=2, seconds=120)
    reason = f"training.resume is 'step-7'; in {tmp_path / 'small/train'} there are: no checkpoints"
    assert first == (1, reason)
    assert second == (1, f"the first process could not prepare training: {reason}")
    assert not (tmp_path / "small/train/lock").exists()
    told = read_entries(journal_path(tmp_path / "small", "train"))[0]
    assert {entry["name"] for entry in told if entry["kind"] == "dataset"} == {
        "filter_metadata", "filter_images", "precompute_latents"}  # fmt: skip
    params = {name for entry in told if entry["kind"] == "params" for name in entry["values"]}
    assert {"training.learning_rate", "unet.model_channels"} <= params
    assert [(entry["status"], reason in entry["reason"]) for entry in told if entry["kind"] == "status"] == [
        ("RUNNING", False), ("FAILED", True)]  # fmt: skip


def breaks(overrides: list[str]) -> tuple[int, str]:
    def work(*_: Any) -> None:
        raise RuntimeError("NCCL error: unhandled")

    train.work = work
    return train_and_listen(overrides)


def test_settings_are_held_against_the_processes_that_were_started(tmp_path: Path) -> None:
    make_cache(tmp_path, *SETTINGS, shards=1)
    overrides = [*command(tmp_path)[4:], "training.batch_size=16"]
    said = processes.run(train_and_listen, overrides, world_size=3, seconds=120)
    assert [code for code, _ in said] == [2, 2, 2]
    assert all("which 3 processes cannot share equally" in words for _, words in said)
    assert not (tmp_path / "small/train/lock").exists()


def test_an_error_that_is_none_of_ours_says_where_it_came_from(tmp_path: Path) -> None:
    make_cache(tmp_path, *SETTINGS, shards=1)
    ((code, said),) = processes.run(breaks, command(tmp_path)[4:], seconds=120)
    assert code == 1 and "Traceback" in said and said.endswith("NCCL error: unhandled")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_either_launcher_trains_and_goes_on_where_the_other_left(tmp_path: Path) -> None:
    outputs = tmp_path / "outputs"
    make_cache(outputs, *SETTINGS, shards=2)
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    for launcher, goal in (("torchrun", 3), ("deepspeed", 5)):
        overrides = [part for part in command(outputs, f"training.max_steps={goal}")[3:] if part != "+stage=train"]
        launch = [free_port() if word == "PORT" else word for word in LAUNCHERS[launcher]]
        whole = [sys.executable, *launch, "pipelines.torchrun", *overrides]
        done = subprocess.run(whole, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, (launcher, done.stdout + done.stderr)
        assert step_of(outputs) == goal and told(outputs) == list(range(1, goal + 1))
        assert read_json(outputs / "small/train/record.json")["facts"] == {"training.max_steps": goal}
        for of in ("train", RUN):
            statuses = [entry["status"] for entry in read_entries(journal_path(outputs / "small", of))[0]
                        if entry["kind"] == "status"]  # fmt: skip
            assert statuses[-2:] == ["RUNNING", "FINISHED"]

"""T9: a process that hangs is found wherever it hangs, and all of them leave their stacks before anything ends them."""

from __future__ import annotations

import ctypes
import importlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from ldm.config import TrainingRunConfig, TrainSettings
from ldm.training.loader import TrainData
from ldm.training.watchdog import GRACE_SECONDS, MARGIN_SECONDS, START_SECONDS, Watchdog, collective_seconds
from tests.ldm.training import processes
from tests.ldm.training.tiny import RUN, TRAINING, settings, write_data

LIMIT = 10  # seconds; with GRACE_SECONDS all have ended within the 20 that the row of the test asks for


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TrainData:
    return write_data(tmp_path_factory.mktemp("latents"), [9, 14])


def hangs(where: str, what: TrainSettings, data: TrainData, output: Path, run: TrainingRunConfig) -> None:
    """A run whose process 1 hangs, and says when."""

    def module(name: str) -> Any:
        return importlib.import_module(f"ldm.training.{name}")

    def stands_still(*_: Any, **__: Any) -> Any:
        (output.parent / "began").write_text(repr(time.time()))
        if where == "library":  # which gives nobody else Python's lock meanwhile
            ctypes.PyDLL(None).sleep(600)
        time.sleep(600)

    def at(call: int) -> Callable[[], bool]:
        asked = [0]

        def asks() -> bool:
            asked[0] += 1
            return bool(asked[0] == call and stands_still())

        return asks

    should_stop = lambda: False  # noqa: E731
    if where == "start":
        module("watchdog").START_SECONDS = LIMIT
    if os.environ["RANK"] == "1":
        if where in ("step", "library"):
            should_stop = at(5)
        elif where == "loader":
            module("loader").Loader.batches = lambda *_: iter(stands_still, None)
        elif where == "save":
            module("saving").Saving.commit = stands_still
        elif where == "start":
            module("train").Engine = stands_still
    module("train").train(
        what, data, output, run, decode=lambda z0: z0, log=lambda *a: None, log_grid=lambda *a: None,
        should_stop=should_stop,
    )  # fmt: skip


# What the first process is seen to wait in: a collective, of its own or of DeepSpeed's.
WAITS = {"step": "in agree", "library": "in agree", "loader": "in backward", "save": "in commit", "start": "engine.py"}


@pytest.mark.slow
@pytest.mark.parametrize("where", WAITS)
def test_a_process_that_hangs_is_found_and_all_leave_their_stacks(
    data: TrainData, tmp_path: Path, where: str
) -> None:
    run = replace(RUN, zero_stage=2, hang_seconds=LIMIT, checkpoint_every_steps=3)
    died = processes.run(hangs, where, settings(), data, tmp_path / "train", run, world_size=2)
    seconds = time.time() - float((tmp_path / "began").read_text())
    print(f"T9: hung in its {where}: all had ended after {seconds:.1f} s, of 20 that they may take")
    # The first may hear of the other's end a moment before its own; its stacks are written by then.
    assert died[1] == -signal.SIGALRM and (died[0] == died[1] or isinstance(died[0], RuntimeError))
    assert LIMIT < seconds < 20
    first, second = (path.read_text() for path in sorted((tmp_path / "train" / "stacks").iterdir()))
    assert "stands_still" in second and "stands_still" not in first
    assert WAITS[where] in first and "in train" in first


@pytest.mark.slow
def test_without_the_guard_nobody_ends(data: TrainData, tmp_path: Path) -> None:
    """The twin."""
    died = processes.run(hangs, "step", settings(), data, tmp_path / "train", RUN, world_size=2, seconds=20)
    seconds = time.time() - float((tmp_path / "began").read_text())
    print(f"T9, its twin: hung, and alive until it was killed after {seconds:.0f} s")
    # Ended from outside, by this test; the first is then told by its connection.
    assert died[0] == -signal.SIGKILL and seconds > 20
    assert not (tmp_path / "train" / "stacks").exists()


def test_who_is_in_time_leaves_no_stacks(tmp_path: Path) -> None:
    with Watchdog(tmp_path / "stacks", 0, 60.0) as watchdog:
        watchdog.reset()
    assert list((tmp_path / "stacks").iterdir()) == [] and signal.getitimer(signal.ITIMER_REAL)[0] == 0


def test_a_start_may_take_longer_than_a_step(tmp_path: Path) -> None:
    with Watchdog(tmp_path, 0, 60.0) as watchdog:
        for long, seconds in ((True, START_SECONDS), (False, 60.0)):
            watchdog.reset(long=long)
            assert seconds < signal.getitimer(signal.ITIMER_REAL)[0] <= seconds + GRACE_SECONDS
    with Watchdog(tmp_path, 0, 2 * START_SECONDS) as watchdog:
        watchdog.reset(long=True)
        assert signal.getitimer(signal.ITIMER_REAL)[0] > 2 * START_SECONDS


ON_A_DISK_THAT_HANGS = """
import os, sys, time
from pathlib import Path
from ldm.training import watchdog

watchdog.GRACE_SECONDS = 1.0
folder = Path(sys.argv[1])
path = folder / f"rank-00000-{os.getpid()}.txt"
os.mkfifo(path)  # that nobody reads: who writes there stands still once it is full
pipe = os.open(path, os.O_RDWR | os.O_NONBLOCK)
try:
    while os.write(pipe, bytes(4096)):
        pass
except BlockingIOError:
    pass

def stands_still():
    time.sleep(60)

with watchdog.Watchdog(folder, 0, 1.0) as guard:
    guard.reset()
    stands_still()
"""


def test_stacks_are_seen_though_their_folder_lies_on_what_everybody_hangs_on(tmp_path: Path) -> None:
    command = [sys.executable, "-c", ON_A_DISK_THAT_HANGS, str(tmp_path)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        lines = []
        for line in process.stderr:
            lines.append(line)
            if "in <module>" in line:  # the last of them; who writes to the folder keeps the pipe open
                break
        code = process.wait(60)
        (fifo,) = tmp_path.iterdir()
        os.close(os.open(fifo, os.O_RDWR))
    assert code == -signal.SIGALRM
    assert "Timeout" in lines[0] and any("in stands_still" in line for line in lines)


# ---- nobody waits for less ---------------------------------------------------------------------------------
def timeouts(hang_seconds: float | None) -> list[timedelta]:
    """How long a collective of each group may take that training has here."""
    import torch
    import torch.distributed as dist

    from ldm.training.engine import Engine, join

    world = join(collective_seconds(hang_seconds))
    Engine(torch.nn.Linear(4, 4), replace(TRAINING, batch_size=4), replace(RUN, zero_stage=3), world)
    groups = dist.distributed_c10d._world.pg_map
    return [group._get_backend(world.device).options._timeout for group in groups]


def test_no_collective_gives_up_before_stacks_are_written() -> None:
    """NCCL's own ten minutes, or gloo's thirty, would end who waits: with one stack less, or without any."""
    for hang_seconds, expected in ((7200.0, 7200.0 + MARGIN_SECONDS), (60.0, START_SECONDS + MARGIN_SECONDS)):
        (found,) = processes.run(timeouts, hang_seconds)
        assert len(found) == 2 and set(found) == {timedelta(seconds=expected)}  # ours, and DeepSpeed's own
    (found,) = processes.run(timeouts, None)  # the twin
    assert all(timeout <= timedelta(minutes=30) for timeout in found)

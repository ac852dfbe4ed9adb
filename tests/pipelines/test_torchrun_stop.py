"""SIGTERM to a launcher: its processes save and leave, and the same command loses no step."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.pipelines.small_cache import make_cache
from tests.pipelines.test_stopping import GRACE_SECONDS, ROOT, SETTINGS, command, step_of, told, wait_for
from tests.pipelines.test_torchrun import LAUNCHERS, free_port


def start(outputs: Path, goal: int) -> subprocess.Popen[str]:
    overrides = [part for part in command(outputs, f"training.max_steps={goal}")[3:] if part != "+stage=train"]
    launch = [free_port() if word == "PORT" else word for word in LAUNCHERS["torchrun"]]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    log = open(outputs / "log.txt", "a")
    whole = [sys.executable, *launch, "pipelines.torchrun", *overrides]
    return subprocess.Popen(whole, cwd=ROOT, env=environment, stdout=log, stderr=log, text=True)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_sigterm_to_torchrun_saves_and_leaves_and_no_step_is_lost(tmp_path: Path) -> None:
    outputs = tmp_path / "outputs"
    make_cache(outputs, *SETTINGS, shards=2)
    process = start(outputs, 100000)
    wait_for(lambda: len(told(outputs)) >= 3, process, outputs)
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    process.wait(120)
    seconds = time.monotonic() - began
    print(f"left after {seconds:.1f} s")
    assert seconds < GRACE_SECONDS
    steps = told(outputs)
    assert steps == list(range(1, steps[-1] + 1)) and step_of(outputs) == steps[-1]
    assert not (outputs / "small/train/lock").exists()

    goal = steps[-1] + 3
    assert start(outputs, goal).wait(400) == 0, (outputs / "log.txt").read_text()
    assert told(outputs) == list(range(1, goal + 1)) and step_of(outputs) == goal

"""Signals to processes of a launcher, to one of them, and to all at once: all save and leave, and no step is lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.pipelines.small_cache import make_cache
from tests.pipelines.test_stopping import GRACE_SECONDS, ROOT, SETTINGS, command, step_of, told, wait_for
from tests.pipelines.test_torchrun import LAUNCHERS, free_port

NOTHING_ASKED = "from pipelines import torchrun; torchrun._ask_on_signals = lambda job: []; exit(torchrun.main())"


def start(outputs: Path, goal: int, *how: str) -> subprocess.Popen[str]:
    """Training in a process group of its own, by torchrun or `how` it is said."""
    overrides = [part for part in command(outputs, f"training.max_steps={goal}")[3:] if part != "+stage=train"]
    launch = [free_port() if word == "PORT" else word for word in LAUNCHERS["torchrun"]]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    log = open(outputs / "log.txt", "a")
    whole = [sys.executable, *(how or (*launch, "pipelines.torchrun")), *overrides]
    return subprocess.Popen(
        whole, cwd=ROOT, env=environment, stdout=log, stderr=log, text=True, start_new_session=True
    )


def rank_of(process: psutil.Process) -> str | None:
    return process.environ().get("RANK")


def check_left(outputs: Path, began: float, of: str) -> int:
    """Nothing is lost and nothing is left lying; returns the last step."""
    seconds, steps = time.monotonic() - began, told(outputs)
    print(f"T7 {of}: left after {seconds:.1f} s, {steps[-1] - step_of(outputs)} of {steps[-1]} steps lost")
    assert seconds < GRACE_SECONDS
    assert steps == list(range(1, steps[-1] + 1)) and step_of(outputs) == steps[-1]
    assert not (outputs / "small/train/lock").exists()
    return steps[-1]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("to", ["launcher", "group", "rank"])
def test_a_signal_below_torchrun_saves_and_leaves_and_no_step_is_lost(tmp_path: Path, to: str) -> None:
    outputs = tmp_path / "outputs"
    make_cache(outputs, *SETTINGS, shards=2)
    process = start(outputs, 100000)
    wait_for(lambda: len(told(outputs)) >= 3, process, outputs)
    began = time.monotonic()
    if to == "launcher":
        process.send_signal(signal.SIGTERM)
    elif to == "group":  # Ctrl-C
        os.killpg(process.pid, signal.SIGINT)
    else:
        next(child for child in psutil.Process(process.pid).children() if rank_of(child) == "1").terminate()
    process.wait(120)
    last, log = check_left(outputs, began, f"torchrun, {to}"), (outputs / "log.txt").read_text()
    name = "SIGINT" if to == "group" else "SIGTERM"
    assert f"stopped by {name}; the same command goes on from here" in log, log
    assert to != "rank" or "exitcode  : 143" in log, log  # the launcher's account of it

    goal = last + 3
    assert start(outputs, goal).wait(400) == 0, (outputs / "log.txt").read_text()
    assert told(outputs) == list(range(1, goal + 1)) and step_of(outputs) == goal


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_process_alone_says_by_its_exit_code_which_signal_it_got(tmp_path: Path, number: signal.Signals) -> None:
    outputs = tmp_path / "outputs"
    make_cache(outputs, *SETTINGS, shards=2)
    process = start(outputs, 100000, "-m", "pipelines.torchrun")
    wait_for(lambda: len(told(outputs)) >= 3, process, outputs)
    began = time.monotonic()
    process.send_signal(number)
    assert process.wait(120) == 128 + number, (outputs / "log.txt").read_text()
    last = check_left(outputs, began, f"alone, {number.name}")

    # Asked while it still prepares or loads, it makes no step.
    process = start(outputs, 100000, "-m", "pipelines.torchrun")
    wait_for((outputs / "small/train/lock").exists, process, outputs)
    process.send_signal(number)
    assert process.wait(120) == 128 + number, (outputs / "log.txt").read_text()
    assert told(outputs)[-1] == step_of(outputs) == last

    # The twin, whose signals ask for nothing, loses steps.
    process = start(outputs, 100000, "-c", NOTHING_ASKED)
    wait_for(lambda: len(told(outputs)) >= last + 3, process, outputs)
    process.send_signal(number)
    assert process.wait(120) == 128 + number
    print(f"twin: {told(outputs)[-1] - step_of(outputs)} steps lost")
    assert step_of(outputs) == last < told(outputs)[-1]

"""`ray job stop` on a real training, submitted to a real cluster: it is saved, nothing is lost, and it goes on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ldm.training.checkpoint import newest, problems
from pipelines import stopping
from pipelines.stages.train import STOP
from tests.pipelines.ray_head import ray_head
from tests.pipelines.small_cache import make_cache
from tests.pipelines.test_stopping import ROOT, SETTINGS, command, step_of, told

ASKED = "SIGTERM: training saves and leaves"
LEFT = "stopped by SIGTERM; the same command goes on from here"
WARNED = "`ray job stop` would kill this job after 0 s, before training has saved"


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_stopped_job_has_saved_every_step_and_goes_on(tmp_path: Path) -> None:
    outputs = tmp_path / "outputs"
    make_cache(outputs, *SETTINGS, shards=2)

    def job(steps: int) -> list[str]:
        return command(outputs, f"training.max_steps={steps}", "cluster.address=auto")

    with ray_head(stop_seconds=300) as head:
        head.submit("first", ROOT, job(100_000))
        head.wait("first", lambda: len(told(outputs)) >= 3)
        said, log = head.stop("first"), head.logs("first")
        assert "was stopped" in said and head.status("first") == "STOPPED"
        assert ASKED in log and LEFT in log and "Traceback" not in log and "would kill" not in log, log
        last = newest(outputs / "small/train")
        assert last is not None and not problems(last.path), log
        asked = (outputs / "small/train" / STOP).stat().st_mtime  # when the signal came; the command takes its time
        saved, left = (last.path / "COMMITTED").stat().st_mtime - asked, head.ended("first") - asked
        print(f"saved {saved:.1f} s after the signal, left after {left:.1f} s")
        assert saved < left < stopping.SAVING_SECONDS
        steps = told(outputs)
        assert steps == list(range(1, steps[-1] + 1)) and last.step == steps[-1]
        assert not (outputs / "small/train/lock").exists()

        goal = steps[-1] + 3
        head.submit("second", ROOT, job(goal))
        head.wait("second", lambda: head.status("second") == "SUCCEEDED")
        assert told(outputs) == list(range(1, goal + 1)) and step_of(outputs) == goal

        # The twin: with no time to save in, the job is killed, and has said beforehand that it would be.
        hurried = {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "0"}}
        head.submit("third", ROOT, job(100_000), "--runtime-env-json", json.dumps(hurried))
        head.wait("third", lambda: len(told(outputs)) >= goal + 3)
        head.stop("third")
        log = head.logs("third")
        assert WARNED in log and LEFT not in log and (outputs / "small/train/lock").exists()

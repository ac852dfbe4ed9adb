"""Real signals to a real run: training saves, leaves and loses no step; a killed worker is replaced."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from ldm.training.checkpoint import newest
from pipelines import stopping
from pipelines.config import CONF, compose
from pipelines.journal import journal_path, read_entries, read_metrics
from pipelines.manifest import read_json
from pipelines.tracking import Tracker
from tests.pipelines.mlflow_server import MlflowServer
from tests.pipelines.small_cache import make_cache

ROOT = CONF.parent
GRACE_SECONDS = 30.0
SETTINGS = ["text_encoder.canvas=[4,4,4]", "training.batch_size=4", "training.lr_schedule=constant",
            "training.lr_end=1", "training.warmup_steps=2", "training.log_every_steps=1",
            "training.grid.every_steps=null", "unet.channel_mult=[1,1]", "unet.attention_resolutions=[2]",
            "unet.transformer_depth=[1,1]", "cluster.train.run.micro_batch_size=2"]  # fmt: skip


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    outputs = tmp_path_factory.mktemp("cache")
    make_cache(outputs, *SETTINGS, shards=2)
    return outputs


@pytest.fixture
def outputs(cache: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(cache, tmp_path / "outputs"))


def command(outputs: Path, *overrides: str) -> list[str]:
    known = [f"paths.outputs={outputs}", "name=small", "dataset.filter_images.min_size=16",
             "dataset.precompute_latents.resolution=32", "dataset.precompute_latents.batch_size=4",
             "dataset.precompute_latents.check_samples=2", "dataset.precompute_latents.min_psnr=3.0"]  # fmt: skip
    return [sys.executable, "-m", "pipelines.run", "+stage=train", *known, *SETTINGS, *overrides]


def start(outputs: Path, *overrides: str, code: str | None = None) -> subprocess.Popen[str]:
    """The command in a process group of its own, as a terminal begins it; `code` says other Python to run it by."""
    log, whole = open(outputs / "log.txt", "a"), command(outputs, *overrides)
    if code is not None:
        whole[1:3] = ["-c", code]
    return subprocess.Popen(whole, cwd=ROOT, stdout=log, stderr=log, text=True, start_new_session=True)


def rank_pids(outputs: Path) -> dict[int, int]:
    """The living process of each rank: files in which they would leave their stacks are named by both."""
    named = [path.stem.split("-")[1:] for path in (outputs / "small/train/stacks").glob("rank-*.txt")]
    return {int(rank): int(pid) for rank, pid in named if psutil.pid_exists(int(pid))}


def told(outputs: Path) -> list[int]:
    """Every step that the training worker told of, in the order of telling."""
    path = journal_path(outputs / "small", "train", "rank0")
    entries = read_entries(path)[0] if path.exists() else []
    return [entry["step"] for entry in entries if entry["kind"] == "metrics" and "loss" in entry["values"]]


def wait_for(what: Callable[[], object], process: subprocess.Popen[str], outputs: Path, seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert process.poll() is None and time.monotonic() < deadline, (outputs / "log.txt").read_text()
        time.sleep(0.05)


def step_of(outputs: Path) -> int:
    last = newest(outputs / "small/train")
    return last.step if last else 0


NOTHING_ASKED = "from pipelines import run, stopping; stopping.asking = lambda *_: stopping.ending(); exit(run.main())"


def lost_steps(outputs: Path) -> int:
    return max(told(outputs)) - step_of(outputs)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("number", "to"), [(signal.SIGTERM, "process"), (signal.SIGINT, "process"),
                                            (signal.SIGINT, "group")])  # fmt: skip
def test_a_signal_saves_and_leaves_and_no_step_is_lost(outputs: Path, number: signal.Signals, to: str) -> None:
    """To the group, as Ctrl-C sends it, Ray's processes get it too."""
    process = start(outputs, "training.max_steps=100000")
    wait_for(lambda: len(told(outputs)) >= 3, process, outputs)
    began = time.monotonic()
    process.send_signal(number) if to == "process" else os.killpg(process.pid, number)
    code = process.wait(120)
    seconds = time.monotonic() - began
    log = (outputs / "log.txt").read_text()
    print(f"T7 {number.name} to the {to}: left after {seconds:.1f} s with {code}, {lost_steps(outputs)} steps lost")
    assert code == 128 + number and "Traceback" not in log, log
    assert f"{number.name}: training saves and leaves" in log and "the same command goes on from here" in log
    assert seconds < GRACE_SECONDS
    steps = told(outputs)
    assert steps == list(range(1, steps[-1] + 1)) and lost_steps(outputs) == 0
    assert not (outputs / "small/train/lock").exists()

    goal = steps[-1] + 3
    assert start(outputs, f"training.max_steps={goal}").wait(400) == 0, (outputs / "log.txt").read_text()
    assert told(outputs) == list(range(1, goal + 1)) and step_of(outputs) == goal


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_signal_that_asks_for_nothing_loses_steps(outputs: Path) -> None:
    """The twin."""
    process = start(outputs, "training.max_steps=100000", code=NOTHING_ASKED)
    wait_for(lambda: len(told(outputs)) >= 3, process, outputs)
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == 143
    print(f"twin of T7: {lost_steps(outputs)} steps lost")
    assert step_of(outputs) == 0


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_one_training_process_that_is_asked_to_leave_saves_with_the_others_and_training_goes_on(outputs: Path) -> None:
    """As where a node has to go: SIGTERM to one worker of Ray Train is no failure, and none may be here."""
    process = start(outputs, "training.max_steps=100000", "cluster.train.max_failures=0")
    wait_for(lambda: len(told(outputs)) >= 3 and rank_pids(outputs).keys() == {0, 1}, process, outputs)
    began, last = time.monotonic(), told(outputs)[-1]
    os.kill(rank_pids(outputs)[1], signal.SIGTERM)
    wait_for(lambda: step_of(outputs) >= last, process, outputs)
    saved, steps = time.monotonic() - began, step_of(outputs)
    wait_for(lambda: told(outputs)[-1] > steps + 2, process, outputs)
    print(f"T7 SIGTERM to one worker: saved after {saved:.1f} s, goes on after {time.monotonic() - began:.1f} s")
    assert saved < GRACE_SECONDS
    assert "restart 1: first in rank 1: Left: SIGTERM asked" in (outputs / "log.txt").read_text()
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == 143, (outputs / "log.txt").read_text()
    assert told(outputs) == list(range(1, told(outputs)[-1] + 1)) and lost_steps(outputs) == 0  # none was done twice


EVERY = 20  # steps between two checkpoints


def mlflow_runs(outputs: Path) -> dict[str, Any]:
    """Runs of training: their ids and tags."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{outputs / 'mlflow.db'}")
    found = client.search_runs([each.experiment_id for each in client.search_experiments()])
    return {run.info.run_id: run.data.tags for run in found if run.data.tags.get("stage") == "train"}


def is_between_checkpoints(outputs: Path) -> bool:
    """The last checkpoint that was due is there, and some steps were made since: a kill finds steps to do again."""
    last = max(told(outputs), default=0)
    return last > EVERY and last % EVERY in range(5, 12) and step_of(outputs) == last - last % EVERY


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_is_replaced_loses_one_interval_at_most_and_stays_in_its_mlflow_run(
    outputs: Path, rank: int
) -> None:
    from mlflow.tracking import MlflowClient

    process = start(outputs, "training.max_steps=100000", f"cluster.train.run.checkpoint_every_steps={EVERY}")
    wait_for(lambda: step_of(outputs) >= EVERY, process, outputs)
    wait_for(lambda: len(mlflow_runs(outputs)) == 1, process, outputs)
    run_id, = mlflow_runs(outputs)
    wait_for(lambda: is_between_checkpoints(outputs), process, outputs)
    began, before = time.monotonic(), len(told(outputs))
    os.kill(rank_pids(outputs)[rank], signal.SIGKILL)
    wait_for(lambda: len(told(outputs)) > before + EVERY, process, outputs)
    back_after = time.monotonic() - began
    wait_for(lambda: "restart/1" in mlflow_runs(outputs)[run_id], process, outputs)  # while training goes on
    log = (outputs / "log.txt").read_text()
    assert "training starts again, restart 1: failure 1 of 1 that are tried again, first in rank" in log
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == 143, (outputs / "log.txt").read_text()

    steps = told(outputs)
    back = next(i for i, (a, b) in enumerate(zip(steps, steps[1:], strict=False), 1) if b <= a)
    lost = steps[back - 1] - steps[back] + 1
    print(f"T10 rank {rank} killed: {lost} steps done again, {EVERY} may be; {EVERY} on after {back_after:.1f} s; "
          f"MLflow runs {run_id} before and {', '.join(mlflow_runs(outputs))} after")  # fmt: skip
    assert steps[:back] == list(range(1, steps[back - 1] + 1))  # before the kill
    assert steps[back:] == list(range(steps[back], steps[-1] + 1)) and steps[back] % EVERY == 1  # from a checkpoint on
    assert 0 < lost <= EVERY
    assert [step for step, _, _ in read_metrics(outputs / "small", "train")["loss"]] == list(range(1, steps[-1] + 1))

    assert list(mlflow_runs(outputs)) == [run_id]
    client = MlflowClient(f"sqlite:///{outputs / 'mlflow.db'}")
    history = [point.step for point in client.get_metric_history(run_id, "loss")]
    assert sorted(history) == list(range(1, max(history) + 1)) and max(history) > steps[back - 1]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_process_that_may_not_be_replaced_ends_the_run(outputs: Path) -> None:
    """The twin."""
    overrides = [f"cluster.train.run.checkpoint_every_steps={EVERY}", "cluster.train.max_failures=0"]
    process = start(outputs, "training.max_steps=100000", *overrides)
    wait_for(lambda: len(told(outputs)) >= 3 and rank_pids(outputs).keys() == {0, 1}, process, outputs)
    os.kill(rank_pids(outputs)[0], signal.SIGKILL)
    assert process.wait(200) == 1
    print(f"twin of T10: ended with {process.returncode}, {lost_steps(outputs)} steps lost")
    assert "train failed, first in rank" in (outputs / "log.txt").read_text() and lost_steps(outputs) > 0


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_it_goes_back_before_a_spike_and_leaves_its_samples_out(outputs: Path) -> None:
    usual = ["training.max_steps=6", "cluster.train.run.checkpoint_every_steps=2",
             "cluster.train.run.keep_checkpoints=9"]  # fmt: skip
    back = [*usual, "training.resume=step-2", "training.skip_samples=[12,16]"]
    with MlflowServer(outputs) as server:
        server.start()
        server.wait()
        for overrides in (usual, back):
            done = start(outputs, *overrides, "tracking=server", f"tracking.uri={server.uri}").wait(400)
            assert done == 0, (outputs / "log.txt").read_text()
        check_the_way_back(outputs)
        check_both_ways_in_mlflow(outputs, server.uri)
    again = subprocess.run(command(outputs, *back), cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert again.returncode == 0 and "Everything is up to date" in again.stdout  # the request was followed


def check_the_way_back(outputs: Path) -> None:
    """On disk: what was told, the checkpoints with what they say of the samples left out, and what lies aside."""
    assert told(outputs) == [1, 2, 3, 4, 5, 6, 3, 4, 5, 6]
    assert [step for step, _, _ in read_metrics(outputs / "small", "train")["loss"]] == [1, 2, 3, 4, 5, 6]
    last = newest(outputs / "small/train")
    assert last is not None and last.step == 6 and last.manifest["samples_seen"] == 6 * 4 + 4
    assert last.manifest["history"] == [{"step": 3, "skipped_samples": [12, 16]}]
    aside = sorted(path.name for path in (outputs / "small/train/aside/001").iterdir())
    assert aside == ["record.json", "step-00000004", "step-00000006"]


def check_both_ways_in_mlflow(outputs: Path, uri: str) -> None:
    """Two runs of the stage, each with the losses and checkpoints of one way from its beginning to its end."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(uri)
    runs = read_json(outputs / "small/tracking.json")["runs"]
    new = client.get_run(runs["train"])
    old = client.get_run(new.data.tags["went_back_from"])
    assert (old.info.run_name, old.info.status) == ("train", "KILLED")
    assert (new.info.run_name, new.info.status) == ("train from step 2", "FINISHED")
    assert old.data.tags["reason"] == "training went back to step 2"
    ways = []
    for run in (old, new):
        assert run.data.tags["mlflow.parentRunId"] == runs["run"]
        points = client.get_metric_history(run.info.run_id, "loss")
        assert [point.step for point in points] == [1, 2, 3, 4, 5, 6]
        ways.append([point.value for point in points])
        models = client.search_logged_models([run.info.experiment_id], f"source_run_id = '{run.info.run_id}'")
        assert sorted(model.name for model in models) == [f"small-step-{step:08d}" for step in (2, 4, 6)]
        read = {each.dataset.name: each.dataset for each in run.inputs.dataset_inputs}
        assert read.keys() == {"filter_metadata", "filter_images", "precompute_latents"}
        assert "precompute_latents/manifest.parquet" in read["precompute_latents"].source
    assert ways[0][:3] == ways[1][:3] and ways[0][3] != ways[1][3]  # the fourth step trains on other samples


def test_a_job_that_ray_would_kill_before_it_has_saved_is_told_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RAY_JOB_STOP_WAIT_TIME_S", raising=False)
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    stopping.warn_of_short_grace()
    assert capsys.readouterr().out == ""  # no job
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    stopping.warn_of_short_grace()
    said = capsys.readouterr().out
    assert "would kill this job after 3 s" in said and "with RAY_JOB_STOP_WAIT_TIME_S=300" in said
    monkeypatch.setenv("RAY_JOB_STOP_WAIT_TIME_S", "300")
    stopping.warn_of_short_grace()
    assert capsys.readouterr().out == ""


def test_the_first_signal_asks_and_the_second_ends() -> None:
    asked: list[int] = []
    with pytest.raises(stopping.Stopped) as first:
        with stopping.asking(lambda: asked.append(1), "it saves"):
            os.kill(os.getpid(), signal.SIGTERM)
            after = True
    assert asked == [1] and after and first.value.exit_code == 143
    with pytest.raises(stopping.Stopped) as second:
        with stopping.asking(lambda: asked.append(2), "it saves"):
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)
            raise AssertionError("the second signal did not end it")
    assert asked == [1, 2] and second.value.exit_code == 130


def test_a_signal_ends_other_stages_at_once_and_handlers_are_given_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(stopping.Stopped, match="stopped by SIGTERM"):
        with stopping.ending():
            os.kill(os.getpid(), signal.SIGTERM)
            raise AssertionError("it went on")
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_run_that_a_signal_ended_says_so_in_its_journal(tmp_path: Path) -> None:
    settings = compose(["tracking=journal"]).tracking
    with pytest.raises(stopping.Stopped):
        with Tracker.open(settings, tmp_path / "o") as tracker, tracker.stage("train"), stopping.ending():
            os.kill(os.getpid(), signal.SIGTERM)
    lines = [json.loads(line) for line in (tmp_path / "o/journal/train/driver.jsonl").read_text().splitlines()]
    assert [line["status"] for line in lines if line["kind"] == "status"] == ["RUNNING", "KILLED"]

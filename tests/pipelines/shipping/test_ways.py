"""Training goes back: MLflow shows the way that was left and the new one as two runs, each a curve of rising steps."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ldm.config import TrainingConfig
from pipelines import rewind, run
from pipelines.config import compose
from pipelines.dag import Dag
from pipelines.journal import Journal, journal_path, read_metrics
from pipelines.rewind import go_back
from pipelines.run import begin
from pipelines.shipping import notes, server, stage_run
from pipelines.shipping.shipper import unsent_bytes
from pipelines.tracking import Tracker, sync
from tests.pipelines.mlflow_server import all_runs_of, client, points, runs_of, settings
from tests.pipelines.small_cache import config_of
from tests.pipelines.test_rewind import asked, put


def two_ways_back(run: Journal) -> None:
    """Four steps with a checkpoint at each second, back to the second, the third again, back to the first."""
    ways: list[tuple[int | None, list[int], float]] = [(None, [1, 2, 3, 4], 0.0), (2, [3], 0.3), (1, [2, 3], 0.6)]
    for back, steps, add in ways:
        if back is not None:
            run.rewind(back)
        for step in steps:
            run.metrics({"loss": step + add}, step)
            if step % 2 == 0:
                run.model(f"demo-step-{step}", run.path.parents[2] / f"train/step-{step}", f"{step + add:064}", step)
    run.model_removed("demo-step-2", 2)


ABANDONED = [[(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0)], [(1, 1.0), (2, 2.0), (3, 3.3)]]
STANDS = [(1, 1.0), (2, 2.6), (3, 3.6)]


def check_ways(uri: str, output: Path) -> None:
    """The newest run has what stands, and names the one that it was left for, and so on; each has rising steps."""
    runs, mlflow = runs_of(uri, output), client(uri)
    run = runs["train"]
    for expected, step in ((STANDS, "1"), (ABANDONED[1], "2"), (ABANDONED[0], None)):
        assert points(uri, run, "loss") == expected
        assert run.data.tags["mlflow.parentRunId"] == runs["run"].info.run_id
        assert run.data.tags.get("went_back_to_step") == step
        assert run.info.run_name == ("train" if step is None else f"train from step {step}")
        if step is not None:
            left = mlflow.get_run(run.data.tags["went_back_from"])
            assert left.info.status == "KILLED" and left.data.tags["reason"] == f"training went back to step {step}"
            run = left
    assert len(all_runs_of(uri, output)) == 4, "one for the DAG and one for each way, none twice"


def test_after_going_back_the_old_way_and_the_new_one_are_two_curves(tmp_path: Path, database: str) -> None:
    output = tmp_path / "demo"
    with Tracker.open(settings(database), output) as tracker, tracker.stage("train", {"lr": 1}) as run:
        two_ways_back(run)
    check_ways(database, output)
    assert [(step, value) for step, value, _ in read_metrics(output, "train")["loss"]] == STANDS
    newest = runs_of(database, output)["train"]
    assert newest.info.status == "FINISHED" and newest.data.params == {"lr": "1"}
    kept = client(database).search_logged_models(
        [newest.info.experiment_id], f"source_run_id = '{newest.info.run_id}'"
    )
    assert [(model.name, model.tags["sha256"], model.tags["removed"]) for model in kept] == [
        ("demo-step-2", f"{2.6:064}", "true")
    ]
    # Deleted by hand, it is made again from what stands; the others stay as they are.
    client(database).delete_run(newest.info.run_id)
    sync(settings(database), output)
    check_ways(database, output)
    assert sync(settings(database), output) == 0


KILLED = """
import os, signal, sys
from pathlib import Path
from pipelines import tracking
from pipelines.settings import TrackingConfig
from pipelines.shipping import notes, server

server.prepare_environment()
import mlflow.tracking  # once: the children below begin with it

def sync_and_die(output, after):
    write, calls = server.write_json, 0
    def note_or_die(path, value):
        nonlocal calls
        calls += 1
        if calls == after:
            os.kill(os.getpid(), signal.SIGKILL)
        write(path, value)
    notes.write_json = server.write_json = note_or_die
    tracking.sync(TrackingConfig(True, sys.argv[1], "test", 1.0, 1.0), Path(output))

for after, output in enumerate(sys.argv[2:], 1):
    child = os.fork()
    if child == 0:
        sync_and_die(output, after)
        os._exit(0)
    print(os.waitpid(child, 0)[1])
"""


@pytest.mark.parametrize("number", [1, 2, 4, 6, 7, 9])
def test_ended_before_a_note_it_makes_no_run_and_no_point_twice(
    tmp_path: Path, database: str, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """The first are of the runs being made, the later ones of what is sent, left, and made for the next way."""
    with Tracker.open(settings(enabled=False), tmp_path / "demo") as tracker, tracker.stage("train") as run:
        two_ways_back(run)
    left, write = [number], server.write_json

    def note_or_end(path: Path, value: object) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        write(path, value)

    for module in (notes, server):
        monkeypatch.setattr(module, "write_json", note_or_end)
    with pytest.raises(KeyboardInterrupt):
        sync(settings(database), tmp_path / "demo")
    sync(settings(database), tmp_path / "demo")
    check_ways(database, tmp_path / "demo")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_before_any_note_it_makes_no_run_and_no_point_twice(tmp_path: Path, database: str) -> None:
    """Killed before the first note, before the second, and so on: what was sent and not noted is sent again."""
    outputs = [tmp_path / f"killed-before-note-{number}" for number in range(1, 13)]
    for output in outputs:
        with Tracker.open(settings(enabled=False), output) as tracker, tracker.stage("train") as run:
            two_ways_back(run)
    done = subprocess.run([sys.executable, "-c", KILLED, database, *map(str, outputs)], capture_output=True, check=True)
    ended = [int(status) for status in done.stdout.split()]
    kills = ended.count(signal.SIGKILL)
    print(f"{kills} of {len(outputs)} were killed")
    assert ended == [signal.SIGKILL] * kills + [0] * (len(outputs) - kills) and 9 <= kills < len(outputs)
    for output in outputs:
        sync(settings(database), output)
        check_ways(database, output)


def test_points_would_be_doubled_if_they_carried_the_time_of_sending(
    tmp_path: Path, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The twin of the test above: without the journal's time the same lines make other rows."""
    output, times = tmp_path / "demo", iter(range(1000, 2000))
    Journal(journal_path(output, "train")).metrics({"loss": 1.0}, 1)
    send = stage_run.StageRun.send
    monkeypatch.setattr(
        stage_run.StageRun, "send",
        lambda run, entries, steps: send(run, [{**entry, "time": next(times)} for entry in entries], steps),
    )  # fmt: skip
    for _ in range(2):
        sync(settings(database), output)
        for path in output.glob("journal/*/*.sent.json"):
            path.unlink()
    assert len(points(database, runs_of(database, output)["train"], "loss")) == 2


# ---- ways that nobody asked for by training.resume -----------------------------------------------
def tell(output: Path, steps: range, add: float) -> None:
    journal = Journal(journal_path(output, "train", "rank0"))
    for step in steps:
        journal.metrics({"loss": step + add}, step)
    journal.close()


def curve(steps: range, add: float) -> list[tuple[int, float]]:
    return [(step, step + add) for step in steps]


def shown(database: str, output: Path) -> list[list[tuple[int, float]]]:
    """The curves of all runs of training in MLflow, the oldest first; the newest must be that of the report."""
    sync(settings(database), output)
    runs = [run for run in all_runs_of(database, output) if run.data.tags["ldm.run"].split("/")[1] == "train"]
    runs.sort(key=lambda run: run.data.tags["ldm.run"])
    newest = runs_of(database, output)["train"]
    assert runs[-1].info.run_id == newest.info.run_id and unsent_bytes(output) == 0
    report = [(step, value) for step, value, _ in read_metrics(output, "train")["loss"]]
    assert points(database, newest, "loss") == report, "MLflow and the report show the same"
    return [points(database, run, "loss") for run in runs]


def train_under(outputs: Path, *overrides: str) -> Dag:
    """What every run does before training, and the settings that the driver tells."""
    dag = Dag(config_of(outputs, *overrides))
    dag.refresh("train")
    begin(dag, "train")
    with Tracker.open(settings(enabled=False), outputs / "small") as tracker:
        with tracker.stage("train", {"lr": dag.config.training.learning_rate}):
            pass
    return dag


def test_overwriting_begins_another_curve(tmp_path: Path, database: str) -> None:
    """What our messages recommend: it clears the folder, and the journal goes on."""
    output = tmp_path / "small"
    first = train_under(tmp_path)
    tell(output, range(1, 7), 100.0)
    sync(settings(database), output)
    first.statuses["train"].job.output.clear()
    train_under(tmp_path, "training.learning_rate=0.5")
    tell(output, range(1, 4), 0.0)
    assert shown(database, output) == [curve(range(1, 7), 100.0), curve(range(1, 4), 0.0)]
    newest = runs_of(database, output)["train"]
    assert newest.info.run_name == "train from nothing" and newest.data.params == {"lr": "0.5"}
    left = client(database).get_run(newest.data.tags["went_back_from"])
    assert left.data.params == {"lr": "0.001"} and left.data.tags["reason"] == "the stage began again from nothing"
    train_under(tmp_path, "training.learning_rate=0.5")  # goes on
    tell(output, range(4, 6), 0.0)
    assert shown(database, output)[1:] == [curve(range(1, 6), 0.0)]


def test_overwriting_what_was_never_sent_makes_the_same_two_curves(tmp_path: Path, database: str) -> None:
    output = tmp_path / "small"
    first = train_under(tmp_path)
    tell(output, range(1, 7), 100.0)
    first.statuses["train"].job.output.clear()
    train_under(tmp_path, "training.learning_rate=0.5")
    tell(output, range(1, 4), 0.0)
    assert shown(database, output) == [curve(range(1, 7), 100.0), curve(range(1, 4), 0.0)]


def test_a_stage_of_shards_that_is_overwritten_begins_another_run(tmp_path: Path, database: str) -> None:
    dag = Dag(config_of(tmp_path))
    for samples in (10.0, 20.0):
        dag.refresh("filter_metadata")
        begin(dag, "filter_metadata")
        journal = Journal(journal_path(tmp_path / "small", "filter_metadata"))
        journal.metrics({"data/samples": samples}, 0)
        dag.statuses["filter_metadata"].job.output.clear()
    sync(settings(database), tmp_path / "small")
    newest = runs_of(database, tmp_path / "small")["filter_metadata"]
    assert points(database, newest, "data/samples") == [(0, 20.0)]


BEFORE = compose([]).training


def resumed(output: Path, training: TrainingConfig) -> None:
    """What is decided on the driver before training goes on from the newest checkpoint, the fourth step."""
    go_back(output / "train", training, Journal(journal_path(output, "train", "rank0")))


def crashed(output: Path) -> None:
    put(output / "train", 2, 4)
    tell(output, range(1, 7), 0.0)


def test_a_crash_and_the_same_settings_are_the_same_run_without_a_step_doubled(tmp_path: Path, database: str) -> None:
    crashed(tmp_path / "demo")
    assert shown(database, tmp_path / "demo") == [curve(range(1, 7), 0.0)]
    resumed(tmp_path / "demo", asked(None))
    resumed(tmp_path / "demo", asked(None, max_steps=BEFORE.max_steps + 100))  # more steps are the same way
    tell(tmp_path / "demo", range(5, 9), 0.0)
    assert shown(database, tmp_path / "demo") == [curve(range(1, 9), 0.0)]


@pytest.mark.parametrize(
    ("other", "why"),
    [
        ({"learning_rate": 0.5, "accept": ["training.learning_rate"]}, "training.learning_rate=0.5"),
        ({"skip_samples": [64, 96]}, "training.skip_samples=[64, 96]"),
    ],
)
def test_a_crash_and_other_settings_make_another_curve_once(
    tmp_path: Path, database: str, other: dict, why: str
) -> None:
    output = tmp_path / "demo"
    crashed(output)
    resumed(output, asked(None, **other))
    tell(output, range(5, 6), 0.5)
    assert shown(database, output) == [curve(range(1, 7), 0.0), curve(range(1, 5), 0.0) + curve(range(5, 6), 0.5)]
    assert runs_of(database, output)["train"].data.tags["went_back_with"] == why
    # It crashes again before the next checkpoint: the same settings go on on the same way.
    resumed(output, asked(None, **other))
    tell(output, range(5, 8), 0.5)
    new = curve(range(1, 5), 0.0) + curve(range(5, 8), 0.5)
    assert shown(database, output) == [curve(range(1, 7), 0.0), new]
    # And after that checkpoint, which has them.
    put(output / "train", 6, made_with=asked(None, **other))
    resumed(output, asked(None, **other))
    assert shown(database, output) == [curve(range(1, 7), 0.0), new]


def test_a_crash_and_the_old_settings_again_leave_the_other_ones(tmp_path: Path, database: str) -> None:
    output = tmp_path / "demo"
    crashed(output)
    resumed(output, asked(None, skip_samples=[64, 96]))
    tell(output, range(5, 7), 0.5)
    resumed(output, asked(None))
    tell(output, range(5, 7), 0.0)
    assert shown(database, output)[-1] == curve(range(1, 7), 0.0) and len(shown(database, output)) == 3


def test_samples_that_were_left_out_before_the_checkpoint_change_nothing(tmp_path: Path) -> None:
    crashed(tmp_path)
    resumed(tmp_path, asked(None, skip_samples=[0, 16]))
    assert [step for step, _, _ in read_metrics(tmp_path, "train")["loss"]] == [1, 2, 3, 4, 5, 6]


def test_the_newest_checkpoint_that_is_whole_decides(tmp_path: Path, database: str) -> None:
    crashed(tmp_path / "demo")
    (next((tmp_path / "demo/train").glob("*4")) / "ema.safetensors").write_bytes(b"damaged")
    resumed(tmp_path / "demo", asked(None, learning_rate=0.5, accept=["training.learning_rate"]))
    tell(tmp_path / "demo", range(3, 5), 0.5)
    assert shown(database, tmp_path / "demo")[1] == curve(range(1, 3), 0.0) + curve(range(3, 5), 0.5)


def test_without_a_word_of_it_mlflow_and_the_report_show_two_curves(
    tmp_path: Path, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The twin of the tests above."""
    monkeypatch.setattr(run, "begin_from_nothing", lambda *_: None)
    monkeypatch.setattr(rewind, "_follow_settings", lambda *_: None)
    with pytest.raises(AssertionError, match="MLflow and the report show the same"):
        test_overwriting_begins_another_curve(tmp_path / "overwritten", database)
    with pytest.raises(AssertionError, match="MLflow and the report show the same"):
        other = {"learning_rate": 0.5, "accept": ["training.learning_rate"]}
        test_a_crash_and_other_settings_make_another_curve_once(tmp_path / "accepted", database, other, "")

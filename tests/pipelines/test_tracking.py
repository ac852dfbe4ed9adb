"""Tracking with the real MLflow on sqlite: complete, nothing twice, never in the way."""

from __future__ import annotations

import http.server
import math
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pipelines import tracking
from pipelines.journal import Journal, flatten, journal_path, read_entries, read_images, read_metrics
from pipelines.settings import TrackingConfig
from pipelines.shipping.labels import safe_name, shorten, to_csv
from pipelines.shipping.shipper import AwayError, Shipper, sent_path, unsent_bytes
from pipelines.tracking import Tracker, database_uri, sync
from tests.pipelines.mlflow_server import MlflowServer, run_together


def settings(uri: str | None = None, enabled: bool = True, flush: float = 60.0) -> TrackingConfig:
    return TrackingConfig(enabled, uri, "test", interval_seconds=0.05, flush_seconds=flush)


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One sqlite database with its tables, because making them takes seconds."""
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    uri = f"sqlite:///{path}"
    client(uri).create_experiment("test", artifact_location=(path.parent / "artifacts").as_uri())
    return uri


def client(uri: str) -> Any:
    tracking.prepare_environment()
    from mlflow.tracking import MlflowClient

    return MlflowClient(uri)


def runs_of(uri: str, output: Path) -> dict[str, Any]:
    notes = tracking.read_json(output / "tracking.json")
    return {stage: client(uri).get_run(run_id) for stage, run_id in notes["runs"].items()}


def points(uri: str, run: Any, key: str) -> list[tuple[int, float]]:
    return [(m.step, m.value) for m in client(uri).get_metric_history(run.info.run_id, key)]


# ---- the journal ---------------------------------------------------------------------------------
def test_append_takes_less_than_a_millisecond(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal/train/rank0.jsonl")
    values = {f"metric/{i}": float(i) for i in range(30)}
    busy, waited = [], []
    for step in range(2000):
        start, begin = time.thread_time(), time.perf_counter()
        journal.metrics(values, step)
        busy.append(time.thread_time() - start)
        waited.append(time.perf_counter() - begin)
    assert sorted(busy)[1980] < 1e-3, "99 of 100 appends, in processor time: the machine may be busy with others"
    assert sorted(waited)[1000] < 1e-3, "half of them, on the clock"
    assert len(read_metrics(tmp_path, "train")["metric/7"]) == 2000


def test_a_torn_line_costs_only_itself(tmp_path: Path) -> None:
    path = journal_path(tmp_path, "train", "rank0")
    Journal(path).metrics({"loss": 1.0}, 1)
    with path.open("ab") as file:
        file.write(b'{"kind":"metrics","step":2,"val')  # killed here
    entries, offset = read_entries(path)
    assert len(entries) == 1 and offset < path.stat().st_size, "a line without an end waits"
    Journal(path).metrics({"loss": 3.0}, 3)
    assert [(s, v) for s, v, _ in read_metrics(tmp_path, "train")["loss"]] == [(1, 1.0), (3, 3.0)]


def test_the_last_word_on_a_step_counts(tmp_path: Path) -> None:
    path = journal_path(tmp_path, "train", "rank0")
    for step, value in [(1, 1.0), (2, 2.0), (3, 3.0), (2, 20.0)]:  # restarted from step 1
        Journal(path).metrics({"loss": value}, step)
    assert [(s, v) for s, v, _ in read_metrics(tmp_path, "train")["loss"]] == [(1, 1.0), (2, 20.0), (3, 3.0)]


def test_pictures_are_named_from_the_runs_folder(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    Journal(journal_path(old, "train")).image("grid", old / "train/grid.png", 5)
    old.rename(new)
    assert read_images(new, "train") == {"grid": [(5, new / "train/grid.png")]}


def test_flatten() -> None:
    nested = {"unet": {"channel_mult": [1, 2], "lr": 1e-4}, "levels": [{"a": 1}, {"a": 2}], "none": None}
    assert flatten(nested) == {
        "unet.channel_mult": "[1, 2]", "unet.lr": "0.0001",
        "levels.0.a": "1", "levels.1.a": "2", "none": "None",
    }  # fmt: skip


# ---- names and values ----------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "safe"),
    [("loss", "loss"), ("../../etc/x", "etc/x"), ("a//./c", "a/c"), ("loss (%)", "loss ___"), ("ö:1", "_:1")],
)
def test_safe_name(name: str, safe: str) -> None:
    assert safe_name(name) == safe


def test_long_values_are_cut_with_their_length_and_hash() -> None:
    assert shorten("x" * 6000, 6000) == "x" * 6000
    cut = shorten("x" * 6001, 6000)
    assert len(cut) == 6000 and "6001 characters, sha256 " in cut


def test_table_has_every_column() -> None:
    assert to_csv([{"stage": "download", "in": 4}, {"stage": "train", "out": 3}]) == (
        "stage,in,out\r\ndownload,4,\r\ntrain,,3\r\n"
    )


# ---- MLflow --------------------------------------------------------------------------------------
def test_opening_leaves_no_trace(tmp_path: Path) -> None:
    code = textwrap.dedent(f"""
        import sys
        from pathlib import Path
        from pipelines.settings import TrackingConfig
        from pipelines.tracking import Tracker
        with Tracker.open(TrackingConfig(True, None, "test", 1.0, 1.0), Path({str(tmp_path / "demo")!r})):
            pass
        print([name for name in ("mlflow", "torch", "ray", "pyarrow") if name in sys.modules])
    """)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert list(tmp_path.iterdir()) == []


def test_everything_arrives(tmp_path: Path, database: str) -> None:
    output = tmp_path / "demo"
    picture = output / "train/grid.png"
    picture.parent.mkdir(parents=True)
    Image.new("RGB", (64, 32), "orange").save(picture)
    card = tmp_path / "card.txt"
    card.write_text("a card")
    with Tracker.open(settings(database), output) as tracker:
        tracker.run.table("funnel", [{"stage": "train", "in": 3, "out": 2}])
        with tracker.stage("train", {"unet": {"width": 64}, "long": "x" * 9000}, {"code": "abc"}) as run:
            worker = Journal(journal_path(output, "train", "rank0"))
            for step in range(1, 2001):
                worker.metrics({"train/loss": 1 / step, "perf/images": step}, step)
            worker.metrics({"bad": math.nan, "huge": math.inf}, 1)
            worker.image("../grid", picture, 100)
            run.dataset("openmoji", "d" * 64, output / "precompute_latents/manifest.parquet")
            run.artifact(card)
            run.text("notes/readme.md", "hello")
    assert unsent_bytes(output) == 0
    runs = runs_of(database, output)
    parent, train = runs["run"], runs["train"]
    assert (parent.info.run_name, train.info.run_name) == ("demo", "train")
    assert train.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert (parent.info.status, train.info.status) == ("FINISHED", "FINISHED")
    assert train.data.params["unet.width"] == "64" and "9000 characters" in train.data.params["long"]
    assert train.data.tags["code"] == "abc"
    assert parent.data.tags["mlflow.note.content"].splitlines()[2] == "| train | 3 | 2 |"
    assert points(database, train, "train/loss") == [(step, 1 / step) for step in range(1, 2001)]
    assert math.isnan(train.data.metrics["bad"]) and train.data.metrics["huge"] > 1e308
    data = train.inputs.dataset_inputs[0].dataset
    assert (data.name, data.digest) == ("openmoji", "d" * 36) and "d" * 64 in data.profile
    mlflow = client(database)
    assert {a.path for a in mlflow.list_artifacts(train.info.run_id)} == {"card.txt", "images", "notes"}
    assert [a.path for a in mlflow.list_artifacts(parent.info.run_id)] == ["funnel.csv"]
    images = [a.path for a in mlflow.list_artifacts(train.info.run_id, "images")]
    assert len(images) == 2 and all(path.startswith("images/grid+step+100+") for path in images)


def test_a_continued_run_goes_on_in_the_same_runs(tmp_path: Path, database: str) -> None:
    output = tmp_path / "demo"
    open_tracker = Tracker.open(settings(database), output)
    with pytest.raises(ValueError, match="the disk is full"), open_tracker as tracker:
        with tracker.stage("train", {"lr": 1, "steps": 10}) as run:
            run.metrics({"loss": 1.0}, 1)
            run.metrics({"loss": 2.0}, 2)
            raise ValueError("the disk is full")
    before = runs_of(database, output)
    assert before["train"].info.status == before["run"].info.status == "FAILED"
    assert before["train"].data.tags["reason"] == "ValueError: the disk is full"
    with Tracker.open(settings(database), output) as tracker:
        with tracker.stage("train", {"lr": 1, "steps": 20}) as run:
            run.metrics({"loss": 2.0}, 2)  # told before
            run.metrics({"loss": 3.0}, 3)
    after = runs_of(database, output)
    assert [run.info.run_id for run in after.values()] == [run.info.run_id for run in before.values()]
    assert points(database, after["train"], "loss") == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert after["train"].data.params["steps"] == "10" and after["train"].data.tags["changed/steps"] == "20"
    assert after["train"].info.status == after["run"].info.status == "FINISHED"


def go_back(run: Journal) -> None:
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
    token = tracking.read_json(output / "tracking.json")["token"]
    found = mlflow.search_runs([run.info.experiment_id], f"tags.`{tracking.TOKEN}` LIKE '{token}%'")
    assert len(found) == 4, "one for the DAG and one for each way, none twice"


def test_after_going_back_the_old_way_and_the_new_one_are_two_curves(tmp_path: Path, database: str) -> None:
    output = tmp_path / "demo"
    with Tracker.open(settings(database), output) as tracker, tracker.stage("train", {"lr": 1}) as run:
        go_back(run)
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


def test_checkpoints_are_logged_models_once_and_those_removed_are_marked(tmp_path: Path, database: str) -> None:
    output = tmp_path / "demo"
    with Tracker.open(settings(database), output) as tracker, tracker.stage("train") as run:
        run.metrics({"loss": 1.0}, 20)
        for step in (10, 20):
            run.model(f"demo-step-{step}", output / f"train/step-{step}", f"{step:064}", step)
        run.model_removed("demo-step-10", 10)
    for sent in output.glob("journal/*/*.sent.json"):
        sent.unlink()
    sync(settings(database), output)  # everything is told twice
    train = runs_of(database, output)["train"]
    found = client(database).search_logged_models([train.info.experiment_id], f"source_run_id = '{train.info.run_id}'")
    kept = {model.name: model for model in found}
    assert sorted(kept) == ["demo-step-10", "demo-step-20"] and len(found) == 2
    last = kept["demo-step-20"]
    assert last.params == {"step": "20", "path": str(output / "train/step-20"), "sha256": f"{20:064}"}
    assert last.status == "READY" and "removed" not in last.tags and kept["demo-step-10"].tags["removed"] == "true"
    assert sorted(out.step for out in train.outputs.model_outputs) == [10, 20]


def test_what_mlflow_refuses_does_not_block_the_rest(
    tmp_path: Path, database: str, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "demo"
    with Tracker.open(settings(database), output) as tracker, tracker.stage("train") as run:
        run.metrics({"": 1.0, "good": 2.0}, 1)  # a metric without a name
        run.image("grid", output / "gone.png", 1)
        run.metrics({"later": 3.0}, 1)
    train = runs_of(database, output)["train"]
    assert train.data.metrics == {"good": 2.0, "later": 3.0}
    said = capsys.readouterr().err
    assert "MLflow does not take" in said and "gone.png" in said


def test_journals_are_sent_anew_to_a_database_that_forgot_them(tmp_path: Path, database: str) -> None:
    output = tmp_path / "demo"
    with Tracker.open(settings(database), output) as tracker, tracker.stage("train") as run:
        run.metrics({"loss": 1.0}, 1)
    before = runs_of(database, output)
    for run in before.values():
        client(database).delete_run(run.info.run_id)
    journals = [path.stat().st_size for path in output.glob("journal/*/*.jsonl")]
    assert sync(settings(database), output) == sum(journals)
    after = runs_of(database, output)
    assert after["train"].info.run_id != before["train"].info.run_id
    assert points(database, after["train"], "loss") == [(1, 1.0)]


KILLED = """
import os, signal, sys
from pathlib import Path
from pipelines import tracking
from pipelines.shipping.labels import safe_name, shorten, to_csv
from pipelines.settings import TrackingConfig

tracking.prepare_environment()
import mlflow.tracking  # once: the children below begin with it

def sync_and_die(output, after):
    note, calls = tracking.write_json, 0
    def note_or_die(path, value):
        nonlocal calls
        calls += 1
        if calls == after:
            os.kill(os.getpid(), signal.SIGKILL)
        note(path, value)
    tracking.write_json = note_or_die
    tracking.sync(TrackingConfig(True, sys.argv[1], "test", 1.0, 1.0), Path(output))

for argument in sys.argv[2:]:
    output, after = argument.split("@")
    child = os.fork()
    if child == 0:
        sync_and_die(output, int(after))
        os._exit(0)
    print(os.waitpid(child, 0)[1])
"""


def test_killed_between_sending_and_noting(tmp_path: Path, database: str) -> None:
    """Killed when a run is made and not noted (before the second note), and when points are sent and not noted.

    And where training went back: when a run is left, and when the next one is made.
    """
    outputs = {tmp_path / "run-not-noted": 2, tmp_path / "points-not-noted": 4}
    back = {tmp_path / "left-not-noted": 5, tmp_path / "next-not-noted": 6}
    for output in [*outputs, *back]:
        with Tracker.open(settings(enabled=False), output) as tracker, tracker.stage("train") as run:
            if output in back:
                go_back(run)
            else:
                for step in range(50):
                    run.metrics({"loss": 1 / (step + 1)}, step)
    arguments = [f"{output}@{after}" for output, after in {**outputs, **back}.items()]
    done = subprocess.run([sys.executable, "-c", KILLED, database, *arguments], capture_output=True, check=True)
    assert done.stdout.split() == [b"%d" % signal.SIGKILL] * 4
    for output in back:
        sync(settings(database), output)
        check_ways(database, output)
    for output in outputs:
        assert not sent_path(journal_path(output, "train")).exists()
        sync(settings(database), output)
        runs = runs_of(database, output)
        assert points(database, runs["train"], "loss") == [(step, 1 / (step + 1)) for step in range(50)]
        token = tracking.read_json(output / "tracking.json")["token"]
        wanted = f"tags.`{tracking.TOKEN}` LIKE '{token}%'"
        found = client(database).search_runs([runs["run"].info.experiment_id], wanted)
        assert len(found) == 2, "one for the DAG and one for the stage, none twice"


def test_points_would_be_doubled_if_they_carried_the_time_of_sending(
    tmp_path: Path, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The twin of the test above: without the journal's time the same lines make other rows."""
    output = tmp_path / "demo"
    with Tracker.open(settings(enabled=False), output) as tracker, tracker.stage("train") as run:
        run.metrics({"loss": 1.0}, 1)
    read = read_entries
    monkeypatch.setattr(
        tracking, "read_entries",
        lambda *a: ([{**e, "time": time.time_ns() // 1_000_000} for e in read(*a)[0]], read(*a)[1]),
    )  # fmt: skip
    for _ in range(2):
        sync(settings(database), output)
        for path in output.glob("journal/*/*.sent.json"):
            path.unlink()
    assert len(points(database, runs_of(database, output)["train"], "loss")) == 2


# ---- a server that is away -----------------------------------------------------------------------
def test_the_shipper_tries_again_until_the_receiver_is_back(tmp_path: Path) -> None:
    left, calls = [3], []

    def connect() -> Any:
        calls.append("connect")
        if len(calls) < 3:
            raise AwayError("refused")
        return ship

    def ship() -> bool:
        left[0] -= 1
        return left[0] >= 0

    shipper = Shipper(connect, tmp_path, interval_seconds=0.01)
    shipper.start()
    assert shipper.close(10.0) == 0
    assert calls == ["connect"] * 3 and left == [-1] and shipper.trouble == ""


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_shipper_that_died_does_not_say_that_all_is_sent(tmp_path: Path) -> None:
    Journal(journal_path(tmp_path, "train")).metrics({"loss": 1.0}, 1)

    def connect() -> Any:
        raise TypeError("a mistake of ours")

    shipper = Shipper(connect, tmp_path, interval_seconds=0.01)
    shipper.start()
    assert shipper.close(10.0) > 0 and "died" in shipper.trouble


@contextmanager
def unhelpful_server(kind: str) -> Iterator[str]:
    """Refuses connections, accepts them and never answers, or answers 500: the address."""
    released = threading.Event()

    class Server(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            released.wait(0 if kind == "answers 500" else 60)
            self.send_error(500)

        do_POST = do_GET

        def log_message(self, *_: object) -> None: ...

    if kind == "refuses":
        yield "http://127.0.0.1:9"
        return
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    released.set()
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("kind", ["refuses", "hangs", "answers 500"])
def test_a_server_that_does_not_serve_costs_the_run_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    """The journal stands, no step waits, and the end of the run waits flush_seconds at most."""
    output = tmp_path / "demo"
    with unhelpful_server(kind) as uri:
        start = time.monotonic()
        tracker = Tracker.open(settings(uri, flush=2.0), output)
        seconds = []
        with tracker.stage("train") as run:
            for step in range(500):
                begin = time.perf_counter()
                run.metrics({"loss": 1.0}, step)
                seconds.append(time.perf_counter() - begin)
                time.sleep(0.001)  # a step
        assert tracker.close() > 0
        assert time.monotonic() - start < 150  # a call that waits for the server blocks for four minutes
    assert sorted(seconds)[494] < 0.05, "99 of 100 steps"
    assert "python -m pipelines.sync name=demo" in capsys.readouterr().err
    assert len(read_metrics(output, "train")["loss"]) == 500


@pytest.mark.slow
def test_a_server_down_at_the_start_gets_every_point_once(tmp_path: Path) -> None:
    """M1: the server is down, answers 500, comes up, is killed, comes back; then the history is complete."""
    server, output = MlflowServer(tmp_path), tmp_path / "demo"

    class Broken(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(500)

        do_POST = do_GET

        def log_message(self, *_: object) -> None: ...

    def wait_for(condition: Any, seconds: float = 120) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end
            time.sleep(0.2)

    tracker = Tracker.open(settings(server.uri, flush=120.0), output)
    with server, tracker.stage("train") as run:
        run.metrics({"loss": 1.0}, 1)  # nobody listens
        broken = http.server.ThreadingHTTPServer(("127.0.0.1", server.port), Broken)
        threading.Thread(target=broken.serve_forever, daemon=True).start()
        run.metrics({"loss": 2.0}, 2)  # answers 500
        time.sleep(2)
        broken.shutdown()
        broken.server_close()
        server.start()
        run.metrics({"loss": 3.0}, 3)
        wait_for(lambda: unsent_bytes(output) == 0)
        server.kill()
        run.metrics({"loss": 4.0}, 4)
        picture = tmp_path / "grid.png"
        Image.new("RGB", (64, 64)).save(picture)
        run.image("grid", picture, 4)
        server.start()
        wait_for(lambda: unsent_bytes(output) == 0)
        assert tracker.close() == 0
        train = runs_of(server.uri, output)["train"]
        assert points(server.uri, train, "loss") == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0)]
        assert len(client(server.uri).list_artifacts(train.info.run_id, "images")) == 2


@pytest.mark.slow
def test_eight_runs_at_once_lose_nothing_on_one_server(tmp_path: Path) -> None:
    """M3: eight drivers, one server of two processes, one sqlite file."""
    outputs, steps = [tmp_path / f"run{i}" for i in range(8)], 500
    with MlflowServer(tmp_path, workers=2) as server:
        server.start()
        server.wait()
        assert run_together(server.uri, outputs, steps) == [0] * 8
        answers = server.answers()
        print(f"answers by status: {dict(answers)}")
        for output in outputs:
            train = runs_of(server.uri, output)["train"]
            assert points(server.uri, train, "loss") == [(step, float(step)) for step in range(steps)]
            assert train.info.status == "FINISHED"
        assert answers[200] > 8 * 10, "it was asked again and again while the others were"


@pytest.mark.slow
def test_runs_that_begin_at_once_make_one_database(tmp_path: Path) -> None:
    outputs = [tmp_path / f"run{i}" for i in range(4)]
    uri = f"sqlite:///{tmp_path}/new.db"
    assert run_together(uri, outputs, 100) == [0] * 4
    for output in outputs:
        train = runs_of(uri, output)["train"]
        assert points(uri, train, "loss") == [(step, float(step)) for step in range(100)]


def test_two_runs_share_one_database(tmp_path: Path, database: str) -> None:
    """Two drivers at once in one sqlite file: nothing is lost, whoever finds it locked tries again."""
    trackers = [Tracker.open(settings(database), tmp_path / name) for name in ("a", "b")]
    for tracker in trackers:
        with tracker.stage("train") as run:
            for step in range(1000):
                run.metrics({f"m{i}": step for i in range(3)}, step)
    assert [tracker.close() for tracker in trackers] == [0, 0]
    for name in ("a", "b"):
        train = runs_of(database, tmp_path / name)["train"]
        assert [len(points(database, train, f"m{i}")) for i in range(3)] == [1000] * 3


def test_without_a_setting_the_database_lies_beside_the_runs(tmp_path: Path) -> None:
    assert database_uri(settings(), tmp_path / "outputs/demo") == f"sqlite:///{tmp_path}/outputs/mlflow.db"
    assert database_uri(settings("http://a"), tmp_path / "outputs/demo") == "http://a"

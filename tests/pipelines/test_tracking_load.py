"""What tracking costs a step, whatever the server does, and that every point arrives once: M1 to M3 of the reliability
table, each with its twin. What is measured is printed; `python -m tests.benchmarks.tracking` prints the same."""

from __future__ import annotations

import threading
import time
import tracemalloc
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipelines.journal import Journal, journal_path, read_metrics
from pipelines.shipping import server, shipper
from pipelines.shipping.shipper import unsent_bytes
from pipelines.shipping.stage_run import StageRun
from pipelines.tracking import Tracker, sync
from tests.pipelines.mlflow_server import (
    MlflowServer,
    client,
    points,
    run_together,
    runs_of,
    settings,
    unhelpful_server,
    wait_for,
)
from tests.pipelines.tracked_steps import MIB, tracked_steps

WAIT_SECONDS = 0.05  # M1: what 99 of 100 steps may wait at most
KINDS = ["refuses", "hangs", "answers 500"]


# ---- M1: a server that is away -------------------------------------------------------------------
@pytest.fixture
def callers(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The threads that ask a server for anything."""
    import requests

    names: set[str] = set()
    send = requests.Session.send

    def noted(*arguments: Any, **more: Any) -> Any:
        names.add(threading.current_thread().name)
        return send(*arguments, **more)

    monkeypatch.setattr(requests.Session, "send", noted)
    return names


def check_callers(callers: set[str]) -> None:
    assert callers == {"tracking"}, "a step itself asks the server, and waits for it"


def p99(seconds: list[float], of: str) -> float:
    found = float(np.quantile(seconds, 0.99))
    print(f"M1 {of:<12} {len(seconds)} steps: p99 {1e3 * found:.2f} ms, longest {1e3 * max(seconds):.2f} ms")
    return found


def steps(tell: Callable[[int], object], numbers: range, pause: float) -> list[float]:
    """What telling of each step took."""
    seconds = []
    for step in numbers:
        begin = time.perf_counter()
        tell(step)
        seconds.append(time.perf_counter() - begin)
        time.sleep(pause)
    return seconds


@pytest.mark.parametrize("kind", KINDS)
def test_a_server_that_does_not_serve_costs_the_run_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], callers: set[str], kind: str
) -> None:
    """The journal stands, no step asks the server, and the end of the run waits flush_seconds at most."""
    output = tmp_path / "demo"
    with unhelpful_server(kind) as (uri, _):
        start = time.monotonic()
        tracker = Tracker.open(settings(uri, flush=2.0), output)
        with tracker.stage("train") as run:
            seconds = steps(lambda step: run.metrics({"loss": 1.0}, step), range(500), 0.001)
            wait_for(lambda: len(callers) > 0)
        assert tracker.close() > 0
        assert time.monotonic() - start < 150  # a call that waits for the server blocks for four minutes
    check_callers(callers)
    assert p99(seconds, kind) < 10 * WAIT_SECONDS, "the machine may be busy with others; the slow test is strict"
    assert "python -m pipelines.sync name=demo" in capsys.readouterr().err
    assert len(read_metrics(output, "train")["loss"]) == 500


def test_a_step_that_asks_the_server_itself_is_noticed(tmp_path: Path, callers: set[str]) -> None:
    """The twin: it is quick enough where the server refuses, so that only the caller gives it away."""
    mlflow = client("http://127.0.0.1:9")

    def tell(step: int) -> None:
        with suppress(Exception):
            mlflow.log_metric("0" * 32, "loss", 1.0, step=step, synchronous=True)

    steps(tell, range(5), 0.0)
    with pytest.raises(AssertionError, match="a step itself asks the server"):
        check_callers(callers)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_server_that_is_away_in_every_way_gets_every_point_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, callers: set[str]
) -> None:
    """M1: nobody listens, nobody answers, it answers 500, it serves, it is killed, it is back; all steps go on."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
    monkeypatch.setattr(shipper, "MAX_PAUSE_SECONDS", 0.5)
    output, real, told = tmp_path / "demo", MlflowServer(tmp_path), iter(range(0, 100_000, 300))
    picture = tmp_path / "grid.png"
    Image.effect_noise((64, 64), 50).save(picture)
    journal, waited = Journal(journal_path(output, "train", "rank0")), {}

    def train(kind: str) -> None:
        first = next(told)

        def tell(step: int) -> None:
            journal.metrics({f"m{i}": float(step) for i in range(30)}, step)
            if step % 100 == 0:
                journal.image("grid", picture, step)

        waited[kind] = p99(steps(tell, range(first, first + 300), 0.01), kind)

    tracker = Tracker.open(settings(real.uri, flush=300.0), output)
    with real, tracker.stage("train"):
        train("refuses")
        for kind in ("hangs", "answers 500"):
            with unhelpful_server(kind, real.port) as (_, asked):
                train(kind)
                wait_for(lambda asked=asked: len(asked) > 0)
        real.start()
        train("starts")
        real.wait()
        wait_for(lambda: unsent_bytes(output) == 0, 300)
        real.kill()
        train("was killed")
        assert unsent_bytes(output) > 0
        real.start()
        train("is back")
        real.wait()
        wait_for(lambda: unsent_bytes(output) == 0, 300)
        assert tracker.close() == 0
        check_callers(set(callers))
        for _ in range(2):
            check_history(real.uri, output, 6 * 300)
            for sent in output.glob("journal/*/*.sent.json"):  # and all of it once more
                sent.unlink()
            sync(settings(real.uri), output)
    assert len(waited) == 6 and max(waited.values()) < WAIT_SECONDS


def check_history(uri: str, output: Path, count: int) -> None:
    train = runs_of(uri, output)["train"]
    for key in ("m0", "m29"):
        assert points(uri, train, key) == [(step, float(step)) for step in range(count)]
    images = client(uri).list_artifacts(train.info.run_id, "images")
    print(f"M1 {count} steps: every point once, {len(images)} files of pictures")
    assert len([image for image in images if image.path.endswith(".webp")]) == count // 100


# ---- M2: many steps ------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_2000_steps_of_30_metrics_and_50_grids_cost_less_than_2_percent_of_a_step(tmp_path: Path) -> None:
    """M2, on steps of the default job's model, the driver in a process of its own as under Ray."""
    figures = tracked_steps(tmp_path, steps=2000)
    print(f"M2 {figures}")
    assert figures.left_bytes == 0 and figures.share < 0.02
    assert figures.driver_grew_bytes < 64 * MIB
    uri, output = f"sqlite:///{tmp_path}/mlflow.db", tmp_path / "demo"
    train = runs_of(uri, output)["train"]
    for key in ("m0", "m29"):
        assert points(uri, train, key) == [(step, float(step)) for step in range(1, 2001)]
    assert len([a for a in client(uri).list_artifacts(train.info.run_id, "images") if a.path.endswith(".webp")]) == 50


def long_journal(path: Path) -> int:
    """25 MB that wait because the server was away; returns their bytes."""
    journal = Journal(path)
    journal.metrics({f"metric/{i}": 1 / (i + 1) for i in range(30)}, 1)
    line = path.read_bytes()
    path.write_bytes(line * (25_000_000 // len(line)))
    return path.stat().st_size


def peak_of_sending(output: Path, database: str) -> int:
    """The most memory that Python holds while one part is read and sent."""
    with server.sending(database, "test", output, alive=False) as receiver:
        for sent in output.glob("journal/*/*.sent.json"):
            sent.unlink()
        tracemalloc.start()
        receiver.ship()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return peak


def test_what_waits_is_not_held_in_memory(
    tmp_path: Path, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And its twin: all of it read at once is more than the promise, so that the bound of a part is what keeps it."""
    monkeypatch.setattr(StageRun, "send", lambda *_: None)  # MLflow's own memory is that of requests, which are bounded
    waiting = long_journal(journal_path(tmp_path / "demo", "train", "rank0"))
    peak = peak_of_sending(tmp_path / "demo", database)
    assert 0 < unsent_bytes(tmp_path / "demo") < waiting
    monkeypatch.setattr(server, "READ_BYTES", 1 << 62)
    twin = peak_of_sending(tmp_path / "demo", database)
    print(f"M2 {waiting / MIB:.0f} MiB wait: {peak / MIB:.1f} MiB in memory, all at once {twin / MIB:.0f} MiB")
    assert peak < 8 * MIB and twin > 64 * MIB


# ---- M3: many runs -------------------------------------------------------------------------------
def check_answers(answers: dict[int, int]) -> None:
    print(f"M3 answers of the server by status: {dict(answers)}")
    assert not [status for status in answers if status >= 500], dict(answers)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_eight_runs_at_once_lose_nothing_on_one_server(tmp_path: Path) -> None:
    """M3: eight drivers, one server of two processes, one sqlite file."""
    outputs, count = [tmp_path / f"run{i}" for i in range(8)], 500
    with MlflowServer(tmp_path, workers=2) as real:
        real.start()
        real.wait()
        assert run_together(real.uri, outputs, count) == [0] * 8
        answers = real.answers()
        for output in outputs:
            train = runs_of(real.uri, output)["train"]
            assert points(real.uri, train, "loss") == [(step, float(step)) for step in range(count)]
            assert train.info.status == "FINISHED"
        assert answers[200] > 8 * 10, "it was asked again and again while the others were"
        check_answers(answers)


def test_a_server_that_answers_500_is_noticed(tmp_path: Path) -> None:
    """The twin: a line of the server's own log, as it writes it."""
    real = MlflowServer(tmp_path)
    line = 'INFO:     127.0.0.1:4242 - "POST /api/2.0/mlflow/runs/log-batch HTTP/1.1" {} {}\n'
    real.log.write_text(line.format(200, "OK") * 2 + line.format(500, "Internal Server Error"))
    assert real.answers() == {200: 2, 500: 1}
    with pytest.raises(AssertionError, match="500: 1"):
        check_answers(real.answers())


@pytest.mark.slow
def test_runs_that_begin_at_once_make_one_database(tmp_path: Path) -> None:
    outputs = [tmp_path / f"run{i}" for i in range(4)]
    uri = f"sqlite:///{tmp_path}/new.db"
    assert run_together(uri, outputs, 100) == [0] * 4
    for output in outputs:
        train = runs_of(uri, output)["train"]
        assert points(uri, train, "loss") == [(step, float(step)) for step in range(100)]

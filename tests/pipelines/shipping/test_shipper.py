"""The thread that sends: whatever goes wrong is said once and tried again, and nobody sends beside another."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest

from pipelines import sync as sync_command
from pipelines.journal import Journal, journal_path
from pipelines.lock import LockedError, lock
from pipelines.shipping.shipper import AwayError, Shipper, sent_path, unsent_bytes
from pipelines.tracking import Tracker, sync
from tests.pipelines.mlflow_server import points, runs_of, settings


class Receiver:
    """Fails as it is told to, then takes two parts and has all."""

    def __init__(self, *failures: Exception | None) -> None:
        self.failures, self.parts = list(failures), 2

    def ship(self) -> bool:
        if self.failures and (failure := self.failures.pop(0)) is not None:
            raise failure
        self.parts -= 1
        return self.parts >= 0


def shipped(receiver: Receiver, output: Path, refusals: int = 0, seconds: float = 20.0) -> tuple[int, Shipper]:
    """What a shipper leaves unsent that cannot connect a few times."""
    left = [refusals]

    def connect() -> AbstractContextManager[Any]:
        left[0] -= 1
        if left[0] >= 0:
            raise AwayError("connection refused")
        return nullcontext(receiver)

    shipper = Shipper(connect, output, interval_seconds=0.01)
    shipper.start()
    return shipper.close(seconds), shipper


def told(output: Path) -> None:
    Journal(journal_path(output, "train")).metrics({"loss": 1.0}, 1)


BEGINS, ENDS = "nothing goes to MLflow", "MLflow takes what it is sent again"


def test_it_tries_again_until_the_receiver_is_back_and_says_so_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told(tmp_path)
    receiver = Receiver(AwayError("500"), None, AwayError("500 again"))
    left, shipper = shipped(receiver, tmp_path, refusals=3)
    said = capsys.readouterr().err
    assert left == 0 and receiver.parts < 0 and shipper.trouble == "" and not shipper.is_alive()
    assert [BEGINS in line for line in said.splitlines()] == [True, False, True, False], "two troubles, each said once"
    assert said.count(ENDS) == 2 and "all of it: connection refused" in said and "500 again" in said


def test_a_mistake_of_ours_does_not_end_the_thread(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told(tmp_path)
    receiver = Receiver(TypeError("a mistake"), TypeError("a mistake"))
    assert shipped(receiver, tmp_path)[0] == 0 and receiver.parts < 0
    said = capsys.readouterr().err
    assert said.count(BEGINS) == 1 and "TypeError: a mistake" in said and said.count(ENDS) == 1


def test_what_never_works_is_given_up_at_the_end_and_counted(tmp_path: Path) -> None:
    told(tmp_path)
    left, shipper = shipped(Receiver(*[TypeError("a mistake")] * 100_000), tmp_path, seconds=0.3)
    assert left == journal_path(tmp_path, "train").stat().st_size and shipper.trouble == "TypeError: a mistake"
    shipper.join(10)
    assert not shipper.is_alive(), "it does not go on trying behind the back of who gave up"


def test_a_run_says_in_its_terminal_that_mlflow_is_away(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Now, not after weeks when the run is closed."""
    tracker, said = Tracker.open(settings("http://127.0.0.1:9", flush=0.1), tmp_path / "demo"), ""
    with tracker.stage("train"):
        end = time.monotonic() + 60
        while BEGINS not in said and time.monotonic() < end:
            time.sleep(0.05)
            said += capsys.readouterr().err
    assert BEGINS in said
    tracker.close()


# ---- journals that are not what the notes say ----------------------------------------------------
def cut(path: Path, lines: int) -> None:
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:lines]))


def test_a_journal_shorter_than_what_was_sent_loses_no_point_and_doubles_none(
    tmp_path: Path, database: str, capsys: pytest.CaptureFixture[str]
) -> None:
    worker = Journal(journal_path(tmp_path / "demo", "train", "rank0"))
    for step in range(1, 20):
        worker.metrics({"loss": float(step)}, step)
    sync(settings(database), tmp_path / "demo")
    cut(worker.path, 3)  # a power cut; training goes on from its checkpoint
    for step in range(18, 25):
        Journal(worker.path).metrics({"loss": float(step)}, step)
    size = worker.path.stat().st_size
    assert unsent_bytes(tmp_path / "demo") == size
    assert sync(settings(database), tmp_path / "demo") == size
    assert points(database, runs_of(database, tmp_path / "demo")["train"], "loss") == [
        (step, float(step)) for step in range(1, 25)
    ]
    assert "is shorter than what was sent of it" in capsys.readouterr().err
    cut(worker.path, 0)
    assert [sync(settings(database), tmp_path / "demo") for _ in range(2)] == [0, 0]
    assert capsys.readouterr().err.count("is shorter than what was sent of it") == 1


def test_what_is_noted_as_sent_was_made_durable_first(
    tmp_path: Path, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipelines.shipping import server

    done: list[tuple[str, str]] = []
    durable, note = server.make_durable, server.write_json
    monkeypatch.setattr(server, "make_durable", lambda path: (done.append(("durable", path.stem)), durable(path)))
    monkeypatch.setattr(server, "write_json", lambda path, sent: (done.append(("noted", path.stem)), note(path, sent)))
    told(tmp_path / "demo")
    sync(settings(database), tmp_path / "demo")
    assert done == [("durable", "driver"), ("noted", "driver.sent")]


# ---- one sender ----------------------------------------------------------------------------------
def test_two_do_not_send_the_same_journals(
    tmp_path: Path, database: str, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "demo"
    told(output)
    with lock(output / "journal/lock", "sending demo to MLflow"):
        with pytest.raises(LockedError, match="is held by another run"):
            sync(settings(database), output)
        arguments = [f"paths.outputs={tmp_path}", "name=demo", f"tracking.uri={database}"]
        assert sync_command.main(arguments) == 2 and "is held by another run" in capsys.readouterr().err
        assert not sent_path(journal_path(output, "train")).exists()
        tracker = Tracker.open(settings(database, flush=0.3), output)
        assert tracker.run is not None and tracker.close() > 0, "a driver waits its turn"
    sync(settings(database), output)
    assert unsent_bytes(output) == 0


def test_a_driver_whose_words_another_sends_does_not_wait_for_its_turn(tmp_path: Path, database: str) -> None:
    tracker = Tracker.open(settings(database), tmp_path / "demo")
    with lock(tmp_path / "demo/journal/lock", "sending demo to MLflow"):
        told = tracker.run.path
        sent_path(told).write_text(json.dumps({"offset": told.stat().st_size}))  # by the other one
        began = time.monotonic()
        assert tracker._shipper.close(60.0) == 0 and time.monotonic() - began < 50


def test_the_lock_of_a_sender_that_was_killed_is_taken(tmp_path: Path, database: str) -> None:
    output = tmp_path / "demo"
    code = textwrap.dedent(f"""
        import os, signal
        from pathlib import Path
        from pipelines.lock import lock
        with lock(Path({str(output / "journal/lock")!r}), "sending"):
            os.kill(os.getpid(), signal.SIGKILL)
    """)
    subprocess.run([sys.executable, "-c", code], check=False)
    assert (output / "journal/lock").exists()
    told(output)
    assert sync(settings(database), output) > 0 and not (output / "journal/lock").exists()

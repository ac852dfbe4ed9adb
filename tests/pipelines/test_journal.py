"""The journal: appended to in no time, whole lines only, and what of it stands after training went back."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipelines.journal import (
    FROM_NOTHING,
    Journal,
    begin_from_nothing,
    flatten,
    journal_path,
    last_step,
    read_entries,
    read_images,
    read_metrics,
    read_standing,
    rewinds_in,
)


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


# ---- ways ----------------------------------------------------------------------------------------
def losses(output: Path) -> list[tuple[int, float]]:
    return [(step, value) for step, value, _ in read_metrics(output, "train").get("loss", [])]


def tell(output: Path, steps: dict[int, float]) -> Journal:
    journal = Journal(journal_path(output, "train", "rank0"))
    for step, value in steps.items():
        journal.metrics({"loss": value}, step)
    return journal


def test_a_stage_that_begins_from_nothing_leaves_all_that_it_told(tmp_path: Path) -> None:
    begin_from_nothing(tmp_path, "train")  # it never said a word
    assert not (tmp_path / "journal").exists()
    driver = Journal(journal_path(tmp_path, "train"))
    driver.params({"lr": 1})
    tell(tmp_path, {0: 5.0, 1: 1.0, 2: 2.0})
    for _ in range(2):  # the second time there is nothing to leave
        begin_from_nothing(tmp_path, "train")
        assert losses(tmp_path) == [] and last_step(journal_path(tmp_path, "train", "rank0")) == FROM_NOTHING
    marks = [list(rewinds_in(journal_path(tmp_path, "train", who))) for who in ("driver", "rank0")]
    assert [(mark["way"], mark["step"]) for (mark,) in marks] == [(1, FROM_NOTHING)] * 2
    tell(tmp_path, {0: 6.0, 1: 1.5})
    assert losses(tmp_path) == [(0, 6.0), (1, 1.5)]


def test_ways_are_numbered_through_all_journals_of_a_stage(tmp_path: Path) -> None:
    worker = tell(tmp_path, {1: 1.0, 2: 2.0})
    Journal(journal_path(tmp_path, "train")).params({"lr": 1})
    worker.rewind(1, "training.learning_rate=2")
    begin_from_nothing(tmp_path, "train")
    assert [mark["way"] for mark in rewinds_in(journal_path(tmp_path, "train"))] == [2]
    told = [(mark["way"], mark["why"]) for mark in rewinds_in(worker.path)]
    assert told == [(1, "training.learning_rate=2"), (2, "")]


def test_what_is_read_ends_before_a_way_that_is_not_known(tmp_path: Path) -> None:
    worker = tell(tmp_path, {1: 1.0, 2: 2.0, 3: 3.0})
    worker.rewind(1)
    tell(tmp_path, {2: 2.5})
    first = read_standing(worker.path, 0, 1 << 20, [], 0)
    assert [entry["step"] for entry in first.entries] == [1, 2, 3] and first.rewind["way"] == 1 and first.way == 0
    again = read_standing(worker.path, first.offset, 1 << 20, [], 0)
    assert again.entries == [] and again.offset == first.offset and again.rewind == first.rewind
    known = read_standing(worker.path, 0, 1 << 20, [1], 0)
    assert [entry["values"]["loss"] for entry in known.entries] == [1.0, 2.5] and known.rewind is None
    assert known.way == 1 and known.offset == worker.path.stat().st_size


def test_lines_that_begin_a_way_and_have_no_number_are_counted(tmp_path: Path) -> None:
    """As they were written when only one journal of a stage had any."""
    path = tell(tmp_path, {1: 1.0, 2: 2.0}).path
    with path.open("a") as file:
        file.write('{"kind":"rewind","time":1,"step":1}\n{"kind":"rewind","time":2,"step":0}\n')
    assert [mark["way"] for mark in rewinds_in(path)] == [1, 2]
    assert read_standing(path, 0, 1 << 20, [1, 0], 0).way == 2
    assert losses(tmp_path) == [] and last_step(path) == 0


# ---- the end -------------------------------------------------------------------------------------
@contextmanager
def opened_by_number(path: Path, number: int) -> Iterator[None]:
    """A file opened under a number that another had before, as the system gives them."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT)
    if handle != number:
        os.dup2(handle, number)
        os.close(handle)
    yield
    os.close(number)


def test_a_closed_journal_takes_no_line_and_writes_to_no_other_file(tmp_path: Path) -> None:
    """The thread that copies checkpoints may outlive it, and the handle's number is soon another file's."""
    journal, other = Journal(tmp_path / "journal/train/rank0.jsonl"), tmp_path / "checkpoint"
    journal.tags({"copies/newest": "step-1"})
    journal.close()
    journal.close()
    refused: list[str] = []

    def tell_late() -> None:
        try:
            journal.tags({"copies/newest": "step-2"})
        except ValueError as error:
            refused.append(str(error))

    with opened_by_number(other, journal._handle):
        thread = threading.Thread(target=tell_late)
        thread.start()
        thread.join()
    assert refused == [f"{journal.path} is closed; it does not take a line of kind 'tags'"]
    assert other.read_bytes() == b"" and len(read_entries(journal.path)[0]) == 1


def test_a_journal_that_did_not_know_that_it_is_closed_would_write_to_another_file(tmp_path: Path) -> None:
    """The twin of the test above."""
    journal, other = Journal(tmp_path / "journal/train/rank0.jsonl"), tmp_path / "checkpoint"
    journal.close()
    journal._closed = False
    with opened_by_number(other, journal._handle):
        journal.tags({"copies/newest": "step-2"})
    assert other.stat().st_size > 0

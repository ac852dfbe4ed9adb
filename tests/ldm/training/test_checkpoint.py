"""Checkpoints are whole or not there: killed, damaged, cut short and crowded out."""

from __future__ import annotations

import errno
import json
import math
import os
import resource
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from ldm.storage import StorageError
from ldm.training import checkpoint, keeping, saving, together
from ldm.training.checkpoint import KINDS, Stretch, newest, problems, step_name, steps
from ldm.training.going_on import differences
from ldm.training.keeping import PINNED, retain, staying, sweep
from ldm.training.saving import DiskFull, Saving, save
from tests.ldm.training import processes
from tests.ldm.training.tiny import SEED

SHAPES = {"a": (3, 5), "b": (4,)}
POINTS = [
    "checkpoint_begin",
    "checkpoint_before_rank_file",
    "checkpoint_after_rank_file",
    "checkpoint_all_written",
    "checkpoint_after_ema",
    "checkpoint_before_manifest",
    "checkpoint_before_rename",
    "checkpoint_old_aside",
    "checkpoint_after_rename",
    "checkpoint_before_committed",
    "checkpoint_after_committed",
    "checkpoint_in_removal",
]


def weights(step: int) -> dict[str, dict[str, Tensor]]:
    """kind -> name -> whole tensor, different at each step."""
    generator = torch.Generator().manual_seed(1000 * SEED + step)
    return {kind: {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()} for kind in KINDS}


def stretches(step: int, rank: int = 0, world_size: int = 1) -> list[Stretch]:
    """What a process of a group would hold: an uneven share of each parameter."""
    whole, found = weights(step), []
    for name in SHAPES:
        flat = {kind: whole[kind][name].flatten() for kind in KINDS}
        n = len(flat["weight"])
        start, stop = n * rank // world_size, n * (rank + 1) // world_size
        found.append(Stretch(name, start, {kind: x[start:stop] for kind, x in flat.items()}))
    return found


def put(home: Path, *steps: int) -> None:
    """Saves checkpoints of these steps from whatever process group there is."""
    rank, world_size = together.rank(), together.world_size()
    for step in steps:
        ema = weights(step)["weight"] if rank == 0 else None
        save(home, step, stretches=stretches(step, rank, world_size), ema=ema, config={"model": "tiny"},
             facts={"samples_seen": 8 * step})  # fmt: skip
        if rank == 0:
            retain(home, 2, None)


def check_whole(found: checkpoint.Checkpoint | None, step: int) -> None:
    """The checkpoint is that of a step, with every number that was saved."""
    assert found is not None and found.step == step and found.manifest["samples_seen"] == 8 * step
    expected = weights(step)
    for kind in KINDS:
        for name in SHAPES:
            flat = expected[kind][name].flatten()
            assert torch.equal(found.read(kind, name, 0, len(flat)), flat)
            assert torch.equal(found.read(kind, name, 1, 3), flat[1:3])
            assert torch.equal(found.read_ema(name), expected["weight"][name])
    assert found.config == {"format": 1, "model": "tiny"}


def files(home: Path) -> list[str]:
    return sorted(str(path.relative_to(home)) for path in home.rglob("*") if path.is_file())


# ---- the usual course --------------------------------------------------------------------------------------
def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    put(tmp_path, 10)
    check_whole(newest(tmp_path), 10)
    assert files(tmp_path) == [
        f"step-00000010/{name}"
        for name in ("COMMITTED", "config.json", "ema.safetensors", "manifest.json", "rank-00000-of-00001.safetensors")
    ]


def test_any_number_of_processes_reads_what_another_wrote(tmp_path: Path) -> None:
    assert processes.run(put, tmp_path, 10, world_size=2) == [None, None]
    check_whole(newest(tmp_path), 10)
    assert processes.run(load, tmp_path, world_size=3) == [10, 10, 10]


def load(home: Path) -> int:
    found = newest(home, finish=True)
    assert found is not None
    check_whole(found, found.step)
    return found.step


def test_what_is_written_in_the_background_is_what_was_held_at_the_beginning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path, 10)
    go_on = threading.Event()

    def slowly(tensors: dict[str, Tensor], path: Path, *rest: Any) -> None:
        assert go_on.wait(60)
        save_file(tensors, path, *rest)

    monkeypatch.setattr(saving, "save_file", slowly)
    held = stretches(20)
    under_way = Saving(tmp_path, 20, stretches=held, ema=weights(20)["weight"], config={"model": "tiny"},
                    facts={"samples_seen": 160})  # fmt: skip
    for stretch in held:  # the next steps of training
        for x in stretch.tensors.values():
            x.zero_()
    assert not under_way.is_written()
    check_whole(newest(tmp_path), 10)
    go_on.set()
    assert under_way.commit() == tmp_path / step_name(20) and under_way.is_written()
    check_whole(newest(tmp_path), 20)


def test_its_manifest_says_what_was_so_when_it_began(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples that are left out while it is written belong to the next checkpoint: this is what is asked later."""
    for guard in (True, False):
        if not guard:  # the twin: facts as the caller goes on changing them
            monkeypatch.setattr(saving, "as_json", lambda value: value)
        history: list[dict[str, Any]] = [{"step": 3, "skipped_samples": [24, 37]}]
        facts = {"history": history, "validation_loss": float("nan") if guard else 0.5, "other": (1.5, float("inf"))}
        home = tmp_path / str(guard)
        under_way = Saving(home, 20, stretches=stretches(20), ema={}, config={}, facts=facts)
        history.append({"step": 20, "skipped_samples": [160, 320]})
        history[0]["step"] = 4
        under_way.commit()
        found = newest(home)
        assert found is not None
        entries = found.manifest["history"]
        print(f"history of the checkpoint, snapshot {guard}: {entries}")
        assert (entries == [{"step": 3, "skipped_samples": [24, 37]}]) == guard
        if guard:  # no number that JSON does not know
            assert found.manifest["validation_loss"] is None and found.manifest["other"] == [1.5, None]


def mapped(folder: Path) -> list[str]:
    """The files below a folder that this process has in its memory, removed ones too."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return [line.split(maxsplit=5)[5] for line in lines if str(folder) in line]


def test_a_checkpoint_that_was_read_takes_no_room_once_it_is_removed(tmp_path: Path) -> None:
    for closes in (True, False):
        home = tmp_path / str(closes)
        put(home, 10)
        found = newest(home)
        assert found is not None
        check_whole(found, 10)
        assert mapped(home), "reading maps its files"
        if closes:
            found.close()
        put(home, 20, 30)
        assert not (home / step_name(10)).exists()
        held = mapped(home)
        print(f"files of a removed checkpoint still held, closed {closes}: {len(held)}")
        assert (held == []) == closes  # the twin holds what nobody can see any more
        if closes:
            check_whole(newest(home), 30)


def test_nothing_there_is_no_checkpoint(tmp_path: Path) -> None:
    assert newest(tmp_path) is None and newest(tmp_path / "absent") is None


def test_signs_of_zero_and_other_bits_survive(tmp_path: Path) -> None:
    odd = torch.tensor([0.0, -0.0, 1e-45, float("inf"), -1.5])
    tensors = {kind: odd.clone() for kind in KINDS}
    save(tmp_path, 1, stretches=[Stretch("x", 0, tensors)], ema={"x": odd}, config={}, facts={})
    found = newest(tmp_path)
    assert found is not None
    assert torch.equal(found.read("weight", "x", 0, 5).view(torch.int32), odd.view(torch.int32))


def test_a_hole_is_not_filled_with_zeros(tmp_path: Path) -> None:
    save(tmp_path, 1, stretches=stretches(1, 0, 2), ema={}, config={}, facts={})  # the second half is nobody's
    found = newest(tmp_path)
    assert found is not None
    with pytest.raises(ValueError, match="holds 7 of the elements 0 to 15 of weight/a"):
        found.read("weight", "a", 0, 15)


# ---- damage ------------------------------------------------------------------------------------------------
def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) * 3 // 4] ^= 1
    path.write_bytes(data)


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "flipped byte in rank file": (lambda p: flip(p / RANK_FILE), "rank-00000-of-00001.safetensors does not have"),
    "flipped byte in ema": (lambda p: flip(p / "ema.safetensors"), "ema.safetensors does not have the sha256"),
    "flipped byte in config": (lambda p: flip(p / "config.json"), "config.json does not have the sha256"),
    "flipped byte in manifest": (lambda p: flip(p / "manifest.json"), "manifest.json does not have the sha256"),
    "cut rank file": (lambda p: os.truncate(p / RANK_FILE, 100), "has 100 bytes, not"),
    "missing rank file": (lambda p: (p / RANK_FILE).unlink(), "rank-00000-of-00001.safetensors is missing"),
    "missing manifest": (lambda p: (p / "manifest.json").unlink(), "manifest.json is missing"),
    "missing COMMITTED": (lambda p: (p / "COMMITTED").unlink(), "COMMITTED is missing"),
    "COMMITTED of another": (
        lambda p: (p / "COMMITTED").write_text("0" * 64),
        "manifest.json does not have the sha256",
    ),
    "COMMITTED of no text": (
        lambda p: (p / "COMMITTED").write_bytes(b"\xff" * 64),
        "manifest.json does not have the sha256",
    ),
}
RANK_FILE = "rank-00000-of-00001.safetensors"


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    put(tmp_path, 10, 20)
    hurt, message = DAMAGES[damage]
    hurt(tmp_path / step_name(20))
    check_whole(newest(tmp_path), 10)
    assert "step-00000020" in caplog.text and message in caplog.text
    print(f"T5: {damage}: step 20 refused by name, step 10 taken")


@pytest.mark.parametrize("damage", [d for d in DAMAGES if d != "missing COMMITTED"])
def test_a_run_never_starts_again_from_zero_unasked(tmp_path: Path, damage: str) -> None:
    put(tmp_path, 10)
    hurt, message = DAMAGES[damage]
    hurt(tmp_path / step_name(10))
    with pytest.raises(
        RuntimeError, match=f"(?s)no checkpoint in .* is whole:\n  step-00000010: .*{message}.*overwrite=true"
    ):
        newest(tmp_path)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newer_one_is_set_aside_and_never_counted(tmp_path: Path, damage: str) -> None:
    """Of the one who trains and keeps a single checkpoint, that is the one it has just written."""
    put(tmp_path, 10, 20)
    hurt, message = DAMAGES[damage]
    hurt(tmp_path / step_name(20))
    told: list[tuple[str, str]] = []
    check_whole(newest(tmp_path, finish=True, tell=lambda *words: told.append(words)), 10)
    save(tmp_path, 15, stretches=stretches(15), ema={}, config={}, facts={"validation_loss": 0.5})
    assert retain(tmp_path, 1, None, best=True) == [step_name(10)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["aside", step_name(15)]
    assert [path.name for path in (tmp_path / "aside/001").iterdir()] == [step_name(20)]
    ((subject, words),) = told
    assert subject == "refused/step-00000020" and message in words and str(tmp_path / "aside/001") in words


def test_an_older_one_that_is_damaged_meanwhile_stops_no_save(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    put(tmp_path, 10, 20)
    DAMAGES["flipped byte in manifest"][0](tmp_path / step_name(10))
    save(tmp_path, 30, stretches=stretches(30), ema={}, config={}, facts={"validation_loss": 0.5})
    assert retain(tmp_path, 2, None, best=True) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["aside", step_name(20), step_name(30)]
    assert "step-00000010 lies in" in caplog.text


def test_the_only_checkpoint_is_taken_when_nothing_but_its_marker_is_missing(tmp_path: Path) -> None:
    put(tmp_path, 10)
    (tmp_path / step_name(10) / "COMMITTED").unlink()
    check_whole(newest(tmp_path), 10)
    assert problems(tmp_path / step_name(10)) == ["COMMITTED is missing"]  # who only reads changes nothing
    check_whole(newest(tmp_path, finish=True), 10)
    assert problems(tmp_path / step_name(10)) == []


def test_without_hashes_a_flipped_byte_would_be_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin: safetensors alone does not notice."""
    put(tmp_path, 10, 20)
    flip(tmp_path / step_name(20) / RANK_FILE)
    known = json.loads((tmp_path / step_name(20) / "manifest.json").read_text())["files"]
    monkeypatch.setattr(checkpoint, "sha256_file", lambda path: known[path.name]["sha256"])
    found = newest(tmp_path)
    assert found is not None and found.step == 20
    with pytest.raises(AssertionError):
        check_whole(found, 20)


# ---- killed ------------------------------------------------------------------------------------------------
def test_killed_at_any_point_of_a_save_the_newest_whole_one_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """T4. With two checkpoints there and one that a crash left without its marker, so that every point is passed."""
    torn = 0
    for point in POINTS:
        home = tmp_path / point
        put(home, 10, 20, 30)
        shutil.copytree(home / step_name(30), home / step_name(40))
        (home / step_name(40) / "COMMITTED").unlink()
        died = processes.run(put, home, 40, env={"LDM_CRASH_AT": point})
        assert died == [137], f"was not killed at {point}"
        late = point in ("checkpoint_after_committed", "checkpoint_in_removal")
        check_whole(newest(home), 40 if late else 30)
        if not late:  # the twin: who does not look takes what nobody committed, where it has a checkpoint's name
            with monkeypatch.context() as patch:
                patch.setattr(checkpoint, "problems", lambda *_: [])
                torn += (home / step_name(40)).exists() and newest(home).path.name == step_name(40)  # type: ignore[union-attr]
        sweep(home)
        put(home, 40)
        check_whole(newest(home), 40)
        assert sorted(path.name for path in home.iterdir()) == [step_name(30), step_name(40)], point
    found = f"newest whole checkpoint found {len(POINTS)} times"
    print(f"T4: killed at {len(POINTS)} points of a save, {found}; without looking one never committed {torn} times")
    assert torn == 8  # but for the two at which what lay there is aside, and those that come after it


def test_killed_in_the_first_save_nothing_or_the_whole_is_found(tmp_path: Path) -> None:
    for point in ("checkpoint_after_rank_file", "checkpoint_before_rename", "checkpoint_after_rename"):
        home = tmp_path / point
        assert processes.run(put, home, 10, env={"LDM_CRASH_AT": point}) == [137]
        sweep(home)
        found = newest(home, finish=True)
        if point == "checkpoint_after_rename":
            check_whole(found, 10)
        else:
            assert found is None and list(home.iterdir()) == []


def put_or_die(home: Path, doomed: int, point: str, step: int) -> None:
    if together.rank() == doomed:
        os.environ["LDM_CRASH_AT"] = point
    put(home, step)


def test_a_process_that_dies_while_writing_leaves_no_checkpoint(tmp_path: Path) -> None:
    put(tmp_path, 10)
    results = processes.run(put_or_die, tmp_path, 1, "checkpoint_before_rank_file", 20, world_size=2)
    assert results[1] == 137 and isinstance(results[0], RuntimeError)
    check_whole(newest(tmp_path), 10)
    assert len(sweep(tmp_path)) == 1 and [path.name for path in tmp_path.iterdir()] == [step_name(10)]


# The second process has no part in what follows its own file.
DEATHS = [*((0, point) for point in POINTS if point != "checkpoint_old_aside"), *((1, point) for point in POINTS[:3])]


@pytest.fixture(scope="module")
def of_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of the steps 10 and 20, by two processes."""
    home = tmp_path_factory.mktemp("two")
    processes.run(put, home, 10, 20, world_size=2)
    return home


@pytest.mark.slow
@pytest.mark.parametrize(("doomed", "point"), DEATHS)
def test_either_of_two_processes_may_die_at_any_point_of_a_save(
    of_two: Path, tmp_path: Path, doomed: int, point: str
) -> None:
    home = Path(shutil.copytree(of_two, tmp_path / "home"))
    results = processes.run(put_or_die, home, doomed, point, 30, world_size=2)
    assert results[doomed] == 137, f"was not killed at {point}"
    late = point in ("checkpoint_after_committed", "checkpoint_in_removal")
    check_whole(newest(home), 30 if late else 20)
    sweep(home)
    processes.run(put, home, 30, world_size=2)
    check_whole(newest(home), 30)
    assert sorted(path.name for path in home.iterdir()) == [step_name(20), step_name(30)]


def test_committed_before_the_others_have_written_would_be_torn(tmp_path: Path) -> None:
    """The twin: what a first process that did not wait would leave is refused."""
    put(tmp_path, 10)
    processes.run(put, tmp_path, 20, world_size=2)
    (tmp_path / step_name(20) / "rank-00001-of-00002.safetensors").unlink()
    assert problems(tmp_path / step_name(20)) == ["rank-00001-of-00002.safetensors is missing"]
    check_whole(newest(tmp_path), 10)


# ---- a power cut -------------------------------------------------------------------------------------------
@pytest.fixture
def lasting(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is made to last, and what gets its name, in order: "sync NAME", "rename OLD NEW"."""
    told: list[str] = []

    def sync(handle: int, sync: Any = os.fsync) -> None:
        told.append(f"sync {Path(os.readlink(f'/proc/self/fd/{handle}')).name.partition('.tmp-')[0]}")
        sync(handle)

    def rename(old: Path, new: Path, rename: Any = os.rename) -> None:
        told.append(f"rename {Path(old).name.partition('.tmp-')[0]} {Path(new).name}")
        rename(old, new)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "rename", rename)
    return told


def test_files_last_before_their_folder_has_its_name_and_the_name_before_the_marker(
    tmp_path: Path, lasting: list[str]
) -> None:
    """A power cut between any two of these leaves what was there before, or the whole."""
    home, step = tmp_path / "home", step_name(10)
    home.mkdir()
    save(home, 10, stretches=stretches(10), ema=weights(10)["weight"], config={}, facts={})
    print("; ".join(lasting))
    assert lasting == [
        f"sync {RANK_FILE}", "sync ema.safetensors", "sync config.json", "sync manifest.json",
        f"sync {step}", f"rename {step} {step}", "sync home",
        "sync COMMITTED.tmp", "rename COMMITTED.tmp COMMITTED", f"sync {step}",
    ]  # fmt: skip


# ---- full and crowded --------------------------------------------------------------------------------------
def put_on_a_full_disk(home: Path, step: int) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, hard))
    try:
        put(home, step)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


def test_a_full_disk_stops_the_save_and_keeps_what_was_there(tmp_path: Path) -> None:
    put(tmp_path, 10)
    (error,) = processes.run(put_on_a_full_disk, tmp_path, 20)
    assert isinstance(error, DiskFull) and error.stops_the_run
    assert "step-00000020 could not be written (process 0:" in str(error) and "File too large" in str(error)
    assert "older checkpoints stay as they are" in str(error)
    check_whole(newest(tmp_path), 10)
    assert [path.name for path in tmp_path.iterdir()] == [step_name(10)]


def put_without_memory(home: Path, step: int, kind: type[Exception], where: str) -> tuple[str, float]:
    """A save in which the last process has no room for its copies, or for what it writes; and how long it took."""
    began = time.monotonic()

    def short(*_: Any, **__: Any) -> Any:
        raise kind("cannot allocate memory: you tried to allocate 23 GB")

    if together.rank() == together.world_size() - 1:
        setattr(saving, where, short)
    try:
        put(home, step)
    except RuntimeError as error:
        return str(error), time.monotonic() - began
    return "saved", 0.0


@pytest.mark.parametrize(("where", "kind"), [("_copied", RuntimeError), ("save_file", MemoryError)])
def test_whatever_one_process_meets_in_a_save_all_hear_of_it(tmp_path: Path, where: str, kind: type[Exception]) -> None:
    put(tmp_path, 10)
    (said, seconds), (also, _) = processes.run(put_without_memory, tmp_path, 20, kind, where, world_size=2)
    print(f"all processes heard of it after {seconds:.2f} s: {said}")
    assert said == also and f"process 1: {kind.__name__}: cannot allocate memory" in said
    check_whole(newest(tmp_path), 10)
    assert [path.name for path in tmp_path.iterdir()] == [step_name(10)]


def meet(step: int) -> list[str]:
    """Errors of one process, of kinds that can and cannot be sent as they are; what each process raises."""

    class Own(ValueError):
        pass

    said = []
    for error in (KeyError("a"), DiskFull("full"), Own("local"), StorageError("away")):
        def work(error: Exception = error) -> None:
            if together.rank() == step:
                raise error

        try:
            together.each(work)
        except Exception as raised:
            said.append(f"{type(raised).__name__}: {raised}")
    return said


def test_errors_of_any_kind_are_errors_of_all() -> None:
    mine, others = processes.run(meet, 0, world_size=2)
    assert mine == ["KeyError: 'a'", "DiskFull: full", "Own: local", "StorageError: away"]
    assert others == ["KeyError: 'a'", "DiskFull: full", "RuntimeError: Own: local", "StorageError: away"]


def test_the_last_few_and_the_milestones_stay(tmp_path: Path) -> None:
    for step in range(1, 21):
        save(tmp_path, step, stretches=stretches(step), ema={}, config={}, facts={})
        retain(tmp_path, 3, 8)
    assert sorted(path.name for path in tmp_path.iterdir()) == [step_name(step) for step in (8, 16, 18, 19, 20)]


def of_twenty(home: Path, losses: dict[int, float | None], best: bool, pin: int | None = None) -> list[int]:
    """The steps that are left of twenty saves, keeping three; one of them is pinned as soon as it is there."""
    for step, loss in losses.items():
        save(home, step, stretches=stretches(step), ema={}, config={}, facts={"validation_loss": loss})
        if step == pin:
            (home / step_name(step) / PINNED).touch()
        retain(home, 3, None, best)
    left = sorted(int(path.name.removeprefix("step-")) for path in home.iterdir())
    print(f"T6: 20 saves, keep 3{' + best' if best else ''}{f' + step {pin} pinned' if pin else ''}: "
          f"{len(left)} folders, steps {left}")  # fmt: skip
    return left


def test_of_twenty_the_last_three_and_the_best_stay(tmp_path: Path) -> None:
    """T6. Validated at every second step; step 6 is the best, step 20, which also stays, the second best."""
    losses = {step: None if step % 2 else {6: 0.1, 20: 0.2}.get(step, 1 / step + 0.5) for step in range(1, 21)}
    assert of_twenty(tmp_path / "best", losses, best=True) == [6, 18, 19, 20]
    assert of_twenty(tmp_path / "pinned", losses, best=True, pin=3) == [3, 6, 18, 19, 20]
    # The twin: nobody asks for the best, and it is gone.
    assert of_twenty(tmp_path / "last", losses, best=False) == [18, 19, 20]


def test_a_loss_that_is_no_number_is_not_the_best(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of a checkpoint from before such losses were left out of manifests."""
    losses = {step: {6: 0.1, 8: math.nan, 12: -math.inf}.get(step, 0.5) for step in range(1, 21)}
    assert of_twenty(tmp_path / "new", losses, best=True) == [6, 18, 19, 20]
    monkeypatch.setattr(saving, "as_json", lambda value: value)
    assert of_twenty(tmp_path / "old", losses, best=True) == [6, 18, 19, 20]
    # The twin: taken as they are, the one that is no number drives out the best.
    monkeypatch.setattr(keeping, "measured", lambda manifest: (None, manifest["validation_loss"]))
    assert 6 not in of_twenty(tmp_path / "twin", losses, best=True)


def test_losses_over_other_samples_are_not_compared() -> None:
    """Three held-out batches are measured at first, then thirty, which are harder."""
    losses = {10: (3, 0.1), 20: (3, 0.2), 30: (30, 0.7), 40: (30, 0.6), 50: None, 60: (30, 0.8), 70: None}
    assert staying(losses, 1, None, best=True) == {40, 70}
    assert staying({step: x and (None, x[1]) for step, x in losses.items()}, 1, None, best=True) == {10, 70}


def test_what_cannot_be_removed_yet_stops_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a shared file system a file that another machine has open lets no folder go."""
    def held(folder: Path) -> None:
        raise OSError(errno.ENOTEMPTY, "Directory not empty", str(folder))

    put(tmp_path, 10, 20)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", held)
        put(tmp_path, 30)
        assert len(sweep(tmp_path)) == 1
    assert [path.name for path in steps(tmp_path)] == [step_name(30), step_name(20)]
    assert len(sweep(tmp_path)) == 1 and len(list(tmp_path.iterdir())) == 2


def test_differences_are_named_with_both_values() -> None:
    there: dict[str, Any] = {"unet": {"model_channels": 64, "mult": [1, 2]}, "seed": 0}
    now: dict[str, Any] = {"unet": {"model_channels": 32, "mult": [1, 2]}, "seed": 0, "new": 1}
    assert differences(there, now) == [
        "new: None in the checkpoint, 1 now",
        "unet.model_channels: 64 in the checkpoint, 32 now",
    ]

"""Copies of checkpoints at another place, on disk and on S3: made beside training, cut short, damaged, fetched."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ldm.storage import StorageError, place
from ldm.training import copies, fetching
from ldm.training.checkpoint import Checkpoint, NotWhole, step_name
from ldm.training.copies import Copier, committed, disown
from ldm.training.keeping import PINNED, retain
from ldm.training.loader import TrainData
from ldm.training.saving import save
from tests.ldm.training import processes
from tests.ldm.training.test_checkpoint import DAMAGES, check_whole, files, put, stretches, weights
from tests.ldm.training.test_train import weights_of, work
from tests.ldm.training.tiny import RUN, settings, write_data
from tests.s3_server import BUCKET, VARIABLES

KEEP = replace(RUN, keep_checkpoints=2, keep_every_steps=None, keep_best=True)


@pytest.fixture(params=["disk", "s3"])
def there(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """Where copies lie: in another folder, then below a prefix of a bucket."""
    if request.param == "disk":
        return tmp_path / "there"
    request.getfixturevalue("s3")
    return place(f"s3://{BUCKET}/{tmp_path.name}")


def store() -> dict[str, str]:
    """What a process of another environment needs in order to find the S3 server."""
    return {name: os.environ[name] for name in (*VARIABLES, "AWS_ENDPOINT_URL") if name in os.environ}


def bytes_at(where: Any) -> dict[str, bytes]:
    return {f"{name}/{file}": copies.storage.read(where / name / file)
            for name, names in copies._by_folder(where).items() for file in names}  # fmt: skip


def bytes_of(home: Path) -> dict[str, bytes]:
    return {name: (home / name).read_bytes() for name in files(home)}


def copy(home: Path, there: Any, *steps: int, losses: dict[int, float] | None = None) -> list[tuple[str, str]]:
    """Trains to each of these steps, so to say, and copies meanwhile. Returns what was told."""
    told: list[tuple[str, str]] = []
    with Copier(home, there, KEEP, lambda *words: told.append(words)) as copier:
        copier.patience = 60.0
        for step in steps:
            facts = {"samples_seen": 8 * step, "validation_loss": (losses or {}).get(step)}
            ema = weights(step)["weight"]
            save(home, step, stretches=stretches(step), ema=ema, config={"model": "tiny"}, facts=facts)
            retain(home, 2, None, True, but=copier.under_way)
            copier.look()
            wait_for(lambda step=step: ("copies/newest", f"{step_name(step)} in {there}") in told)
    return told


def wait_for(what: Callable[[], object]) -> None:
    until = time.monotonic() + 60
    while not what():
        assert time.monotonic() < until
        time.sleep(0.01)


# ---- copying -----------------------------------------------------------------------------------------------
def test_every_checkpoint_is_copied_and_the_same_stay_there(there: Any, tmp_path: Path) -> None:
    home = tmp_path / "home"
    told = copy(home, there, 10, 20, 30, 40, losses={10: 0.1, 30: 0.5})
    assert sorted(path.name for path in home.iterdir()) == [step_name(10), step_name(30), step_name(40)]
    assert bytes_at(there) == bytes_of(home)
    assert told[-1] == ("copies/newest", f"step-00000040 in {there}") and not [w for w in told if "trouble" in w[0]]
    # Another disk fetches the newest, and what is old there stays as long as the rules say.
    other = tmp_path / "other"
    found = fetching.newest(other, there)
    check_whole(found, 40)
    assert [path.name for path in other.iterdir()] == [step_name(40)]
    assert {name: data for name, data in bytes_at(there).items() if "40" in name} == bytes_of(other)
    copy(other, there, 50)
    assert sorted(committed(there)) == [step_name(10), step_name(40), step_name(50)]


def test_a_save_waits_for_no_copy_and_what_is_being_copied_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, there, go_on = tmp_path / "home", tmp_path / "there", threading.Event()
    put(home, 10)
    sent: list[str] = []

    def slowly(source: Path, target: Any, send: Any = copies._send) -> None:
        sent.append(source.parent.name)
        assert go_on.wait(60)
        send(source, target)

    monkeypatch.setattr(copies, "_send", slowly)
    with Copier(home, there, replace(KEEP, keep_checkpoints=1), None) as copier:
        copier.patience = 60.0
        wait_for(lambda: sent)
        for step in (20, 30):
            save(home, step, stretches=stretches(step), ema={}, config={}, facts={})
            gone = retain(home, 1, None, but=copier.under_way)
            copier.look()
            assert gone == ([] if step == 20 else [step_name(20)])
        assert not committed(there)
        go_on.set()
    assert list(dict.fromkeys(sent)) == [step_name(10), step_name(30)]
    assert list(committed(there)) == [step_name(30)] == [path.name for path in there.iterdir()]
    assert retain(home, 1, None) == [step_name(10)]


def test_what_is_chosen_to_be_copied_is_not_removed_at_the_same_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A removal that begins between the choice of a checkpoint and the note of it waits for the note."""
    for guard in (True, False):
        home, there = tmp_path / f"home {guard}", tmp_path / f"there {guard}"
        put(home, 10)
        chosen, removed, told = threading.Event(), threading.Event(), []

        def slowly(copier: Copier, copies_there: Any, choose: Any = Copier._next,
                   chosen: Any = chosen, removed: Any = removed) -> Path | None:  # fmt: skip
            path = choose(copier, copies_there)
            if not chosen.is_set():
                chosen.set()
                removed.wait(1)  # where the removal waits for us it comes later
            return path

        with monkeypatch.context() as patch:
            patch.setattr(Copier, "_next", slowly)
            copier = Copier(home, there, KEEP, lambda *words, told=told: told.append(words))
            copier.patience = 60.0
            if not guard:  # the twin: choice and note with a gap between them
                copier._choosing = nullcontext()  # type: ignore[assignment]
            with copier:
                assert chosen.wait(60)
                save(home, 20, stretches=stretches(20), ema={}, config={}, facts={})
                with copier.standing_still() as under_way:
                    gone = retain(home, 1, None, but=under_way)
                removed.set()
                copier.look()
        print(f"removed while it was chosen, lock {guard}: {gone}; told: {[subject for subject, _ in told]}")
        assert (gone == []) == guard
        assert ("copies/trouble" not in [subject for subject, _ in told]) == guard


def test_what_is_pinned_stays_there_too(there: Any, tmp_path: Path) -> None:
    home = tmp_path / "home"
    copy(home, there, 10, 20)
    (home / step_name(10) / PINNED).touch()
    copy(home, there, 30, 40, 50)
    assert sorted(committed(there)) == [step_name(10), step_name(40), step_name(50)]
    # Also where another disk, which knows of no pin, trains on.
    other = tmp_path / "other"
    check_whole(fetching.newest(other, there), 50)
    copy(other, there, 60, 70)
    assert sorted(committed(there)) == [step_name(10), step_name(60), step_name(70)]


def test_a_copy_that_fails_is_tried_again_and_told_of(
    there: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures = [StorageError(f"{there}: away"), StorageError(f"{there}: still away"), None]

    def unkind(source: Path, target: Any, send: Any = copies._send) -> None:
        if failures and (failure := failures.pop(0)) is not None:
            raise failure
        send(source, target)

    monkeypatch.setattr(copies, "_send", unkind)
    monkeypatch.setattr(copies, "PAUSES", (0.01, 0.1))
    told = copy(tmp_path / "home", there, 10)
    assert [subject for subject, _ in told] == [
        "copies/trouble", "copies/trouble", "copies/newest", "copies/trouble"]  # fmt: skip
    assert "tried again in 0.01 s: StorageError" in told[0][1] and "still away" in told[1][1] and told[3][1] == "over"
    assert bytes_at(there) == bytes_of(tmp_path / "home")


def test_a_place_that_never_answers_keeps_nobody_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(where: Any) -> None:
        raise StorageError(f"{where}: away")

    put(tmp_path / "home", 10)
    monkeypatch.setattr(copies, "_by_folder", away)
    monkeypatch.setattr(copies, "PAUSES", (100.0, 100.0))
    told: list[str] = []
    with Copier(tmp_path / "home", tmp_path / "there", KEEP, lambda *words: told.append(words[1])):
        wait_for(lambda: told)
    assert "nothing is copied to" in told[0] and "away" in told[0] and len(told) == 2
    # Who has a checkpoint here goes on from it; who has none does not begin from zero.
    check_whole(fetching.newest(tmp_path / "home", tmp_path / "there", lambda *words: told.append(words[1])), 10)
    assert "training goes on from" in told[-1]
    with pytest.raises(StorageError, match="away"):
        fetching.newest(tmp_path / "empty", tmp_path / "there")


def put_and_copy(home: Path, where: str, step: int) -> None:
    put(home, step)
    with Copier(home, place(where), KEEP, None) as copier:
        copier.patience = 60.0


POINTS = ["copy_begin", "copy_after_file", "copy_before_committed"]
QUICK = [("disk", "copy_after_file"), ("s3", "copy_before_committed")]
OTHERS = [(where, point) for where in ("disk", "s3") for point in POINTS if (where, point) not in QUICK]


@pytest.mark.parametrize(
    ("there", "point"),
    [*QUICK, *(pytest.param(*other, marks=pytest.mark.slow) for other in OTHERS)],
    indirect=["there"],
)
def test_killed_while_copying_the_copy_before_it_is_the_newest(there: Any, tmp_path: Path, point: str) -> None:
    home = tmp_path / "home"
    copy(home, there, 10)
    died = processes.run(put_and_copy, home, str(there), 20, env={"LDM_CRASH_AT": point, **store()})
    assert died == [137]
    assert list(committed(there)) == [step_name(10)]
    check_whole(fetching.newest(tmp_path / "other", there), 10)
    copy(home, there, 30)  # the next training copies what is left, and what was cut short does not stay
    assert sorted(committed(there)) == [step_name(20), step_name(30)] and bytes_at(there) == bytes_of(home)


def test_what_is_damaged_here_is_not_copied(tmp_path: Path) -> None:
    home, there = tmp_path / "home", tmp_path / "there"
    put(home, 10, 20)
    DAMAGES["flipped byte in ema"][0](home / step_name(20))
    told: list[str] = []
    with Copier(home, there, KEEP, lambda *words: told.append(words[1])) as copier:
        copier.patience = 60.0
    assert list(committed(there)) == [step_name(10)]
    assert "step-00000020 is not copied: ema.safetensors does not have the sha256" in told[0]


def test_the_way_that_training_left_is_not_fetched_and_the_new_one_takes_its_place(there: Any, tmp_path: Path) -> None:
    home = tmp_path / "home"
    copy(home, there, 10, 20)
    disown(there, 10)
    shutil.rmtree(home / step_name(20))
    check_whole(fetching.newest(home, there), 10)
    check_whole(fetching.newest(tmp_path / "other", there), 10)
    assert f"{step_name(20)}/SET_ASIDE" in bytes_at(there)
    copy(home, there, 20)
    assert bytes_at(there) == bytes_of(home)


# ---- whose they are ----------------------------------------------------------------------------------------
def put_of(home: Path, run: str, *steps: int) -> None:
    for step in steps:
        save(home, step, stretches=stretches(step), ema={}, config={"run": run},
             facts={"samples_seen": 8 * step, "run": run})  # fmt: skip


def copy_all(home: Path, there: Any) -> None:
    with Copier(home, there, replace(KEEP, keep_checkpoints=9), None) as copier:
        copier.patience = 60.0


def test_copies_of_another_training_are_refused_by_name(there: Any, tmp_path: Path) -> None:
    mine, theirs = tmp_path / "mine", tmp_path / "theirs"
    put_of(theirs, "theirs", 10, 20)
    copy_all(theirs, there)
    before = bytes_at(there)
    # Older than what is here: the next copy would push them out.
    put_of(mine, "mine", 30)
    with pytest.raises(ValueError, match="holds copies of another training.*step-00000010, step-00000020.*name=NAME"):
        fetching.newest(mine, there)
    # Newer, and made from other settings: nothing of it is fetched.
    shutil.rmtree(mine)

    def allowed(found: Checkpoint) -> None:
        raise ValueError(f"{found.path} was made from other settings: {found.config['run']}, {found.manifest['step']}")

    with pytest.raises(ValueError, match="step-00000020 was made from other settings: theirs, 20"):
        fetching.newest(mine, there, allowed=allowed)
    assert not mine.exists() and bytes_at(there) == before
    # The twin: where copies do not say whose they are, they are gone with the next.
    put_of(mine, "mine", 30)
    manifest = json.loads((mine / step_name(30) / "manifest.json").read_text())
    assert manifest.pop("run") == "mine"
    (mine / step_name(30) / "manifest.json").write_text(json.dumps(manifest))
    data = (mine / step_name(30) / "manifest.json").read_bytes()
    (mine / step_name(30) / "COMMITTED").write_text(hashlib.sha256(data).hexdigest())
    found = fetching.newest(mine, there)
    assert found is not None and found.step == 30
    with Copier(mine, there, replace(KEEP, keep_checkpoints=1), None) as copier:
        copier.patience = 60.0
    assert sorted(committed(there)) == [step_name(30)]


def test_a_training_made_anew_goes_on_from_no_copy_of_the_old_one(there: Any, tmp_path: Path) -> None:
    home = tmp_path / "home"
    copy(home, there, 10, 20)
    shutil.rmtree(home)
    check_whole(fetching.newest(tmp_path / "twin", there), 20)  # what would come back
    assert disown(there, -1) == [step_name(10), step_name(20)] and disown(there, -1) == []
    assert fetching.newest(home, there) is None
    assert f"{step_name(20)}/ema.safetensors" in bytes_at(there)  # and nothing was deleted


def test_a_place_that_cannot_be_written_to_is_found_at_once(tmp_path: Path, s3: Any) -> None:
    (tmp_path / "file").touch()
    wrong = [f"s3://{BUCKET}-that-is-not-there/x", str(tmp_path / "file" / "below"), "/proc/copies"]
    for where in wrong:
        began = time.monotonic()
        with pytest.raises(ValueError, match=f"copy_to={where}: checkpoints cannot be copied there"):
            copies.check_place(replace(RUN, copy_to=where), tmp_path / "small/train")
        print(f"{where}: refused after {time.monotonic() - began:.2f} s")
    for where in (f"s3://{BUCKET}/probe", str(tmp_path / "there"), None):
        copies.check_place(replace(RUN, copy_to=where), tmp_path / "small/train")
    assert not copies.storage.sizes(place(f"s3://{BUCKET}/probe")) and not (tmp_path / "there").exists()


# ---- fetching ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_copy_is_refused_by_name_and_the_one_before_it_taken(tmp_path: Path, damage: str) -> None:
    home, there = tmp_path / "home", tmp_path / "there"
    copy(home, there, 10, 20)
    DAMAGES[damage][0](there / step_name(20))
    told: list[tuple[str, str]] = []
    other = tmp_path / "other"
    check_whole(fetching.newest(other, there, lambda *words: told.append(words)), 10)
    assert [path.name for path in other.iterdir()] == [step_name(10)]
    if damage != "missing COMMITTED":  # which says that it never was one
        ((subject, words),) = told
        assert subject == "refused/copy-of-step-00000020" and str(there / step_name(20)) in words
        assert "does not have the sha256" in words or "is missing" in words
        # It is neither deleted nor counted among those that stay.
        copy(other, there, 15)
        assert sorted(committed(there)) == [step_name(10), step_name(15)]
        assert (there / step_name(20) / "SET_ASIDE").exists()


def test_nobody_begins_from_zero_because_all_copies_are_damaged(tmp_path: Path) -> None:
    home, there = tmp_path / "home", tmp_path / "there"
    copy(home, there, 10)
    DAMAGES["missing rank file"][0](there / step_name(10))
    with pytest.raises(NotWhole, match="none of the copies in .* is whole"):
        fetching.newest(tmp_path / "empty", there)


def test_where_no_checkpoint_here_is_whole_a_copy_takes_its_place(tmp_path: Path) -> None:
    home, there = tmp_path / "home", tmp_path / "there"
    copy(home, there, 10, 20)
    for step in (10, 20):
        DAMAGES["flipped byte in rank file"][0](home / step_name(step))
    told: list[str] = []
    check_whole(fetching.newest(home, there, lambda *words: told.append(words[0])), 20)
    assert sorted(path.name for path in (home / "aside/001").iterdir()) == [step_name(10), step_name(20)]
    assert sorted(told) == ["refused/step-00000010", "refused/step-00000020"]
    DAMAGES["flipped byte in rank file"][0](home / step_name(20))
    shutil.rmtree(there)
    with pytest.raises(NotWhole, match="no checkpoint in .*home is whole"):
        fetching.newest(home, there)


def fetch(home: Path, where: str) -> int:
    found = fetching.newest(home, place(where))
    assert found is not None
    check_whole(found, found.step)
    return found.step


MOSTLY_S3 = pytest.mark.parametrize("there", ["s3", pytest.param("disk", marks=pytest.mark.slow)], indirect=True)


@MOSTLY_S3
def test_all_processes_fetch_their_share(there: Any, tmp_path: Path) -> None:
    copy(tmp_path / "home", there, 10)
    ranks = processes.run(fetch, tmp_path / "other", str(there), world_size=3, env=store())
    assert ranks == [10, 10, 10] and bytes_of(tmp_path / "other") == bytes_of(tmp_path / "home")


# ---- in training -------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TrainData:
    return write_data(tmp_path_factory.mktemp("latents"), [9, 14, 6])


@MOSTLY_S3
def test_on_an_empty_disk_training_goes_on_from_the_copy_to_the_same_bits(
    there: Any, data: TrainData, tmp_path: Path
) -> None:
    run = replace(RUN, checkpoint_every_steps=3, keep_checkpoints=1, copy_to=str(there))
    what, home, straight = settings(max_steps=8), tmp_path / "small/train", tmp_path / "straight"
    processes.run(work, what, data, straight, replace(run, copy_to=None), world_size=2)
    first = processes.run(work, what, data, home, run, 5, world_size=2, env=store())
    assert [result["step"] for result in first] == [5, 5]
    assert list(committed(there / "small/train")) == [step_name(5)]
    shutil.rmtree(home)
    rest = processes.run(work, what, data, home, run, world_size=2, env=store())
    assert [result["step"] for result in rest] == [8, 8]
    assert weights_of(home, 8) == weights_of(straight, 8)
    assert list(committed(there / "small/train")) == [step_name(8)]


def test_a_place_that_depends_on_where_a_node_begins_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="copy_to is 'backup'; expected s3://bucket/prefix or the whole path"):
        copies.place_of(replace(RUN, copy_to="backup"), tmp_path)

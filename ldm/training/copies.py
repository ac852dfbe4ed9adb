"""Copies of checkpoints at a place that outlives the disk: another folder, or s3://bucket/prefix.

One thread of the first process copies what is committed, the newest first: its files, then COMMITTED. No step waits for
it; what cannot be copied is tried again, later and later, and never stops the training. Of the copies the same stay as
of the checkpoints. How they are fetched: ldm/training/fetching.py.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm import storage
from ldm.config import TrainingRunConfig
from ldm.crash import crash_point
from ldm.storage import is_remote
from ldm.training import checkpoint, keeping, sealing
from ldm.training.checkpoint import Tell
from ldm.training.keeping import PINNED

PAUSES = (1.0, 300.0)  # seconds before a copy is tried again: at first, and at most; every one is twice the last
END_SECONDS = 600.0  # that the end of a training waits for what is not copied yet
STOP_SECONDS = 15.0  # the same of one that was asked to stop, or failed: who asked may not wait for long
SET_ASIDE = "SET_ASIDE"  # takes the place of COMMITTED where training went back to before it, and where it is damaged
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Copy:
    """What decides whether a checkpoint is copied, and whether the copy stays."""

    sha256: str  # of its manifest, which COMMITTED holds
    measured: keeping.Measured | None


# ---- copying -----------------------------------------------------------------------------------------------
class Copier:
    """Copies the checkpoints of a folder to a place, in the background; without a place it does nothing."""

    def __init__(self, home: Path, place: Any | None, run: TrainingRunConfig, tell: Tell | None) -> None:
        self.home, self.place, self.run, self.tell = home, place, run, tell
        self.under_way: Path | None = None  # a checkpoint that must stay meanwhile
        self.patience = STOP_SECONDS  # at the end
        self._there: dict[str, Copy] | None = None  # not known before the first look
        self._damaged: set[str] = set()
        self._news = threading.Condition()
        self._choosing = threading.Lock()
        self._look, self._deadline = True, math.inf
        self._thread = threading.Thread(target=self._work, name="copies", daemon=True)

    def __enter__(self) -> Copier:
        if self.place is not None:
            self._thread.start()
        return self

    def look(self) -> None:
        """There is a new checkpoint."""
        with self._news:
            self._look = True
            self._news.notify()

    @contextmanager
    def standing_still(self) -> Iterator[Path | None]:
        """Meanwhile nothing more is chosen to be copied; what is being copied already must stay."""
        with self._choosing:
            yield self.under_way

    def __exit__(self, *_: object) -> None:
        """Waits until all is copied, as long as its patience lasts; the next training copies what is left."""
        if self.place is None:
            return
        with self._news:
            self._deadline = time.monotonic() + self.patience
            self._news.notify()
        self._thread.join(self.patience)
        if self._thread.is_alive():
            self._say("trouble", f"what is not in {self.place} after {self.patience:g} s is left to the next training")

    def _work(self) -> None:
        pause = PAUSES[0]
        while self._has_news():
            while trouble := self._trouble_copying():
                self._say("trouble", f"nothing is copied to {self.place}, tried again in {pause:g} s: {trouble}")
                with self._news:
                    if self._is_leaving():
                        return
                    self._news.wait_for(self._is_leaving, pause)
                pause = min(2 * pause, PAUSES[1])
            if pause > PAUSES[0]:
                self._say("trouble", "over")
            pause = PAUSES[0]

    def _has_news(self) -> bool:
        """Waits until there is something to look at; False at the end."""
        with self._news:
            self._news.wait_for(lambda: self._look or self._is_leaving())
            look, self._look = self._look, False
            return look

    def _is_leaving(self) -> bool:
        return self._deadline < math.inf

    def _trouble_copying(self) -> str:
        """Copies all that is not there; returns what went wrong, and nothing where all went well."""
        try:
            if self._there is None:
                self._there = _copies_at(self.place)
            while (path := self._choose(self._there)) is not None:
                self._copy(path, self._there)
        except Exception as error:  # whatever it is, training goes on, and somebody is told
            return f"{type(error).__name__}: {error}"
        finally:
            self.under_way = None
        return ""

    def _choose(self, there: dict[str, Copy]) -> Path | None:
        with self._choosing:
            self.under_way = self._next(there)
            return self.under_way

    def _next(self, there: dict[str, Copy]) -> Path | None:
        """The newest checkpoint that is not there and would stay there."""
        here = {path.name: copy for path in checkpoint.steps(self.home) if (copy := _local(path)) is not None}
        stay = _staying({**there, **here}, self.run) | self._pinned()
        missing = [
            name for name in here if name in stay and there.get(name) != here[name] and name not in self._damaged
        ]
        return self.home / max(missing) if missing and time.monotonic() < self._deadline else None

    def _copy(self, path: Path, there: dict[str, Copy]) -> None:
        """One checkpoint; then what lies there in vain goes."""
        copy, target, found = _local(path), self.place / path.name, checkpoint.problems(path)
        if copy is None or found:
            self._damaged.add(path.name)
            return self._say("trouble", f"{path} is not copied: {'; '.join(found)}")
        _remove(target, ["COMMITTED"])
        there.pop(path.name, None)
        crash_point("copy_begin")
        names = [*json.loads((path / "manifest.json").read_bytes())["files"], "manifest.json"]
        for name in names:
            if time.monotonic() >= self._deadline:
                return None
            _send(path / name, target / name)
            crash_point("copy_after_file")
        _remove(target, _by_folder(self.place)[path.name] - {*names})
        crash_point("copy_before_committed")
        _send(path / "COMMITTED", target / "COMMITTED")
        there[path.name] = copy
        if path.name in self._pinned():
            put_whole(target / PINNED, b"")
        self._say("newest", f"{max(there)} in {self.place}")
        return self._tidy(there)

    def _tidy(self, there: dict[str, Copy]) -> None:
        """Removes copies as checkpoints are removed, and what copies that were cut short have left."""
        stay, pinned = _staying(there, self.run), self._pinned() & there.keys()
        for name, files in _by_folder(self.place).items():
            if name in pinned and PINNED not in files:  # since it was copied
                put_whole(self.place / name / PINNED, b"")
            elif name not in stay and not {SET_ASIDE, PINNED} & files:
                there.pop(name, None)
                _remove(self.place / name, sorted(files, key=lambda file: file != "COMMITTED"))
        if is_remote(self.place):
            storage.abort_uploads(self.place)

    def _pinned(self) -> set[str]:
        return {path.parent.name for path in self.home.glob(f"step-*/{PINNED}")}

    def _say(self, subject: str, words: str) -> None:
        log.info("copies/%s: %s", subject, words)
        if self.tell is not None:
            self.tell(f"copies/{subject}", words)


def place_of(run: TrainingRunConfig, home: Path) -> Any | None:
    """Where the checkpoints in <outputs>/<name>/train are copied to: <copy_to>/<name>/train."""
    if run.copy_to is None:
        return None
    if not is_remote(run.copy_to) and not Path(run.copy_to).is_absolute():
        raise ValueError(
            f"cluster.train.run.copy_to is {run.copy_to!r}; expected s3://bucket/prefix or the whole path of a folder, "
            f"since every node begins in a folder of its own"
        )
    return storage.place(run.copy_to) / home.parent.name / home.name


def check_place(run: TrainingRunConfig, home: Path) -> None:
    """Raises ValueError where nothing can be copied to: a small file is written there, or nearest to it, and removed.

    A training would go on without copies, and tell of it where it may be read too late.
    """
    try:
        if (where := place_of(run, home)) is None:
            return
        if is_remote(where):
            storage.check(where, "cluster.train.run.copy_to")
            probe = f".probe-{uuid.uuid4().hex}"
            storage.put(where / probe, b"")
            storage.remove([where / probe])
        else:
            nearest = next(folder for folder in (where, *where.parents) if folder.exists())
            tempfile.TemporaryFile(dir=nearest).close()
    except OSError as error:
        raise ValueError(
            f"cluster.train.run.copy_to={run.copy_to}: checkpoints cannot be copied there: {error}; name a place that "
            f"can be written to, or null"
        ) from error


def _staying(copies: dict[str, Copy], run: TrainingRunConfig) -> set[str]:
    """Which of them stay by the rules of a run."""
    losses = {checkpoint.step_of(name): copy.measured for name, copy in copies.items()}
    steps = keeping.staying(losses, run.keep_checkpoints, run.keep_every_steps, run.keep_best)
    return {checkpoint.step_name(step) for step in steps}


def _local(path: Path) -> Copy | None:
    """What a checkpoint of this disk would be as a copy; None where it is not committed."""
    try:
        return _copy_of((path / "COMMITTED").read_bytes(), (path / "manifest.json").read_bytes())
    except FileNotFoundError:
        return None


def _copy_of(sha256: bytes, manifest: bytes) -> Copy | None:
    if hashlib.sha256(manifest).hexdigest().encode() != sha256:
        return None
    return Copy(sha256.decode(), keeping.measured(json.loads(manifest)))


def _copies_at(place: Any) -> dict[str, Copy]:
    """The copies whose manifest is the one that was committed."""
    found = {
        name: _copy_of(storage.read(place / name / "COMMITTED"), storage.read(place / name / "manifest.json"))
        for name, files in _by_folder(place).items()
        if {"COMMITTED", "manifest.json"} <= files
    }
    return {name: copy for name, copy in found.items() if copy is not None}


def committed(place: Any) -> dict[str, bytes]:
    """What COMMITTED of every copy says."""
    return {
        name: storage.read(place / name / "COMMITTED")
        for name, files in _by_folder(place).items()
        if "COMMITTED" in files
    }


def disown(place: Any, step: int) -> list[str]:
    """Training goes back to `step`: later copies stay where they lie, and nobody takes them for checkpoints."""
    later = {name: sha256 for name, sha256 in committed(place).items() if checkpoint.step_of(name) > step}
    for name, sha256 in later.items():
        set_aside(place / name, sha256)
    return sorted(later)


def set_aside(folder: Any, sha256: bytes) -> None:
    put_whole(folder / SET_ASIDE, sha256)
    _remove(folder, ["COMMITTED"])


# ---- files, on disk or on an object store ------------------------------------------------------------------
def _by_folder(place: Any) -> dict[str, set[str]]:
    """The files of everything that has the name of a checkpoint."""
    if is_remote(place):
        names = list(storage.sizes(place))
    else:
        names = [path.relative_to(place).as_posix() for path in place.glob("step-*/*") if path.is_file()]
    found: dict[str, set[str]] = {}
    for name in names:
        folder, _, file = name.partition("/")
        if file and folder == checkpoint.step_name(checkpoint.step_of(folder)):
            found.setdefault(folder, set()).add(file)
    return found


def put_whole(target: Any, data: bytes) -> None:
    """A small file, whole or not at all."""
    if is_remote(target):
        return storage.put(target, data)
    part = target.with_name(f"{target.name}.part")
    part.write_bytes(data)
    return _place(part, target)


def _send(source: Path, target: Any) -> None:
    if is_remote(target):
        return storage.put_file(source, target)
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{target.name}.part")
    shutil.copyfile(source, part)
    return _place(part, target)


def _place(part: Path, target: Path) -> None:
    with open(part, "rb") as file:
        os.fsync(file.fileno())
    os.replace(part, target)
    sealing.sync_folder(target.parent)


def _remove(folder: Any, names: Iterable[str]) -> None:
    """Removes files of a folder in this order, and the folder with the last of them."""
    for name in names:
        if is_remote(folder):
            storage.remove([folder / name])
        else:
            (folder / name).unlink(missing_ok=True)
    if not is_remote(folder) and folder.exists() and not any(folder.iterdir()):
        folder.rmdir()

"""Copies of checkpoints at a place that outlives the disk: another folder, or s3://bucket/prefix.

One thread of the first process copies what is committed, the newest first: its files, then COMMITTED. No step waits for
it; what cannot be copied is tried again, later and later, and never stops the training. Of the copies the same stay as
of the checkpoints. A training that finds more there than here fetches the newest that verifies, every process its share
of the files, and goes on from it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import shutil
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm import storage
from ldm.config import TrainingRunConfig
from ldm.crash import crash_point
from ldm.storage import is_remote
from ldm.training import checkpoint, keeping, sealing
from ldm.training.checkpoint import Checkpoint, NotWhole, Tell
from ldm.training.together import by_first, each, rank, world_size

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
            while (path := self._next(self._there)) is not None:
                self.under_way = path
                self._copy(path, self._there)
        except Exception as error:  # whatever it is, training goes on, and somebody is told
            return f"{type(error).__name__}: {error}"
        finally:
            self.under_way = None
        return ""

    def _next(self, there: dict[str, Copy]) -> Path | None:
        """The newest checkpoint that is not there and would stay there."""
        here = {path.name: copy for path in checkpoint.steps(self.home) if (copy := _local(path)) is not None}
        stay = _staying({**there, **here}, self.run)
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
        self._say("newest", f"{max(there)} in {self.place}")
        return self._tidy(there)

    def _tidy(self, there: dict[str, Copy]) -> None:
        """Removes copies as checkpoints are removed, and what copies that were cut short have left."""
        stay = _staying(there, self.run)
        for name, files in _by_folder(self.place).items():
            if name not in stay and SET_ASIDE not in files:
                there.pop(name, None)
                _remove(self.place / name, sorted(files, key=lambda file: file != "COMMITTED"))
        if is_remote(self.place):
            storage.abort_uploads(self.place)

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


def disown(place: Any, step: int) -> None:
    """Training goes back to `step`: later copies stay where they lie, and nobody takes them for checkpoints."""
    for name, sha256 in committed(place).items():
        if checkpoint.step_of(name) > step:
            _set_aside(place / name, sha256)


def _set_aside(folder: Any, sha256: bytes) -> None:
    _put(folder / SET_ASIDE, sha256)
    _remove(folder, ["COMMITTED"])


# ---- fetching ----------------------------------------------------------------------------------------------
def newest(home: Path, place: Any | None, tell: Tell | None = None) -> Checkpoint | None:
    """The newest checkpoint that verifies, of this disk or fetched from the place; all processes call it.

    A place that does not answer stops nobody who has a checkpoint here.
    """
    here, lost = None, None
    try:
        here = checkpoint.newest(home, finish=True, tell=tell)
    except NotWhole as error:
        lost = error
    if place is not None:
        offered = _offered(place, here, tell)
        newer = [name for name in offered if here is None or checkpoint.step_of(name) > here.step]
        for name in sorted(newer, reverse=True):
            if _fetch(home, place / name, offered[name], tell):
                by_first(lambda name=name: _take(home, name, offered[name], lost, tell))
                return checkpoint.opened(home / name)
        if here is None and lost is None and newer:
            raise NotWhole(f"none of the copies in {place} is whole, and there is no checkpoint in {home}; remove them "
                           f"to train from step 0")  # fmt: skip
    if lost is not None:
        raise lost
    return here


def _offered(place: Any, here: Checkpoint | None, tell: Tell | None) -> dict[str, bytes]:
    try:
        return by_first(lambda: committed(place))
    except OSError as error:
        if here is None:
            raise
        if rank() == 0 and tell is not None:
            tell("copies/trouble", f"{place} does not say what it holds; training goes on from {here.path}: {error}")
        return {}


def _fetch(home: Path, source: Any, sha256: bytes, tell: Tell | None) -> bool:
    """Brings the files of a copy to this disk, each process its share; says why not where it is not whole."""
    folder = _fetched(home, source.name)
    by_first(lambda: _begin_anew(folder))
    found = [problem for share in each(lambda: _fetch_share(source, sha256, folder)) for problem in share]
    if found:
        by_first(lambda: _refuse(source, sha256, sorted(set(found)), tell))
        by_first(lambda: shutil.rmtree(folder))
    return not found


def _refuse(source: Any, sha256: bytes, found: list[str], tell: Tell | None) -> None:
    """What lies there counts for nothing any more: neither among the copies that stay nor at the next start."""
    message = f"{source} is not taken: {'; '.join(found)}"
    log.warning("%s", message)
    if tell is not None:
        tell(f"refused/copy-of-{source.name}", message)
    _set_aside(source, sha256)


def _begin_anew(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)


def _fetch_share(source: Any, sha256: bytes, folder: Path) -> list[str]:
    """This process's files of a copy; returns what is wrong with them."""
    try:
        manifest = storage.read(source / "manifest.json")
    except FileNotFoundError:
        return ["manifest.json is missing"]
    if hashlib.sha256(manifest).hexdigest().encode() != sha256:
        return ["manifest.json does not have the sha256 that COMMITTED names"]
    if rank() == 0:
        _put(folder / "manifest.json", manifest)
    found = []
    for name, known in sorted(json.loads(manifest)["files"].items())[rank() :: world_size()]:
        try:
            _get(source / name, folder / Path(name).name)
        except FileNotFoundError:
            found.append(f"{name} is missing")
        else:
            if sealing.seal(folder / name) != known:
                found.append(f"{name} does not have the sha256 of its manifest")
    return found


def _take(home: Path, name: str, sha256: bytes, lost: NotWhole | None, tell: Tell | None) -> None:
    """What was fetched becomes a checkpoint of this disk, in place of those that are not whole."""
    if lost is not None:
        checkpoint.refuse(home, lost.refused, tell)
    sealing.adopt(_fetched(home, name), home / name, sha256.decode())
    log.info("%s was fetched", home / name)


def _fetched(home: Path, name: str) -> Path:
    return home / f"{name}.tmp-fetched"


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


def _put(target: Any, data: bytes) -> None:
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


def _get(source: Any, target: Path) -> None:
    if is_remote(source):
        storage.get_file(source, target)
    else:
        shutil.copyfile(source, target)


def _remove(folder: Any, names: Iterable[str]) -> None:
    """Removes files of a folder in this order, and the folder with the last of them."""
    for name in names:
        if is_remote(folder):
            storage.remove([folder / name])
        else:
            (folder / name).unlink(missing_ok=True)
    if not is_remote(folder) and folder.exists() and not any(folder.iterdir()):
        folder.rmdir()

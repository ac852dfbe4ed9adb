"""One runner for each output: a lock with a holder and a heartbeat, on disk (O_EXCL) or on S3 (If-None-Match)."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ldm import storage
from ldm.storage import StorageError, is_remote, place

HEARTBEAT_SECONDS = 5.0
STALE_SECONDS = 60.0


class LockedError(RuntimeError):
    """Another runner holds the output."""


def _machine() -> str:
    """Identity of this boot and process namespace: two processes with equal values can see each other's pids."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}/{os.readlink('/proc/self/ns/pid')}"


def _started(pid: int) -> str | None:
    """Start time of a process in clock ticks, or None when it is gone (or only a zombie is left of it)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] == "Z" else fields[19]


def _is_stale(text: str, age: float) -> bool:
    """True when the holder is provably gone: dead on this machine, or without a heartbeat for a minute."""
    try:
        holder = json.loads(text)
    except ValueError:  # created and not yet filled, or cut off by a crash
        return age > STALE_SECONDS
    if holder["machine"] == _machine():
        return _started(holder["pid"]) != holder["started"]
    return age > STALE_SECONDS


class _FileSlot:
    """The lock as a file. Its holder is whom it names, by a token of their own."""

    def __init__(self, path: Path, holder: dict[str, Any]) -> None:
        self.path, self.text = path, json.dumps(holder)
        path.parent.mkdir(parents=True, exist_ok=True)

    def take(self) -> bool:
        try:
            handle = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        with os.fdopen(handle, "w") as file:
            file.write(self.text)
        return True

    def take_over(self) -> bool:
        """Removes the lock if its holder is gone, and takes it. Rename has one winner; what was moved is held against
        what was judged."""
        aside = self.path.with_name(f".{self.path.name}.{uuid.uuid4().hex}.tmp")
        try:
            age, text = time.time() - self.path.stat().st_mtime, self.path.read_text()
            if not _is_stale(text, age):
                return False
            os.rename(self.path, aside)
        except FileNotFoundError:
            return self.take()
        if aside.read_text() != text:  # another rescuer was quicker, and this is its fresh lock: give it back
            os.link(aside, self.path)
        aside.unlink()
        return self.take()

    def held_by(self) -> str:
        try:
            return self.path.read_text()
        except FileNotFoundError:
            return "{}"

    def beat(self) -> bool:
        try:
            mine = self.held_by() == self.text
            if mine:
                os.utime(self.path)
        except OSError:  # the next beat may come through; a minute without one and the lock may be taken
            return True
        return mine

    def release(self) -> bool:
        mine = self.held_by() == self.text
        if mine:
            self.path.unlink(missing_ok=True)
        return mine


class _ObjectSlot:
    """The lock as an object. Each heartbeat and each take-over is a put in place of one very version (If-Match)."""

    def __init__(self, path: Any, holder: dict[str, Any]) -> None:
        self.path, self.holder, self.beats = path, holder, 0
        self.version: str | None = None

    def _data(self) -> bytes:
        return json.dumps({**self.holder, "beats": self.beats}).encode()

    def take(self) -> bool:
        self.version = storage.create(self.path, self._data())
        if self.version and storage.create(self.path, b"{}") is not None:
            storage.remove([self.path])
            raise StorageError(
                f"{self.path} could be created twice: this object store ignores If-None-Match, so two runs could write "
                f"to one place; use one that heeds it, or a paths.shards on disk"
            )
        return self.version is not None

    def take_over(self) -> bool:
        now = storage.look(self.path)
        if now is None:
            return self.take()
        if not _is_stale(now.data.decode(), now.age):
            return False
        self.version = storage.replace(self.path, self._data(), now.version)
        return self.version is not None

    def held_by(self) -> str:
        now = storage.look(self.path)
        return now.data.decode() if now else "{}"

    def beat(self) -> bool:
        self.beats += 1
        try:
            version = storage.replace(self.path, self._data(), self.version or "")
        except StorageError:  # the next beat may come through; a minute without one and the lock may be taken
            return True
        self.version = version or self.version
        return version is not None

    def release(self) -> bool:
        now = storage.look(self.path)
        mine = now is not None and self.holder["token"].encode() in now.data
        if mine:
            storage.remove([self.path])
        return mine


@contextmanager
def lock(path: str | Path, what: str) -> Iterator[None]:
    """Holds `path` as a lock for the time of the block. Raises LockedError naming the holder when it is taken.

    A lock that was lost meanwhile is neither beaten nor removed any more, and told of by a LockedError after the block.
    """
    me = {
        "what": what, "pid": os.getpid(), "started": _started(os.getpid()), "machine": _machine(),
        "host": socket.gethostname(), "token": uuid.uuid4().hex,
    }
    path = place(path)
    slot = _ObjectSlot(path, me) if is_remote(path) else _FileSlot(path, me)
    if not slot.take() and not slot.take_over():
        raise LockedError(
            f"{path} is held by another run: {slot.held_by()}. Wait for it to end; a holder on another machine that is "
            f"gone is replaced {STALE_SECONDS:.0f} s after its last heartbeat."
        )
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(HEARTBEAT_SECONDS):
            if not slot.beat():
                return

    thread = threading.Thread(target=beat, name="lock-heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        kept = slot.release()
    if not kept:
        raise LockedError(
            f"{path} was taken by another run after {STALE_SECONDS:.0f} s without a heartbeat of this one: "
            f"{slot.held_by()}. What both wrote is whole, shard by shard; the same command checks it"
        )

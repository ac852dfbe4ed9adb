"""One runner for each output: a lock file with a holder and a heartbeat."""

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


def _take(path: Path, holder: dict[str, object]) -> bool:
    try:
        handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
        return False
    with os.fdopen(handle, "w") as file:
        json.dump(holder, file)
    return True


def _remove_stale(path: Path) -> None:
    """Removes the lock if its holder is gone. Rename has one winner; what was moved is held against what was judged."""
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        age, text = time.time() - path.stat().st_mtime, path.read_text()
        if not _is_stale(text, age):
            return
        os.rename(path, aside)
    except FileNotFoundError:
        return
    if aside.read_text() != text:  # another rescuer was quicker, and this is its fresh lock: give it back
        os.link(aside, path)
    aside.unlink()


@contextmanager
def lock(path: str | Path, what: str) -> Iterator[None]:
    """Holds `path` as a lock for the time of the block. Raises LockedError naming the holder when it is taken."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    me = {
        "what": what, "pid": os.getpid(), "started": _started(os.getpid()), "machine": _machine(),
        "host": socket.gethostname(), "token": uuid.uuid4().hex,
    }
    if not _take(path, me):
        _remove_stale(path)
        if not _take(path, me):
            holder = path.read_text() if path.exists() else "{}"
            raise LockedError(
                f"{path} is held by another run: {holder}. Wait for it to end; a holder on another machine that is "
                f"gone is replaced {STALE_SECONDS:.0f} s after its last heartbeat."
            )
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(HEARTBEAT_SECONDS) and path.exists():
            os.utime(path)

    thread = threading.Thread(target=beat, name="lock-heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        path.unlink(missing_ok=True)

"""Files of an object store, kept on a node's own disk: fetched once for all processes, checked, bounded.

    <folder>/<sha256>.tar              whole and checked; the name is the content, so runs and stages share it
    <folder>/<sha256>.tar.9000.part    being fetched, 9000 bytes in the end, which count from the start
    <folder>/attempts/                 what this node's processes are making

Every process of the node may use the folder at once; the locks are those of the kernel (flock), which a process that
dies gives back. Who fetches a file holds its part, and all others wait for it there. Who reads a file holds it, and
what is held is never thrown out; of the rest the one that was used longest ago goes first. Where a file that somebody
wants to read finds no room beside what is being fetched, it waits: nothing is fetched ahead meanwhile, and what was
fetched ahead is held by nobody. Who waits holds no part, so that none wait for each other.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from ldm.storage import StorageError, StoredFile, get_file, place, sha256_file

PART = ".part"
ATTEMPTS, LOCK, WAITING = "attempts", "lock", "waiting"
POLL_SECONDS = 0.05  # between looks at a part that another fetches
_last = threading.local()  # .held: what keeps the file that a thread asked for last from being thrown out


class DamagedFile(StorageError):
    """What an object store holds is not what its record says."""


@dataclass(frozen=True)
class NodeCache:
    """Where a node keeps what it fetched from an object store, and how much of it."""

    folder: str | None  # on a disk of the node's own; null: one of this user's below the system's temporary folder
    max_bytes: int  # of fetched files; what training reads at once must fit

    def root(self) -> Path:
        """The folder, made if need be, open to this user alone."""
        path = Path(self.folder or Path(tempfile.gettempdir()) / f"ldm-cache-{os.getuid()}")
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        if path.stat().st_uid != os.getuid():
            raise StorageError(f"{path} belongs to another user; set cluster.cache.folder to a folder of your own")
        (path / ATTEMPTS).mkdir(exist_ok=True)
        return path

    @contextmanager
    def file(self, stored: StoredFile) -> Iterator[Path]:
        """A path on this node that holds the file, for the time of the block. Raises DamagedFile naming it."""
        path = self._path(stored)
        while (handle := _hold(path, stored.bytes)) is None:
            if not self._fetch(stored, path):
                with self._waiting():
                    while not self._fetch(stored, path):
                        time.sleep(POLL_SECONDS)
        try:
            yield path
        finally:
            os.close(handle)

    def fetch(self, stored: StoredFile) -> Path:
        """A path on this node that holds the file, until this thread asks for the next one: time enough to open it."""
        held = ExitStack()
        path = held.enter_context(self.file(stored))
        if hasattr(_last, "held"):
            _last.held.close()
        _last.held = held
        return path

    def ahead(self, stored: StoredFile) -> None:
        """Fetches a file that nobody waits for yet, if there is room for it and nobody waits for room."""
        path = self._path(stored)
        if not path.exists():
            self._fetch(stored, path, ahead=True)

    def _path(self, stored: StoredFile) -> Path:
        return self.root() / f"{stored.sha256}{Path(stored.place).suffix}"

    # -- fetching -----------------------------------------------------------------------------------------------------
    def _fetch(self, stored: StoredFile, path: Path, ahead: bool = False) -> bool:
        """Fetches a file unless another process has done so meanwhile. False: there is no room for it as yet."""
        part = path.with_name(f"{path.name}.{stored.bytes}{PART}")
        handle = _own(part)
        try:
            if path.exists():
                part.unlink()
                return True
            if not self._make_room(stored, part, ahead):
                return False
            _download(stored, part)
            with self._alone():
                os.replace(part, path)
                fcntl.flock(handle, fcntl.LOCK_UN)  # who looks for room finds it held by nobody
            return True
        except BaseException:
            if _is_at(handle, part):
                part.unlink()
            raise
        finally:
            os.close(handle)

    def _make_room(self, stored: StoredFile, part: Path, ahead: bool) -> bool:
        """Throws out what was used longest ago until the file fits; where it does not, gives up its part.

        False: there may be room later, when others have fetched what they are fetching. Raises StorageError where
        there is none for somebody who waits and none is to come.
        """
        with self._alone():
            gives_way = ahead and self._somebody_waits()
            found = sorted(entry for entry in _entries(self.root()) if entry[2] != part)
            used, under_way = sum(size for _, size, _ in found), False
            for _, size, path in [] if gives_way else found:
                if used + stored.bytes <= self.max_bytes:
                    break
                if _throw_out(path):
                    used -= size
                else:
                    under_way |= path.suffix == PART
            if used + stored.bytes <= self.max_bytes and not gives_way:
                return True
            part.unlink()
        if ahead or under_way:
            return False
        raise StorageError(
            f"{stored.place} has {stored.bytes} bytes and finds no room in {self.root()}, where {used} bytes are "
            f"in use; cluster.cache.max_bytes={self.max_bytes} must be at least {used + stored.bytes}"
        )

    def _waiting(self) -> AbstractContextManager[None]:
        """Says, for the time of the block, that somebody waits for room."""
        return _locked(self.root() / WAITING, fcntl.LOCK_SH)

    def _somebody_waits(self) -> bool:
        path = self.root() / WAITING
        if not path.exists():
            return False
        handle = _try_lock(path)
        if handle is not None:
            os.close(handle)
        return handle is None

    # -- scratch ------------------------------------------------------------------------------------------------------
    @contextmanager
    def scratch(self, label: str) -> Iterator[Path]:
        """A folder of the node's own for the time of the block; those of processes that died are removed before."""
        path = self.root() / ATTEMPTS / f"{label}-{uuid.uuid4().hex}"
        with self._alone():
            for left in path.parent.iterdir():
                if (abandoned := _try_lock(left)) is not None:
                    shutil.rmtree(left)
                    os.close(abandoned)
            path.mkdir()
            handle = _try_lock(path)
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)
            if handle is not None:
                os.close(handle)

    def _alone(self) -> AbstractContextManager[None]:
        """No other process changes what the folder holds, but for parts that grow into files."""
        return _locked(self.root() / LOCK, fcntl.LOCK_EX)


@contextmanager
def _locked(path: Path, kind: int) -> Iterator[None]:
    """A file's lock, waited for and held for the time of the block."""
    handle = os.open(path, os.O_CREAT | os.O_RDWR, 0o600)
    try:
        fcntl.flock(handle, kind)
        yield
    finally:
        os.close(handle)


def _download(stored: StoredFile, part: Path) -> None:
    """Fetches and checks; what arrives otherwise than its record says is fetched once more, then refused by name."""
    for _ in range(2):
        get_file(place(stored.place), part)
        found = sha256_file(part)
        if found == stored.sha256:
            return
    raise DamagedFile(
        f"{stored.place} arrived twice with sha256 {found[:12]} and {part.stat().st_size} bytes, expected "
        f"{stored.sha256[:12]} and {stored.bytes} as its record says; remove its record to have it made again"
    )


def _hold(path: Path, size: int) -> int | None:
    """An open file that nobody throws out while it is open; None when it is not there, or not whole."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    fcntl.flock(handle, fcntl.LOCK_SH)
    found = os.fstat(handle)
    if found.st_nlink and found.st_size == size:
        os.utime(handle)  # used just now
        return handle
    if found.st_nlink:
        path.unlink(missing_ok=True)
    os.close(handle)
    return None


def _own(part: Path) -> int:
    """Opens a part and waits until nobody else has it.

    What was renamed or removed meanwhile is no part any more. Its lock is not waited for: those who read the file that
    it became share that lock, and may do so for hours.
    """
    while True:
        handle = os.open(part, os.O_CREAT | os.O_RDWR, 0o600)
        while _is_at(handle, part):
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(POLL_SECONDS)
                continue
            if _is_at(handle, part):
                return handle
        os.close(handle)


def _is_at(handle: int, path: Path) -> bool:
    """Whether an open file is still the one at a path."""
    try:
        return path.stat().st_ino == os.fstat(handle).st_ino
    except FileNotFoundError:
        return False


def _try_lock(path: Path) -> int | None:
    """A lock on a file or folder, or None when somebody has it or it is gone."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        return None
    return handle


def _throw_out(path: Path) -> bool:
    """Removes a file that nobody holds."""
    handle = _try_lock(path)
    if handle is None:
        return not path.exists()
    path.unlink(missing_ok=True)
    os.close(handle)
    return True


def _entries(folder: Path) -> Iterator[tuple[int, int, Path]]:
    """(when it was used last, bytes, path) of every fetched file and of every one that is being fetched."""
    for path in folder.iterdir():
        try:
            found = path.stat()
        except FileNotFoundError:  # a fetch that failed
            continue
        if path.suffix == PART:
            yield found.st_mtime_ns, int(path.suffixes[-2][1:]), path
        elif path.name not in (ATTEMPTS, LOCK, WAITING):
            yield found.st_mtime_ns, found.st_size, path

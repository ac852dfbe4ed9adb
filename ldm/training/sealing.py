"""Files and folders that last through a power cut, and the marker that makes a folder a checkpoint."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ldm.crash import crash_point
from ldm.storage import sha256_file


def seal(path: Path) -> dict[str, Any]:
    """Syncs a file and returns its size and hash.

    The hash is of what the system gives back, which is mostly its own memory: what a disk does to the bytes is found
    when they are read again, as every start does.
    """
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    return {"bytes": path.stat().st_size, "sha256": sha256_file(path)}


def write_json(path: Path, value: Any) -> dict[str, Any]:
    path.write_text(json.dumps(value, sort_keys=True, indent=1, ensure_ascii=False) + "\n")
    return seal(path)


def sync_folder(path: Path) -> None:
    """Makes the names in a folder last."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def adopt(temporary: Path, final: Path, sha256: str) -> None:
    """Makes a checkpoint of a folder that is whole; `sha256` is its manifest's."""
    sync_folder(temporary)
    crash_point("checkpoint_before_rename")
    os.rename(temporary, final)
    sync_folder(final.parent)
    crash_point("checkpoint_after_rename")
    mark(final, sha256)


def mark(final: Path, sha256: str) -> None:
    """Writes COMMITTED."""
    # Under another name first, so that COMMITTED is never there with half of its line.
    (final / "COMMITTED.tmp").write_text(sha256)
    seal(final / "COMMITTED.tmp")
    crash_point("checkpoint_before_committed")
    os.rename(final / "COMMITTED.tmp", final / "COMMITTED")
    sync_folder(final)
    crash_point("checkpoint_after_committed")

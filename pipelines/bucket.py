"""A stage's folder on an object store: the same names, the same promises; put is the atomic step there.

An attempt is made in a folder of the node's own. Its data files are put under their final names, then its record, whose
existence means done; nothing is ever renamed. What is read comes through the node's cache and is held against the
record's sha256 on arrival.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import Any

from ldm import storage
from ldm.node_cache import DamagedFile, NodeCache
from ldm.storage import BadAnswer, StoredFile, is_remote, place
from pipelines.manifest import Attempt, Record, StageFolder, attempt_label, sha256_bytes


class Bucket(StageFolder):
    """The folder of one stage of one run, on an object store."""

    def __init__(self, path: Any, stage: str, cache: NodeCache) -> None:
        self.path, self.stage, self.cache = place(path), stage, cache

    # -- writing -----------------------------------------------------------------------------------------------------
    @contextmanager
    def attempt(self, shard: int | None, fingerprint: str) -> Iterator[Attempt]:
        with self.cache.scratch(attempt_label(shard)) as path:
            yield Attempt(self, shard, fingerprint, path)

    def publish(self, staging: Path, names: list[str]) -> None:
        for name in names:
            storage.put_file(staging / name, self.path / name)

    def sweep(self) -> int:
        return storage.abort_uploads(self.path)

    def clear(self, shards: list[int | None] | None = None) -> None:
        storage.remove([self.path / "manifest.parquet"])
        self.forget(shards or [])
        if shards is None:  # records first
            names = sorted(storage.sizes(self.path), key=lambda name: not name.endswith(".json"))
            storage.remove([self.path / name for name in names if name != "lock"])

    def forget(self, shards: list[int | None]) -> None:
        storage.remove([self.record_path(shard) for shard in shards])

    # -- reading -----------------------------------------------------------------------------------------------------
    def shards(self) -> list[int]:
        names = (Path(name) for name in storage.sizes(self.path) if "/" not in name)
        return sorted(int(name.stem) for name in names if name.suffix == ".json" and name.stem.isdigit())

    def record_files(self) -> dict[int, bytes]:
        shards = self.shards()
        return dict(zip(shards, storage.read_many([self.record_path(shard) for shard in shards]), strict=True))

    def missing_files(self, records: Iterable[Record]) -> dict[int | None, list[str]]:
        there = storage.sizes(self.path)
        return {record.shard: wrong for record in records
                if (wrong := [name for name, info in record.files.items() if there.get(name) != info["bytes"]])}

    def data(self, name: str) -> Path:
        return self.cache.fetch(self.stored(name))

    def readable(self, name: str) -> BytesIO:
        """What is read once would only push out of the node's cache what is read again."""
        stored = self.stored(name)
        data = storage.read(stored.place)
        if (found := sha256_bytes(data)) != stored.sha256:
            raise DamagedFile(
                f"{stored.place} has sha256 {found[:12]}, expected {stored.sha256[:12]} as its record says; find out "
                f"what else is damaged with: python -m pipelines.verify path={self.path}"
            )
        return BytesIO(data)

    @contextmanager
    def as_it_lies(self, record: Record) -> Iterator[Path]:
        """Fetched anew: what the node keeps is what it found sound once."""
        with self.cache.scratch(attempt_label(record.shard)) as copy:
            for name in record.files:
                if not (copy / name).resolve().is_relative_to(copy.resolve()):
                    continue  # anybody may have written the record
                (copy / name).parent.mkdir(parents=True, exist_ok=True)
                with suppress(FileNotFoundError, BadAnswer):  # what is absent or cut off is for the caller to see
                    storage.get_file(self.path / name, copy / name)
            yield copy

    def stored(self, name: str, record: Record | None = None) -> StoredFile:
        """A data file as its record describes it. Raises FileNotFoundError when no record does."""
        shard = int(Path(name).stem) if Path(name).stem.isdigit() else None
        record = record or self.record(shard)
        if record is None or name not in record.files:
            raise FileNotFoundError(f"{self.path / name}: no record names it; run +stage={self.stage} first")
        info = record.files[name]
        return StoredFile(str(self.path / name), info["bytes"], info["sha256"])


def stage_folder(path: Any, stage: str, cache: NodeCache) -> StageFolder:
    """A stage's folder, wherever it lies."""
    return Bucket(path, stage, cache) if is_remote(path) else StageFolder(path, stage)


def folder_at(path: Any, stage: str) -> StageFolder:
    """A stage's folder for commands that are given a path and no configuration."""
    return Bucket(path, stage, _own_cache()) if is_remote(path) else StageFolder(path, stage)


@cache
def _own_cache() -> NodeCache:
    """The cache of a machine on its own; TMPDIR says where it lies."""
    from pipelines.config import read_option

    return read_option("cluster", "local").cache


def homes_below(path: Any, signs: tuple[str, ...]) -> list[Any]:
    """The folders one or two levels below a path that hold a file of one of these names, in order."""
    if is_remote(path):
        names = [PurePosixPath(name) for name in storage.sizes(path)]
        return sorted({path / str(name.parent) for name in names if name.name in signs and len(name.parts) in (2, 3)})
    return sorted({found.parent for sign in signs for depth in ("*", "*/*") for found in path.glob(f"{depth}/{sign}")})

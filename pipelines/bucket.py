"""A stage's folder on an object store: the same names, the same promises; put is the atomic step there.

An attempt is made in a folder of the node's own. Its data files are put under their final names, then its record, whose
existence means done; nothing is ever renamed. What is read comes through the node's cache and is held against the
record's sha256 on arrival.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ldm import storage
from ldm.node_cache import NodeCache
from ldm.storage import StoredFile, is_remote, place
from pipelines.manifest import Attempt, Record, StageFolder, attempt_label, parse_record


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

    def clear(self, shards: list[int] | None = None) -> None:
        storage.remove([self.path / "manifest.parquet"])
        names = [self.record_path(shard).name for shard in shards or ()]
        if shards is None:  # records first
            names = sorted(storage.sizes(self.path), key=lambda name: not name.endswith(".json"))
        storage.remove([self.path / name for name in names if name != "lock"])

    # -- reading -----------------------------------------------------------------------------------------------------
    def committed(self) -> dict[int, Record]:
        names = (Path(name) for name in storage.sizes(self.path) if "/" not in name)
        shards = sorted(int(name.stem) for name in names if name.suffix == ".json" and name.stem.isdigit())
        paths = [self.record_path(shard) for shard in shards]
        found = zip(shards, paths, storage.read_many(paths), strict=True)
        return {shard: parse_record(data, path) for shard, path, data in found}

    def missing_files(self, records: Iterable[Record]) -> dict[int | None, list[str]]:
        there = storage.sizes(self.path)
        return {record.shard: wrong for record in records
                if (wrong := [name for name, info in record.files.items() if there.get(name) != info["bytes"]])}

    def data(self, name: str) -> Path:
        return self.cache.fetch(self.stored(name))

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

"""The metadata files, wherever they lie: which there are, and each of them in turn on this machine as parquet.

Files on S3 are fetched one after the other, the next one while one is read, and are gone when they have been read: two
of them at most lie on disk, however many there are. Tab-separated files become parquet in the same way.
"""

from __future__ import annotations

import glob
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from ldm import storage
from ldm.storage import is_remote, place
from pipelines.metadata.tab_separated import as_parquet
from pipelines.settings import SourceConfig


class SourceFile(NamedTuple):
    name: str  # its path or address, as the manifest lists it
    path: Path  # of it, or of a copy that is soon gone, as parquet on this machine


def listed(source: SourceConfig) -> dict[str, int]:
    """Bytes of every file that the settings name, by its path or address, in order. Raises where there is none."""
    if source.format not in ("parquet", "tsv"):
        raise ValueError(f"dataset.source.format={source.format}; expected parquet or tsv")
    if is_remote(source.metadata):
        storage.check(place(source.metadata), "dataset.source.metadata")
        files = storage.matching(source.metadata)
    else:
        files = {file: Path(file).stat().st_size for file in sorted(glob.glob(source.metadata))}
    if not files:
        raise FileNotFoundError(
            f"no metadata at dataset.source.metadata={source.metadata} (a path or a glob of {source.format} files)"
        )
    return files


def at_hand(files: dict[str, int], tsv_columns: dict[str, str] | None, scratch: Path) -> Iterator[SourceFile]:
    """The files in turn, tab-separated ones as parquet with these columns; a copy lasts until the next is asked for."""
    with ThreadPoolExecutor(1) as ahead:
        coming = deque[Future[SourceFile]]()
        for number, (name, size) in enumerate(files.items()):
            coming.append(ahead.submit(_bring, name, size, tsv_columns, scratch / f"{number}.parquet"))
            if number:
                yield from _until_read(coming.popleft().result(), scratch)
        yield from _until_read(coming.popleft().result(), scratch)


def _until_read(file: SourceFile, scratch: Path) -> Iterator[SourceFile]:
    yield file
    if file.path.is_relative_to(scratch):
        file.path.unlink()


def _bring(name: str, size: int, tsv_columns: dict[str, str] | None, copy: Path) -> SourceFile:
    """A file itself where it is parquet on this machine, else a copy of it."""
    path = Path(name)
    if is_remote(name):
        path = copy.with_suffix(".fetched")
        storage.get_file(place(name), path)
        if (fetched := path.stat().st_size) != size:
            raise ValueError(
                f"{name} has {fetched} bytes, expected {size} as it was listed: somebody is writing it; give the same "
                f"command once it is whole"
            )
    if tsv_columns is None:
        return SourceFile(name, path)
    as_parquet(path, copy, tsv_columns)
    if is_remote(name):
        path.unlink()
    return SourceFile(name, copy)

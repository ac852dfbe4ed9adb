"""What is done, and what it was made from: records, plans, manifests, and the writes that make them whole.

The disk is the truth. A stage's folder holds

    plan.json          fingerprint, settings and number of planned shards; written first
    000042.tar ...     data files of shard 42, under their final names only when whole
    000042.json        the record of shard 42; written last, so its existence means done
    manifest.parquet   one row for each shard; written when every planned shard has a record
    run.json           when, where and by which code: everything that inputs do not decide

A data file is written in a staging folder that is unique to the attempt, synced, hashed and renamed; its record
follows in the same way. Whatever a crash leaves behind lies in `.attempts/` and is swept by the next lock holder.
On an object store all this is the business of pipelines/bucket.py.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

from ldm.crash import crash_point
from ldm.node_cache import NodeCache
from ldm.storage import StoredFile, is_remote, place, put, read, sha256_file

FORMAT = 1
ATTEMPTS = ".attempts"
SEAL = "seal"  # of a record's file; records of earlier versions have none


class StaleError(RuntimeError):
    """What lies in a stage's folder was made from something else than is asked for; `shards` says which (None: all)."""

    def __init__(self, message: str, folder: StageFolder, shards: list[int] | None = None) -> None:
        super().__init__(message)
        self.folder, self.shards = folder, shards


def canonical(value: Any) -> bytes:
    """JSON with sorted keys and no spaces: equal values give equal bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def sha256_bytes(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def fsync_folder(path: str | Path) -> None:
    """Makes the renames in a folder last through a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def fsync_file(path: str | Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def write_whole(path: str | Path, data: bytes) -> None:
    """Writes a file so that a reader sees all of it or nothing, whatever happens in between."""
    if is_remote(path):
        return put(place(path), data)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync_folder(path.parent)


def write_json(path: str | Path, value: Any) -> None:
    write_whole(path, json.dumps(value, sort_keys=True, indent=1, ensure_ascii=False).encode() + b"\n")


def read_json(path: str | Path) -> Any:
    """Raises ValueError naming the file when it does not hold JSON: nothing half-written is taken for whole."""
    return parse_json(read(path), path)


def parse_json(data: bytes, path: str | Path) -> Any:
    """The JSON that was read from a file, whose name an error tells."""
    try:
        return json.loads(data)
    except ValueError as error:
        raise ValueError(f"{path} does not hold JSON ({error}); remove it to have it made again") from error


def check_format(value: dict[str, Any], path: str | Path) -> dict[str, Any]:
    if value.get("format") != FORMAT:
        raise ValueError(f"{path} has format {value.get('format')!r}; this version reads format {FORMAT}")
    return value


def fingerprint(stage: str, version: int, what: dict[str, Any], reads: dict[str, str]) -> str:
    """Identity of what a stage makes: its name and version, the settings that decide it, the fingerprints it reads."""
    return sha256_bytes(canonical({"stage": stage, "version": version, "what": what, "reads": reads}))


def shard_name(shard: int) -> str:
    """Six digits: billions of rows in shards of ten thousand."""
    return f"{shard:06d}"


@dataclass(frozen=True)
class Record:
    """What is known of a finished shard, or of a finished stage that has no shards (then `shard` is None)."""

    stage: str
    shard: int | None
    fingerprint: str
    rows: int  # samples that came in
    samples: int  # samples that went out
    dropped: dict[str, int]  # samples that did not, by reason
    files: dict[str, dict[str, Any]]  # name in the stage's folder -> {bytes, sha256}
    inputs: dict[str, str]  # "download/000042" -> digest that was read
    facts: dict[str, Any] = field(default_factory=dict)  # what else the inputs decide: sizes, scores, counts
    format: int = FORMAT

    def __post_init__(self) -> None:
        lost = self.rows - self.samples - sum(self.dropped.values())
        if lost:
            raise ValueError(
                f"{self.stage} shard {self.shard}: {self.rows} rows came in, {self.samples} went out and "
                f"{sum(self.dropped.values())} were dropped {self.dropped}: {lost} unaccounted for"
            )

    @property
    def digest(self) -> str:
        """sha256 over the hashes of the data files: what was actually written."""
        return sha256_bytes(canonical({name: info["sha256"] for name, info in self.files.items()}))

    @property
    def bytes(self) -> int:
        return sum(info["bytes"] for info in self.files.values())


def seal_of(value: dict[str, Any]) -> str:
    """What a record's seal must be: a hash of all the rest of it, so that no figure in it can change unseen."""
    return sha256_bytes(canonical(json.loads(canonical(value))))


def read_record(path: str | Path) -> Record | None:
    """The record in a file, or None when there is none. Raises ValueError for a file that is not a record."""
    try:
        data = read(path)
    except FileNotFoundError:
        return None
    return parse_record(data, path)


def parse_record(data: bytes, path: str | Path) -> Record:
    """The record that was read from a file, held against its seal."""
    value = check_format(parse_json(data, path), path)
    seal, expected = value.pop(SEAL, None), seal_of(value)
    if seal is not None and seal != expected:
        raise ValueError(
            f"{path} was altered after it was written: its seal is {str(seal)[:12]}, expected {expected[:12]}; "
            f"remove it to have it made again"
        )
    try:
        return Record(**value)
    except TypeError as error:
        raise ValueError(f"{path} is not a record of format {FORMAT}: {error}") from error


def attempt_label(shard: int | None) -> str:
    """What the name of an attempt's staging folder begins with."""
    return "stage" if shard is None else shard_name(shard)


class Attempt:
    """One try at a shard: files go to `path`, and `commit` makes them the shard's."""

    def __init__(self, folder: StageFolder, shard: int | None, fingerprint: str, path: Path) -> None:
        self.folder, self.shard, self.fingerprint, self.path = folder, shard, fingerprint, path

    def commit(
        self,
        *,
        rows: int,
        samples: int,
        dropped: dict[str, int],
        inputs: dict[str, str],
        facts: dict[str, Any] | None = None,
        keep: dict[str, dict[str, Any]] | None = None,
    ) -> Record:
        """Hashes every file of the attempt and puts it in its place, then writes the record.

        `keep` names files that are already in place (checkpoints, say) and belong to the record.
        Raises ValueError when rows in are not rows out plus rows dropped; OSError when the disk is full.
        """
        names = sorted(str(p.relative_to(self.path)) for p in self.path.rglob("*") if p.is_file())
        files = dict(keep or {})
        for name in names:
            files[name] = {"bytes": (self.path / name).stat().st_size, "sha256": sha256_file(self.path / name)}
        record = Record(
            stage=self.folder.stage,
            shard=self.shard,
            fingerprint=self.fingerprint,
            rows=rows,
            samples=samples,
            dropped=dict(sorted(dropped.items())),
            files=files,
            inputs=inputs,
            facts=facts or {},
        )
        crash_point("before_rename")
        self.folder.publish(self.path, names)
        crash_point("before_record")
        value = asdict(record)
        write_json(self.folder.record_path(self.shard), {**value, SEAL: seal_of(value)})
        crash_point("after_record")
        return record


class StageFolder:
    """The folder of one stage of one run."""

    cache: NodeCache | None = None  # of the node, where the folder lies on an object store

    def __init__(self, path: str | Path, stage: str) -> None:
        self.path, self.stage = Path(path), stage

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    # -- plan ----------------------------------------------------------------------------------------------------
    def read_plan(self) -> dict[str, Any] | None:
        path = self.path / "plan.json"
        try:
            return check_format(read_json(path), path)
        except FileNotFoundError:
            return None

    def write_plan(self, plan: dict[str, Any]) -> None:
        write_json(self.path / "plan.json", {"format": FORMAT, **plan})

    # -- records -------------------------------------------------------------------------------------------------
    def record_path(self, shard: int | None) -> Path:
        return self.path / ("record.json" if shard is None else f"{shard_name(shard)}.json")

    def record(self, shard: int | None = None) -> Record | None:
        return read_record(self.record_path(shard))

    def committed(self) -> dict[int, Record]:
        """Every shard's record, in shard order. Raises ValueError naming a file that is none."""
        return {shard: parse_record(data, self.record_path(shard)) for shard, data in self.record_files().items()}

    def shards(self) -> list[int]:
        """The shards that have a record, sound or not, in order."""
        return sorted(int(path.stem) for path in self.path.glob("[0-9]*.json"))

    def record_files(self) -> dict[int, bytes]:
        """What lies where the shards' records should, sound or not, in shard order."""
        found = {}
        for shard in self.shards():
            with suppress(FileNotFoundError):
                found[shard] = self.record_path(shard).read_bytes()
        return found

    def missing_files(self, records: Iterable[Record]) -> dict[int | None, list[str]]:
        """By shard, the files that its record names and that are absent or have another size; hashes are for verify."""
        return {record.shard: wrong for record in records
                if (wrong := [name for name, info in record.files.items() if self._size(name) != info["bytes"]])}

    def _size(self, name: str) -> int | None:
        path = self.path / name
        return path.stat().st_size if path.is_file() else None

    def data(self, name: str) -> Path:
        """A committed data file on this machine, to be opened now."""
        return self.path / name

    def readable(self, name: str) -> Path | BytesIO:
        """A committed data file that is read once, as pyarrow takes it: where it lies, or what it holds."""
        return self.path / name

    def stored(self, name: str, record: Record) -> StoredFile | None:
        """What has to be fetched before a data file can be read; None: nothing."""
        return None

    @contextmanager
    def as_it_lies(self, record: Record) -> Iterator[Path]:
        """A folder on this machine with the data files of a record just as they lie now, damaged or not."""
        yield self.path

    @contextmanager
    def attempt(self, shard: int | None, fingerprint: str) -> Iterator[Attempt]:
        """A staging folder on the same file system, unique to this try, gone afterwards."""
        path = self.path / ATTEMPTS / f"{attempt_label(shard)}-{uuid.uuid4().hex}"
        path.mkdir(parents=True)
        try:
            yield Attempt(self, shard, fingerprint, path)
        finally:
            shutil.rmtree(path, ignore_errors=True)

    def publish(self, staging: Path, names: list[str]) -> None:
        """Syncs files of a staging folder and gives them their final names."""
        for name in names:
            fsync_file(staging / name)
        for name in names:
            target = self.path / name
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(staging / name, target)
            fsync_folder(target.parent)

    def sweep(self) -> int:
        """Removes what crashed attempts left; call it only while holding the stage's lock. Returns how many."""
        orphans = list((self.path / ATTEMPTS).glob("*")) + list(self.path.glob(".*.tmp"))
        for path in orphans:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        return len(orphans)

    def clear(self, shards: list[int | None] | None = None) -> None:
        """Removes the given shards, or everything; only ever called for `overwrite=true`. Records go first."""
        (self.path / "manifest.parquet").unlink(missing_ok=True)
        self.forget(shards or [])
        for path in self.path.glob("*") if shards is None else ():
            if path.name != "lock":
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def forget(self, shards: list[int | None]) -> None:
        """Removes the records of shards, which makes them undone."""
        for shard in shards:
            self.record_path(shard).unlink(missing_ok=True)

    # -- manifest ------------------------------------------------------------------------------------------------
    def close(
        self, fingerprint: str, records: list[Record], funnel: dict[str, Any], *,
        editions: dict[int, int] | None = None, sources: list[dict[str, Any]] | None = None,
    ) -> str:  # fmt: skip
        """Writes manifest.parquet: one row for each shard, the funnel as metadata. Returns the newest edition's digest.

        `editions` says with which edition a shard came (1 where it says nothing), `sources` what files were read.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        rows = [
            {
                "shard": record.shard,
                "digest": record.digest,
                "samples": record.samples,
                "rows": record.rows,
                "bytes": record.bytes,
                "dropped": canonical(record.dropped).decode(),
                "edition": (editions or {}).get(record.shard or 0, 1),
            }
            for record in records
        ]
        edition = max((row["edition"] for row in rows), default=1)
        digest = edition_digest([record.digest for record in records])
        metadata = {"format": FORMAT, "stage": self.stage, "fingerprint": fingerprint, "edition": edition,
                    "digest": digest, "funnel": funnel, "sources": sources or []}
        table = pa.Table.from_pylist(rows, schema=_manifest_schema().with_metadata({"ldm": canonical(metadata)}))
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd")
        write_whole(self.path / "manifest.parquet", sink.getvalue().to_pybytes())
        return digest

    def manifest(self) -> dict[str, Any] | None:
        """The closed manifest: {fingerprint, edition, digest, funnel, shards: [row, ...]}, or None while it is open."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        path = self.path / "manifest.parquet"
        try:
            # In this thread alone: Arrow's threads may drop the last hold of a Python buffer while the interpreter
            # ends, and that aborts the process ("terminate called without an active exception").
            table = pq.ParquetFile(pa.BufferReader(read(path))).read(use_threads=False)
            metadata = json.loads(table.schema.metadata[b"ldm"])
        except FileNotFoundError:
            return None
        except (pa.ArrowInvalid, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is not a manifest ({error}); remove it and run the stage again") from error
        return {**check_format(metadata, path), "shards": table.to_pylist()}


def _manifest_schema() -> Any:
    import pyarrow as pa

    integers = ("shard", "samples", "rows", "bytes", "edition")
    names = ("shard", "digest", "samples", "rows", "bytes", "dropped", "edition")
    return pa.schema([(name, pa.int64() if name in integers else pa.string()) for name in names])


def edition_digests(manifest: dict[str, Any]) -> list[str]:
    """The digest of every edition that a manifest lists, the first edition first."""
    rows = manifest["shards"]
    return [edition_digest([row["digest"] for row in rows if row["edition"] <= edition])
            for edition in range(1, manifest["edition"] + 1)]


def edition_digest(digests: list[str]) -> str:
    """Identity of a closed list of shards, in shard order."""
    return sha256_bytes(canonical(digests))


def sum_funnel(records: list[Record]) -> dict[str, Any]:
    """{rows, samples, dropped by reason} over records; each adds up, so the sum does."""
    dropped: dict[str, int] = {}
    for record in records:
        for reason, count in record.dropped.items():
            dropped[reason] = dropped.get(reason, 0) + count
    return {
        "rows": sum(record.rows for record in records),
        "samples": sum(record.samples for record in records),
        "dropped": dict(sorted(dropped.items())),
    }

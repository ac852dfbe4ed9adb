"""What can be wrong with finished work: each check says where, what was found and what was expected.

A shard is sound when its record is as it was written, every file has the bytes and the sha256 that the record names,
and what lies in the files is what the stage promises: for latents every row of the index, every crc32, every array's
shape, dtype and finiteness, every caption. On an object store it is the bytes there that count, whatever the node keeps
of them. Nothing here imports torch but for a train folder's checkpoints.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ldm.shards import CONTEXT, INDEX_ROW, MIRRORED, CorruptSample, decode_array, iterate_tar, sample_members
from ldm.storage import exists
from pipelines.bucket import folder_at
from pipelines.manifest import (
    Record,
    StageFolder,
    edition_digest,
    fingerprint,
    parse_record,
    sha256_file,
    shard_name,
    sum_funnel,
)
from pipelines.quarantine import QUARANTINED

PLAN, MANIFEST = "plan.json", "manifest.parquet"


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong."""

    stage: str
    shard: int | None  # None: the stage's own files, or its one result
    file: str  # in the stage's folder
    sample: str  # key; empty where it is not about one sample
    found: str
    expected: str

    def __str__(self) -> str:
        where = self.stage if self.shard is None else f"{self.stage} shard {shard_name(self.shard)}"
        sample = f", sample {self.sample}" if self.sample else ""
        return f"{where}, {self.file}{sample}: found {self.found}, expected {self.expected}"


@dataclass(frozen=True)
class Shard:
    """A shard to check, or with `number` None the one result of a stage; small enough to send to a process."""

    path: str  # the stage's folder, on disk or on an object store
    stage: str
    number: int | None
    plan: dict[str, Any]


def check_shard(shard: Shard) -> list[Finding]:
    """Everything that is wrong with one shard."""
    folder = folder_at(shard.path, shard.stage)
    name = folder.record_path(shard.number).name

    def finding(file: str, found: object, expected: object, sample: str = "") -> Finding:
        return Finding(shard.stage, shard.number, file, sample, str(found), str(expected))

    try:
        record = folder.record(shard.number)
    except ValueError as error:
        return [finding(name, f"no whole record ({error})", "the record as it was written")]
    if record is None:
        return [finding(name, "nothing", "a record")]
    known = {"stage": shard.stage, "shard": shard.number, "fingerprint": shard.plan["fingerprint"]}
    findings = [finding(name, f"{key} {getattr(record, key)!r}", f"{value!r}")
                for key, value in known.items() if getattr(record, key) != value]
    findings += [finding(name, f"{read} with digest {was[:12]}", f"{now[:12]}, which it has now")
                 for read, was, now in _changed_inputs(folder, record)]
    for file in _ungrouped(record):
        findings.append(finding(name, f"a file {file}", f"files of shard {shard_name(record.shard or 0)} only"))
    with folder.as_it_lies(record) as files:
        return findings + [finding(*problem) for problem in _content_problems(files, record, shard.plan)]


def _content_problems(files: Path, record: Record, plan: dict[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    """(file, found, expected, sample) of what is wrong with a shard's data files, which lie in a folder."""
    whole = True
    for file, info in record.files.items():
        for found, expected in _file_problems(files / file, info):
            yield file, found, expected, ""
            whole = whole and found != "nothing"
    content = CONTENT.get(plan["stage"])
    if whole and content is not None:
        yield from ((file, found, expected, key) for file, key, found, expected in content(files, record, plan))


def _changed_inputs(folder: StageFolder, record: Record) -> Iterator[tuple[str, str, str]]:
    """Inputs, as far as they lie beside the stage, that are not what the record was made from."""
    for read, digest in record.inputs.items():
        stage, _, shard = read.partition("/")
        if not shard:
            continue
        try:
            there = folder_at(folder.path.parent / stage, stage).record(int(shard))
        except ValueError:
            continue  # is found when that stage is checked
        if there is not None and there.digest != digest:
            yield read, digest, there.digest


def _ungrouped(record: Record) -> list[str]:
    """Files of a shard's record that bear another shard's name."""
    if record.shard is None:
        return []
    return [file for file in record.files if not Path(file).name.startswith(shard_name(record.shard))]


def _file_problems(path: Path, info: dict[str, Any]) -> Iterator[tuple[str, str]]:
    if not path.is_file():
        yield "nothing", f"{info['bytes']} bytes"
        return
    if (size := path.stat().st_size) != info["bytes"]:
        yield f"{size} bytes", f"{info['bytes']}"
    if (sha256 := sha256_file(path)) != info["sha256"]:
        yield f"sha256 {sha256[:12]}", info["sha256"][:12]


# -- what lies in the files ------------------------------------------------------------------------------------------
Problem = tuple[str, str, str, str]  # file, sample, found, expected


def latents(files: Path, record: Record, plan: dict[str, Any]) -> Iterator[Problem]:
    """Every sample of every tar of a latent shard, against its index, its crc32 and the autoencoder's shape."""
    pairs = [(file, file.removesuffix(".tar") + ".index") for file in record.files if file.endswith(".tar")]
    counts = record.facts.get("folders") or {str(Path(tar).parent): record.samples for tar, _ in pairs}
    for tar, index in pairs:
        samples = counts.get(str(Path(tar).parent))
        data = (files / index).read_bytes() if (files / index).is_file() else b""
        if samples is None or len(data) != samples * INDEX_ROW.itemsize:
            yield index, "", f"{len(data) / INDEX_ROW.itemsize:g} rows", f"{samples}"
        rows = np.frombuffer(data[: len(data) // INDEX_ROW.itemsize * INDEX_ROW.itemsize], INDEX_ROW)
        yield from _index_problems(index, rows, record)
        yield from _tar_problems(files / tar, tar, rows, _expected_arrays(plan, Path(tar).parent.name))


def _index_problems(index: str, rows: np.ndarray, record: Record) -> Iterator[Problem]:
    offset, last = 0, b""
    for row in rows:
        key = row["key"].decode(errors="replace")
        if row["key"] <= last or not key.startswith(shard_name(record.shard or 0)):
            yield index, key, "a key out of order or of another shard", f"one after {last.decode(errors='replace')}"
        if row["offset"] != offset:
            yield index, key, f"offset {row['offset']}", f"{offset}"
        offset, last = int(row["offset"]) + int(row["size"]), row["key"]


def _tar_problems(path: Path, tar: str, rows: np.ndarray, expected: dict[str, tuple[int, ...]]) -> Iterator[Problem]:
    end, whole = 0, path.stat().st_size
    with open(path, "rb") as file:
        for row in rows:
            key, end = row["key"].decode(errors="replace"), int(row["offset"]) + int(row["size"])
            file.seek(min(int(row["offset"]), whole))  # an index may lead anywhere
            data = file.read(int(row["size"]))
            if len(data) != row["size"]:
                yield tar, key, f"{len(data)} bytes", f"{row['size']}"
            elif (crc32 := zlib.crc32(data)) != row["crc32"]:
                yield tar, key, f"crc32 {crc32:08x}", f"{row['crc32']:08x}"
            else:
                yield from ((tar, key, *problem) for problem in _sample_problems(data, key, tar, expected))
        file.seek(min(end, whole))
        if rest := file.read().strip(b"\0"):
            yield tar, "", f"{len(rest)} bytes after its last sample", "none"


def _sample_problems(
    data: bytes, key: str, tar: str, expected: dict[str, tuple[int, ...]]
) -> Iterator[tuple[str, str]]:
    try:
        fields = dict(sample_members(data, key, tar))
        fields.get("txt", b"\xff").decode()
        arrays = {name: decode_array(value) for name, value in fields.items() if name.endswith(".npy")}
    except (CorruptSample, ValueError) as error:
        yield str(error), "a caption and arrays of plain numbers"
        return
    if arrays.keys() != expected.keys():
        yield f"members {', '.join(sorted(fields))}", f"txt, {', '.join(sorted(expected))}"
    for name, array in arrays.items():
        if name in expected and (array.shape != expected[name] or array.dtype != np.float16):
            yield f"{name} of shape {array.shape}, {array.dtype}", f"{expected[name]}, float16"
        elif not np.isfinite(array).all():
            yield f"{name} with {int((~np.isfinite(array)).sum())} numbers that are not finite", "none"


def _expected_arrays(plan: dict[str, Any], folder: str) -> dict[str, tuple[int, ...]]:
    """Member -> shape, of a sample in a folder named by a resolution, "256", or a height and width, "192x320"."""
    what = plan["what"]
    network, text = what["autoencoder.network"], what.get("text_encoder")
    kl, sides = network["posterior"] == "kl", [int(side) // network["factor"] for side in folder.split("x")]
    channels = network["latent_channels"] * (2 if kl else 1)
    members = {"moments.npy" if kl else "latent.npy": (channels, sides[0], sides[-1])}
    if what["dataset.precompute_latents"]["flip"]:
        members[MIRRORED] = (channels, sides[0], sides[-1])
    if text is not None:
        members[CONTEXT] = (text["length"], text["width"])
    return members


def pictures(files: Path, record: Record, plan: dict[str, Any]) -> Iterator[Problem]:
    """The samples of a tar of downloaded pictures."""
    for tar in (file for file in record.files if file.endswith(".tar")):
        try:
            keys = [key for key, _ in iterate_tar(files / tar)]
        except (CorruptSample, OSError) as error:
            yield tar, "", str(error), "a tar of plain files"
            continue
        if len(keys) != record.samples:
            yield tar, "", f"{len(keys)} samples", f"{record.samples}"


def rows_of_parquet(files: Path, record: Record, plan: dict[str, Any]) -> Iterator[Problem]:
    """The rows of a shard of metadata or of verdicts."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    judged = record.rows - record.dropped.get(QUARANTINED, 0)
    expected = judged if record.stage == "filter_images" else record.samples
    name = f"{shard_name(record.shard or 0)}.parquet"
    try:
        found = pq.read_table(files / name).num_rows
    except (pa.ArrowInvalid, OSError) as error:
        yield name, "", str(error), "a parquet file"
        return
    if found != expected:
        yield name, "", f"{found} rows", f"{expected}"


def checkpoints(files: Path, record: Record, plan: dict[str, Any]) -> Iterator[Problem]:
    """Every checkpoint that a training run keeps, by the hashes of its own manifest."""
    from ldm.training.checkpoint import problems

    for path in sorted(files.glob("step-*")):
        for problem in problems(path):
            yield path.name, "", problem, "a whole checkpoint"


CONTENT: dict[str, Callable[[Path, Record, dict[str, Any]], Iterator[Problem]]] = {
    "filter_metadata": rows_of_parquet,
    "download": pictures,
    "filter_images": rows_of_parquet,
    "precompute_latents": latents,
    "train": checkpoints,
}


# -- plan and manifest -----------------------------------------------------------------------------------------------
def check_stage(folder: StageFolder, plan: dict[str, Any]) -> list[Finding]:
    """What is wrong with a stage's plan, or with its manifest as held against the records beside it."""
    stage, findings = folder.stage, []
    expected = fingerprint(plan["stage"], plan["version"], plan["what"], plan["reads"])
    if plan["fingerprint"] != expected:
        found = f"fingerprint {plan['fingerprint'][:12]}"
        findings.append(Finding(stage, None, PLAN, "", found, f"{expected[:12]} by what it says"))
    try:
        manifest = folder.manifest()
    except ValueError as error:
        return [*findings, Finding(stage, None, MANIFEST, "", str(error), "a manifest")]
    if manifest is None:
        return findings
    listed = {row["shard"] for row in manifest["shards"]}  # others belong to an edition that is being made
    records = {shard: record for shard, record in readable_records(folder).items() if shard in listed}
    known: dict[str, Any] = {"fingerprint": plan["fingerprint"], "stage": stage}
    if len(records) == len(listed):
        known["digest"] = edition_digest([record.digest for record in records.values()])
        if records and stage != "filter_metadata":  # whose funnel counts rows that came to no shard
            known["funnel"] = json.loads(json.dumps(sum_funnel(list(records.values()))))
    findings += [Finding(stage, None, MANIFEST, "", f"{key} {manifest[key]!r}", f"{value!r}")
                 for key, value in known.items() if manifest[key] != value]
    return findings + _row_findings(stage, manifest["shards"], records)


def _row_findings(stage: str, rows: list[dict[str, Any]], records: dict[int, Record]) -> list[Finding]:
    findings = []
    for row in rows:
        record = records.get(row["shard"])
        if record is None:
            continue  # check_shard says what is wrong with it
        for key in ("digest", "samples", "rows", "bytes"):
            if row[key] != getattr(record, key):
                found, expected = f"{key} {getattr(record, key)!r}", f"{row[key]!r} as in {MANIFEST}"
                findings.append(Finding(stage, row["shard"], f"{shard_name(row['shard'])}.json", "", found, expected))
    return findings


def readable_records(folder: StageFolder) -> dict[int, Record]:
    """The records of a stage that are whole, by shard."""
    records = {}
    for shard, data in folder.record_files().items():
        try:
            records[shard] = parse_record(data, folder.record_path(shard))
        except ValueError:
            continue  # check_shard says what is wrong with it
    return records


def shards_of(folder: StageFolder) -> list[int | None]:
    """The shards that a stage has or, by its manifest, should have; [None] for a stage with one result."""
    numbers = set(folder.shards())
    try:
        manifest = folder.manifest()
    except ValueError:
        manifest = None
    if manifest is not None:
        numbers |= {row["shard"] for row in manifest["shards"]}
    if numbers or manifest is not None:
        return sorted(numbers)
    return [None] if exists(folder.record_path(None)) else []

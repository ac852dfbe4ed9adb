"""A sample's form on disk: webdataset tars, and beside each one an index for random access.

A shard of latents is a plain tar that any webdataset reader opens, samples in key order, fixed headers:

    000000042.moments.npy   000000042.txt   000000107.moments.npy   000000107.txt   ...

Its index `000042.index` is one fixed row for each sample: key, offset and size of the stretch of the tar that holds the
sample's members, and the crc32 of that stretch. The record holds the index's sha256, which is checked when the shard is
opened; a read is one `pread` of the stretch, checked against the crc32. So a flipped byte, a cut file or a swapped
shard raises CorruptSample and can never shorten an epoch silently. Nothing here unpickles, opens a URL, or follows a
link.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
import re
import weakref
import zlib
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np

from ldm.node_cache import NodeCache
from ldm.storage import StoredFile

INDEX_ROW = np.dtype([("key", "S24"), ("offset", "<u8"), ("size", "<u4"), ("crc32", "<u4")])
BLOCK = 512
MEMBER = re.compile(r"^(?P<key>[0-9]+)\.(?P<field>[a-z0-9_.]+)$")
# A version, the header's length, then a Python dict on one line, padded (NEP 1). Objects ("|O") are not plain numbers.
NPY_HEADER = re.compile(
    rb"\x93NUMPY(?:\x01\x00..|[\x02\x03]\x00....)"
    rb"\{'descr': '(?P<dtype>[<>|][biufc]\d+)', 'fortran_order': (?P<fortran>True|False), "
    rb"'shape': \((?P<shape>[\d, ]*)\), \} *\n",
    re.DOTALL,
)


class CorruptSample(RuntimeError):
    """A sample on disk is not what was written; the message names shard and key."""


@dataclass(frozen=True)
class ShardInfo:
    """What a reader needs to know of a shard."""

    tar: str
    index: str
    samples: int
    digest: str  # identity of the shard's content, from its record
    index_sha256: str  # of the index, from the record too: what binds the crc32 of every sample to it
    stored: tuple[StoredFile, ...] = ()  # tar and index on an object store, to be read through a node's cache


class ShardWriter:
    """Writes a tar and its index. Samples must come in key order; equal samples give equal bytes."""

    def __init__(self, tar: str | Path, index: str | Path) -> None:
        import webdataset as wds

        self.tar, self.index = Path(tar), Path(index)
        self.rows: list[tuple[bytes, int, int]] = []
        self.file = open(self.tar, "wb")
        self.writer = wds.TarWriter(self.file, encoder=False, mtime=0, user="", group="", mode=0o444)

    def write(self, key: str, fields: dict[str, bytes]) -> None:
        """Appends one sample: its fields by extension ("moments.npy", "txt")."""
        if self.rows and key.encode() <= self.rows[-1][0]:
            raise ValueError(f"samples must come in key order: {key} after {self.rows[-1][0].decode()}")
        start = self.writer.tarstream.offset
        self.writer.write({"__key__": key, **fields})
        self.rows.append((key.encode(), start, self.writer.tarstream.offset - start))

    def close(self) -> None:
        self.writer.close()
        self.file.close()
        rows = np.zeros(len(self.rows), INDEX_ROW)
        with open(self.tar, "rb") as file:
            for i, (key, offset, size) in enumerate(self.rows):
                rows[i] = (key, offset, size, zlib.crc32(os.pread(file.fileno(), size, offset)))
        self.index.write_bytes(rows.tobytes())


class ShardReader:
    """Random access to the samples of a shard, each read checked."""

    def __init__(self, info: ShardInfo) -> None:
        self.info = info
        self.rows = read_index(info)
        self.handle = os.open(info.tar, os.O_RDONLY)

    def __len__(self) -> int:
        return len(self.rows)

    def keys(self) -> list[str]:
        return [key.decode() for key in self.rows["key"]]

    def read(self, i: int) -> dict[str, bytes]:
        """The fields of sample i by extension. Raises CorruptSample when its bytes are not those that were written."""
        row = self.rows[i]
        data = os.pread(self.handle, int(row["size"]), int(row["offset"]))
        key = row["key"].decode()
        if len(data) != row["size"] or zlib.crc32(data) != row["crc32"]:
            raise CorruptSample(
                f"{self.info.tar}: sample {key} does not match its crc32 ({len(data)} of {row['size']} bytes read); "
                + self._way_out()
            )
        return dict(sample_members(data, key, self.info.tar))

    def _way_out(self) -> str:
        """What was fetched is a copy, which nobody shall read again; what lies on disk is all that there is."""
        if not self.info.stored:
            return f"make the shard again with: python -m pipelines.verify path={self.info.tar} repair=true"
        Path(self.info.tar).unlink(missing_ok=True)
        return f"this node's copy of {self.info.stored[0].place} is removed; start again, and it is fetched anew"

    def close(self) -> None:
        os.close(self.handle)


def read_index(info: ShardInfo, cache: NodeCache | None = None) -> np.ndarray:
    """The rows of a shard's index, wherever it lies, checked; its tar is neither opened nor fetched."""
    if cache is not None and info.stored:
        with cache.file(info.stored[1]) as path:
            return read_index(replace(info, index=str(path)))
    data = Path(info.index).read_bytes()
    if len(data) != info.samples * INDEX_ROW.itemsize:
        raise CorruptSample(
            f"{info.index} has {len(data)} bytes, expected {info.samples * INDEX_ROW.itemsize} for the "
            f"{info.samples} samples of its record"
        )
    if (found := hashlib.sha256(data).hexdigest()) != info.index_sha256:
        raise CorruptSample(
            f"{info.index} has sha256 {found[:12]}, expected {info.index_sha256[:12]} as its record says; find out "
            f"what else is damaged with: python -m pipelines.verify path={info.index}"
        )
    return np.frombuffer(data, INDEX_ROW)


def open_shard(info: ShardInfo, cache: NodeCache | None) -> ShardReader:
    """A reader of a shard wherever it lies; the node keeps what was fetched for as long as the reader is in use."""
    if cache is None or not info.stored:
        return ShardReader(info)
    held = ExitStack()
    tar, index = (str(held.enter_context(cache.file(stored))) for stored in info.stored)
    reader = ShardReader(replace(info, tar=tar, index=index))
    weakref.finalize(reader, held.close)
    return reader


def sample_members(data: bytes, key: str, tar: str) -> Iterator[tuple[str, bytes]]:
    """(field, bytes) of the members in a sample's stretch of a tar: headers of 512 bytes, contents padded to 512."""
    at = 0
    while at + BLOCK <= len(data):
        header = data[at : at + BLOCK]
        name, size = header[:100].rstrip(b"\0").decode(), int(header[124:135], 8)
        found, _, field = name.partition(".")
        if header[156:157] not in (b"0", b"\0") or found != key or not _is_field(field):
            raise CorruptSample(f"{tar}: member {name!r} does not belong to sample {key}")
        yield field, data[at + BLOCK : at + BLOCK + size]
        at += BLOCK + -(-size // BLOCK) * BLOCK


@lru_cache(maxsize=64)
def _is_field(field: str) -> bool:
    return MEMBER.match(f"0.{field}") is not None


def encode_array(array: np.ndarray) -> bytes:
    """An array as .npy bytes."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def decode_array(data: bytes) -> np.ndarray:
    """An array from .npy bytes. Raises ValueError where they are anything but one plain array of numbers.

    np.load reads the header with Python's parser, which threads of Python 3.11 cannot share: now and then a loader's
    worker would die of "AST constructor recursion depth mismatch". This reads the header itself.
    """
    start = data[: data.find(b"\n") + 1]
    dtype, shape, order = _npy_header(start)
    flat = np.frombuffer(data, dtype, offset=len(start))
    if flat.size != math.prod(shape):
        raise ValueError(f"an .npy file of shape {shape} holds {flat.size} numbers")
    return flat.reshape(shape, order=order).copy()


@lru_cache(maxsize=64)  # the samples of a cache have few shapes
def _npy_header(start: bytes) -> tuple[np.dtype, tuple[int, ...], Literal["C", "F"]]:
    """(dtype, shape, order) from all that stands before the numbers."""
    header = NPY_HEADER.fullmatch(start)
    if header is None:
        raise ValueError(f"no .npy file of plain numbers; it begins with {start[:128]!r}")
    shape = tuple(int(n) for n in header["shape"].split(b",") if n.strip())
    return np.dtype(header["dtype"].decode()), shape, "F" if header["fortran"] == b"True" else "C"


def iterate_tar(path: str | Path) -> Iterator[tuple[str, dict[str, bytes]]]:
    """(key, fields by extension) of every sample of a tar in order: regular files with plain names only."""
    import tarfile

    key, fields = "", {}
    with tarfile.open(path, "r:") as tar:
        for member in tar:
            match = MEMBER.match(member.name)
            if not member.isreg() or match is None:
                raise CorruptSample(f"{path}: unexpected member {member.name!r}")
            if match["key"] != key and fields:
                yield key, fields
                fields = {}
            key = match["key"]
            fields[match["field"]] = tar.extractfile(member).read()  # type: ignore[union-attr]
    if fields:
        yield key, fields

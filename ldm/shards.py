"""A sample's form on disk: webdataset tars, and beside each one an index for random access.

A shard of latents is a plain tar that any webdataset reader opens, samples in key order, fixed headers:

    000000042.moments.npy   000000042.txt   000000107.moments.npy   000000107.txt   ...

Its index `000042.index` is one fixed row for each sample: key, offset and size of the stretch of the tar that holds the
sample's members, and the crc32 of that stretch. The record holds the index's sha256, which is checked when the shard is
opened; a read is one `pread` of the stretch, checked against the crc32. So a flipped byte, a cut file or a swapped
shard raises CorruptSample and can never shorten an epoch silently.

A tar of somebody else's making may hold anything, with hashes that fit. Headers are read here and not by tarfile, whose
extensions (long names, links, sparse files, sizes of any sign and length) have cost others memory and time without
bound: plain files with plain names and the endings of FIELDS are samples, all else raises CorruptSample with the file's
and the member's name. Nothing here unpickles, opens a URL, or follows a link.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
import re
import struct
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
END = bytes(BLOCK)  # the block after the last member
CONTEXT = "context.npy"  # member with what a frozen text encoder makes of the caption
MIRRORED = "flipped.npy"  # member of a sample with the latent of the mirrored picture
HEADER = struct.Struct("100s 24x 11s c 20x c 188x 155s 12x")  # name, size, what ends it, kind, prefix of the name
FIELDS = ("npy", "json", "txt", "jpg", "png", "webp")
FIELD = re.compile(rf"(?:[a-z0-9_]+\.)?(?:{'|'.join(FIELDS)})".encode())
PLAIN_FILE = (b"0", b"\0")  # kinds of member
OCTAL = b"01234567"  # all that a size consists of
NO_PREFIX = bytes(155)  # of a name
MAX_SAMPLE_BYTES = 1 << 28  # of a sample's stretch, headers included: what a reader may hold at once
MAX_NPY_HEADER = 10_000  # bytes; numpy's own limit
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

    def ahead(self, i: int) -> None:
        """Has the kernel begin to read sample i, which will be read soon; many can be under way at once."""
        _, offset, size, _ = self.rows[i].item()
        os.posix_fadvise(self.handle, offset, size, os.POSIX_FADV_WILLNEED)

    def read(self, i: int) -> tuple[str, dict[str, bytes]]:
        """Key and fields by extension of sample i. Raises CorruptSample when its bytes are not what was written."""
        name, offset, size, crc32 = self.rows[i].item()
        data, key = os.pread(self.handle, size, offset), name.decode()
        if len(data) != size or zlib.crc32(data) != crc32:
            raise CorruptSample(
                f"{self.info.tar}: sample {key} does not match its crc32 ({len(data)} of {size} bytes read); "
                + self._way_out()
            )
        return key, sample_members(data, key, self.info.tar)

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
    rows = np.frombuffer(data, INDEX_ROW)
    ends = rows["offset"] + rows["size"]
    if len(rows) and (rows["offset"][0] or (ends[:-1] != rows["offset"][1:]).any()):
        raise CorruptSample(f"{info.index}: its samples do not lie end to end from the tar's first byte on")
    if len(rows) and (most := int(rows["size"].max())) > MAX_SAMPLE_BYTES:
        raise CorruptSample(f"{info.index} has a sample of {most} bytes, expected at most {MAX_SAMPLE_BYTES}")
    return rows


def open_shard(info: ShardInfo, cache: NodeCache | None) -> ShardReader:
    """A reader of a shard wherever it lies; the node keeps what was fetched for as long as the reader is in use."""
    if cache is None or not info.stored:
        return ShardReader(info)
    held = ExitStack()
    tar, index = (str(held.enter_context(cache.file(stored))) for stored in info.stored)
    reader = ShardReader(replace(info, tar=tar, index=index))
    weakref.finalize(reader, held.close)
    return reader


def sample_members(data: bytes, key: str, tar: str) -> dict[str, bytes]:
    """field -> bytes of the members in a sample's stretch of a tar: headers of 512 bytes, contents padded to 512."""
    fields: dict[str, bytes] = {}
    at = 0
    while at < len(data):
        found, field, size = _member(data[at : at + BLOCK], tar)
        if found != key or field in fields:
            raise CorruptSample(f"{tar}: member {found}.{field} comes again or does not belong to sample {key}")
        fields[field] = data[at + BLOCK : at + BLOCK + size]
        at += BLOCK + _padded(size)
    if at > len(data):
        raise CorruptSample(f"{tar}: member {key}.{field} claims {size} bytes, more than are left of its sample")
    return fields


def _member(header: bytes, tar: str | Path) -> tuple[str, str, int]:
    """(key, field, bytes) of a member by its header. Raises CorruptSample for all but plain files with plain names."""
    if len(header) < BLOCK:
        raise CorruptSample(f"{tar} has {len(header)} bytes where a member's header of {BLOCK} should be")
    name, digits, end, kind, prefix = HEADER.unpack(header)
    key, _, field = name.rstrip(b"\0").partition(b".")
    plain = kind in PLAIN_FILE and prefix == NO_PREFIX and end in (b"\0", b" ")
    if not plain or digits.strip(OCTAL) or not key.isdigit() or not _field(field):
        shown, claimed = name.rstrip(b"\0").decode(errors="replace"), digits.decode(errors="replace")
        raise CorruptSample(
            f"{tar}: unexpected member {shown!r} of kind {kind.decode(errors='replace')!r} and size {claimed!r}; "
            f"expected plain files named KEY.FIELD, the field ending in {', '.join(FIELDS)}"
        )
    return key.decode(), _field(field), int(digits, 8)


@lru_cache(maxsize=64)  # the members of a shard have few
def _field(field: bytes) -> str:
    """The part of a member's name that says what it is; empty for what has no place in a shard."""
    return field.decode() if FIELD.fullmatch(field) else ""


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def encode_array(array: np.ndarray) -> bytes:
    """An array as .npy bytes."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def decode_array(data: bytes) -> np.ndarray:
    """The array in .npy bytes, not to be written to. Raises ValueError for anything but one plain array of numbers.

    np.load reads the header with Python's parser, which threads of Python 3.11 cannot share: now and then a loader's
    worker would die of "AST constructor recursion depth mismatch". This reads the header itself.
    """
    start = data[: data.find(b"\n") + 1]
    dtype, shape, order = _npy_header(start)
    flat = np.frombuffer(data, dtype, offset=len(start))
    if flat.size != math.prod(shape):
        raise ValueError(f"an .npy file of shape {shape} holds {flat.size} numbers")
    return flat.reshape(shape, order=order)


@lru_cache(maxsize=64)  # the samples of a cache have few shapes
def _npy_header(start: bytes) -> tuple[np.dtype, tuple[int, ...], Literal["C", "F"]]:
    """(dtype, shape, order) from all that stands before the numbers."""
    header = NPY_HEADER.fullmatch(start[:MAX_NPY_HEADER])
    if header is None:
        raise ValueError(f"no .npy file of plain numbers; it begins with {start[:128]!r}")
    shape = tuple(int(n) for n in header["shape"].split(b",") if n.strip())
    try:
        dtype = np.dtype(header["dtype"].decode())
    except TypeError as error:  # a width that no number has
        raise ValueError(f"no .npy file of plain numbers: {error}") from error
    return dtype, shape, "F" if header["fortran"] == b"True" else "C"


def iterate_tar(path: str | Path) -> Iterator[tuple[str, dict[str, bytes]]]:
    """(key, fields by extension) of every sample of a tar, which must be in key order and whole to its end."""
    key, fields, room = "", {}, 0
    with open(path, "rb") as file:
        while (header := file.read(BLOCK)) != END:
            found, field, size = _whole_header(header, path)
            if found != key:
                if fields:
                    yield key, fields
                if found < key:
                    raise CorruptSample(f"{path}: member {found}.{field} comes after those of {key}, out of key order")
                key, fields, room = found, {}, MAX_SAMPLE_BYTES
            room -= BLOCK + _padded(size)
            if field in fields or room < 0:
                wrong = "comes again" if field in fields else f"makes its sample larger than {MAX_SAMPLE_BYTES} bytes"
                raise CorruptSample(f"{path}: member {found}.{field} {wrong}")
            fields[field] = file.read(size)
            if len(fields[field]) + len(file.read(_padded(size) - size)) != _padded(size):
                raise CorruptSample(f"{path} is cut off in member {found}.{field}, of which {size} bytes are claimed")
    if fields:
        yield key, fields


def _whole_header(header: bytes, path: str | Path) -> tuple[str, str, int]:
    """What a header says, held against its checksum, in which its own eight bytes count as spaces."""
    if len(header) < BLOCK:
        raise CorruptSample(f"{path} is cut off: it has no end of a tar")
    member = _member(header, path)
    if header[148:154] != b"%06o" % (sum(header) - sum(header[148:156]) + 8 * ord(" ")):
        raise CorruptSample(f"{path}: the header of member {member[0]}.{member[1]} does not have its checksum")
    return member

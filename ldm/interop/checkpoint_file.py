"""What is in a file of weights, without running anything that is in it.

A .ckpt, .pt, .pth or .bin file holds a pickle, and a pickle is a program: to load it plainly is to let its author run
commands here. This reader lets that program build tensors and plain containers and nothing else. Whatever other object
it asks for becomes a stub that remembers its name and what it was given: nothing is imported, nothing is called.
Tensors are found without being read, so a file of gigabytes can be looked through in a second.

    file = open_file("model.ckpt")
    file.tensors["model.diffusion_model.out.2.bias"]         -> TensorInfo(shape=(4,), dtype=torch.float32)
    file.read("model.diffusion_model.out.2.bias")            -> Tensor
    file.stubs                                               -> ["pytorch_lightning.callbacks...ModelCheckpoint", ...]

Three formats: safetensors (one file, or several with an index), torch's zip archives, and what torch wrote before 1.6.
"""

from __future__ import annotations

import io
import json
import math
import pickle
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

SAFETENSORS, ZIP, LEGACY = "safetensors", "torch zip archive", "torch file from before 1.6"
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
INDEX = ".safetensors.index.json"
STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
PLAIN = {
    ("collections", "OrderedDict"): OrderedDict,
    ("builtins", "set"): set,
    ("builtins", "frozenset"): frozenset,
    ("__builtin__", "set"): set,
    ("__builtin__", "frozenset"): frozenset,
    ("torch", "Size"): tuple,
}


@dataclass(frozen=True)
class TensorInfo:
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class WeightFile:
    """An opened file: its tensors by key, and how to read one."""

    path: Path
    format: str
    tensors: dict[str, TensorInfo]
    facts: dict[str, Any]  # plain values beside the weights: epoch, global_step, metadata
    stubs: list[str]  # objects that were not built
    read: Callable[[str], Tensor] = field(repr=False)

    def state(self, keys: Iterable[str] | None = None) -> dict[str, Tensor]:
        """Tensors by key: these, or all."""
        return {key: self.read(key) for key in (self.tensors if keys is None else keys)}

    def on_meta(self) -> WeightFile:
        """The same file, whose tensors come without numbers: enough to see what fits."""
        return replace(self, read=lambda key: torch.empty(self.tensors[key].shape, device="meta"))

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Key -> shape."""
        return {key: info.shape for key, info in self.tensors.items()}


def open_file(path: str | Path) -> WeightFile:
    """Looks into a file of weights of any of the three formats."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file at {path}")
    if path.name.endswith(INDEX):
        return _open_index(path)
    if zipfile.is_zipfile(path):
        return _open_zip(path)
    with path.open("rb") as file:
        start = file.read(9)
    if start[8:9] == b"{":  # safetensors: the header's length, then JSON
        return _open_safetensors(path)
    if start[:1] == b"\x80":  # a pickle's protocol
        return _open_legacy(path)
    raise ValueError(f"{path} begins with {start!r}: neither safetensors nor a file that torch wrote")


def save(path: str | Path, state: Mapping[str, Tensor]) -> None:
    """Writes a state dict: safetensors, or for .ckpt a torch archive with the one entry state_dict."""
    path = Path(path)
    # each with memory of its own: tied weights are written twice, views without the rest of what they view
    plain = {key: value.detach().to("cpu", copy=True).contiguous() for key, value in state.items()}
    if path.suffix == ".safetensors":
        save_file(plain, path, {"format": "pt"})
    elif path.suffix == ".ckpt":
        torch.save({"state_dict": plain}, path)
    else:
        raise ValueError(f"{path} ends in {path.suffix!r}; weights are written as .safetensors or .ckpt")


# ---- safetensors ------------------------------------------------------------------------------------------
def _open_safetensors(path: Path) -> WeightFile:
    try:
        file = safe_open(path, "pt")  # stays open, for reading
        tensors = {key: _info(file.get_slice(key)) for key in file.keys()}  # noqa: SIM118 (no mapping)
    except SafetensorError as error:
        raise ValueError(f"{path} is not whole: {error}") from error
    return WeightFile(path, SAFETENSORS, tensors, dict(file.metadata() or {}), [], file.get_tensor)


def _info(view: Any) -> TensorInfo:
    """Of a safetensors slice, whose type is only told by a tensor: an empty one is taken from it."""
    shape = tuple(view.get_shape())
    dtype = (view[:0] if shape else view[...]).dtype
    return TensorInfo(shape, dtype)


def _open_index(path: Path) -> WeightFile:
    """Several safetensors files, and which key is in which."""
    places = json.loads(path.read_text())["weight_map"]
    files = {}
    for name in sorted(set(places.values())):
        if Path(name).name != name:
            raise ValueError(f"{path} points to {name!r}, outside its own folder")
        files[name] = open_file(path.parent / name)
    missing = [key for key, name in places.items() if key not in files[name].tensors]
    if missing:
        raise ValueError(f"{path} lists {len(missing)} tensors that its files lack, such as {missing[0]}")
    tensors = {key: files[name].tensors[key] for key, name in places.items()}
    return WeightFile(path, SAFETENSORS, tensors, {}, [], lambda key: files[places[key]].read(key))


# ---- torch's own ------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class StorageType:
    """torch.FloatStorage and the like."""

    dtype: torch.dtype


@dataclass(frozen=True)
class Storage:
    """A stretch of numbers in the file."""

    key: str
    dtype: torch.dtype
    size: int


@dataclass(frozen=True)
class TensorPlace:
    """A tensor that has not been read: where its numbers are."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def within(self) -> bool:
        """Whether all its numbers lie inside its storage."""
        if min((*self.shape, *self.stride, self.offset), default=0) < 0 or len(self.shape) != len(self.stride):
            return False
        last = self.offset + sum((n - 1) * step for n, step in zip(self.shape, self.stride, strict=True))
        return 0 in self.shape or (last < self.storage.size and math.prod(self.shape) <= self.storage.size)


class Stub:
    """Stands for an object that was not built. It takes whatever a pickle does to an object, and keeps nothing."""

    name = ""

    def __new__(cls, *args: Any, **keywords: Any) -> Stub:
        return object.__new__(cls)

    def __init__(self, *args: Any, **keywords: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...

    def __setitem__(self, key: Any, value: Any) -> None: ...

    def append(self, value: Any) -> None: ...

    def extend(self, values: Any) -> None: ...

    def add(self, value: Any) -> None: ...

    def __call__(self, *args: Any, **keywords: Any) -> Stub:
        return self


class TensorUnpickler(pickle.Unpickler):
    """Builds plain containers, and places of tensors; everything else becomes a stub.

    A pickle can only call what find_class hands it: here that is a plain container, one of the three methods below,
    or a stub's class, made anew for each file.
    """

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file, encoding="latin1")
        self.stubs: dict[str, type[Stub]] = {}
        self.storages: dict[str, Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in PLAIN:
            return PLAIN[module, name]
        if module in ("torch", "torch.cuda", "torch.storage") and name in STORAGES:
            return StorageType(STORAGES[name])
        if module == "torch._utils" and name in ("_rebuild_tensor", "_rebuild_tensor_v2"):
            return self.tensor
        if module == "torch._utils" and name in ("_rebuild_parameter", "_rebuild_parameter_with_state"):
            return self.parameter
        full = f"{module}.{name}"
        return self.stubs.setdefault(full, type("Stub", (Stub,), {"name": full}))

    def persistent_load(self, pid: Any) -> Storage:
        kind, storage_type, key, _, size, *view = pid
        if kind != "storage" or not isinstance(storage_type, StorageType) or any(view):
            raise ValueError(f"a tensor's numbers are kept in a way that is not known here: {pid!r}")
        return self.storages.setdefault(str(key), Storage(str(key), storage_type.dtype, int(size)))

    def tensor(self, storage: Storage, offset: int, shape: Any, stride: Any, *rest: Any) -> TensorPlace:
        place = TensorPlace(storage, int(offset), tuple(map(int, shape)), tuple(map(int, stride)))
        if not isinstance(storage, Storage) or not place.within():
            raise ValueError(f"a tensor of shape {place.shape} does not lie within its numbers: {storage}")
        return place

    def parameter(self, data: TensorPlace, *rest: Any) -> TensorPlace:
        return data


# What a pickle that is cut off or was made to confuse its reader raises.
BROKEN = (pickle.UnpicklingError, EOFError, ValueError, TypeError, AttributeError, IndexError, KeyError, OverflowError,
          MemoryError, RecursionError, UnicodeDecodeError)  # fmt: skip


def _unpickle(file: BinaryIO, path: Path) -> tuple[Any, TensorUnpickler]:
    """The next pickle of a file, and its reader, which knows what was not built."""
    unpickler = TensorUnpickler(file)
    try:
        return unpickler.load(), unpickler
    except BROKEN as error:
        raise ValueError(f"{path} is no whole file of weights: {type(error).__name__}: {error}") from error


def _open_zip(path: Path) -> WeightFile:
    archive = zipfile.ZipFile(path)  # stays open, for reading
    entries = {info.filename: info for info in archive.infolist()}
    pickles = [name for name in entries if name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise ValueError(f"{path} is a zip archive with {len(pickles)} data.pkl; torch writes one")
    top = pickles[0].removesuffix("data.pkl")
    if f"{top}byteorder" in entries and _entry(archive, f"{top}byteorder", path) != b"little":
        raise ValueError(f"{path} is not little-endian; only such files are read")
    tree, unpickler = _unpickle(io.BytesIO(_entry(archive, pickles[0], path)), path)

    def numbers(storage: Storage) -> bytes:
        name, size = f"{top}data/{storage.key}", storage.size * storage.dtype.itemsize
        if name not in entries or entries[name].file_size < size:
            raise ValueError(f"{path} lacks the numbers {name}, {size} bytes")
        return _entry(archive, name, path)[:size]

    return _weight_file(path, ZIP, tree, unpickler, numbers)


def _entry(archive: zipfile.ZipFile, name: str, path: Path) -> bytes:
    """One entry, compared with its checksum."""
    try:
        return archive.read(name)
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def _open_legacy(path: Path) -> WeightFile:
    """Five pickles (magic number, version, system, the object, its storages' keys), then each storage's numbers."""
    with path.open("rb") as file:
        if _unpickle(file, path)[0] != LEGACY_MAGIC:
            raise ValueError(f"{path} is a pickle, but not of torch: it does not begin with torch's magic number")
        version, system = _unpickle(file, path)[0], _unpickle(file, path)[0]
        if not isinstance(system, dict) or not system.get("little_endian", True):
            raise ValueError(f"{path} (version {version}) is not little-endian; only such files are read")
        tree, unpickler = _unpickle(file, path)
        keys, _ = _unpickle(file, path)
        start = file.tell()
    starts: dict[str, int] = {}
    for key in map(str, keys):
        if key not in unpickler.storages:
            raise ValueError(f"{path} has numbers {key} that no tensor is made of")
        starts[key] = start
        storage = unpickler.storages[key]
        start += 8 + storage.size * storage.dtype.itemsize  # their count comes first

    def numbers(storage: Storage) -> bytes:
        with path.open("rb") as file:
            file.seek(starts[storage.key])
            count = int.from_bytes(file.read(8), "little")
            data = file.read(storage.size * storage.dtype.itemsize)
        if count != storage.size or len(data) != storage.size * storage.dtype.itemsize:
            raise ValueError(f"{path} is not whole: of {storage.size} numbers {storage.key} it has {count} at most")
        return data

    return _weight_file(path, LEGACY, tree, unpickler, numbers)


def _weight_file(
    path: Path, kind: str, tree: Any, unpickler: TensorUnpickler, numbers: Callable[[Storage], bytes]
) -> WeightFile:
    if not isinstance(tree, Mapping):
        raise ValueError(f"{path} holds a {type(tree).__name__}; weights are a dictionary")
    weights = tree["state_dict"] if isinstance(tree.get("state_dict"), Mapping) else tree
    places = {str(key): value for key, value in weights.items() if isinstance(value, TensorPlace)}
    if not places:
        raise ValueError(f"{path} holds no tensors, neither in state_dict nor beside it: {list(map(str, tree))[:8]}")
    facts = {str(key): value for key, value in tree.items() if isinstance(value, str | int | float | bool)}
    tensors = {key: TensorInfo(place.shape, place.storage.dtype) for key, place in places.items()}

    def read(key: str) -> Tensor:
        place = places[key]
        if math.prod(place.shape) == 0:
            return torch.empty(place.shape, dtype=place.storage.dtype)
        flat = torch.frombuffer(bytearray(numbers(place.storage)), dtype=place.storage.dtype)
        return flat.as_strided(place.shape, place.stride, place.offset).contiguous()

    return WeightFile(path, kind, tensors, facts, sorted(unpickler.stubs), read)

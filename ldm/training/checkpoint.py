"""Checkpoints that are whole or not there.

    step-00001000/
        rank-00000-of-00002.safetensors    what this process holds of weights and optimizer, as float32 stretches
        rank-00001-of-00002.safetensors    weight/NAME, exp_avg/NAME, exp_avg_sq/NAME; the header says where each begins
        ema.safetensors                    every weight under its own name, averaged: enough to generate from, with
        config.json                        the settings
        manifest.json                      step, samples seen, and bytes and sha256 of every file above
        COMMITTED                          the manifest's sha256; written last

All processes write into step-00001000.tmp-ATTEMPT while training goes on, each hashes what it wrote, and when all are
done the first process renames the folder and writes COMMITTED: ldm/training/saving.py. The newest checkpoint that
verifies is the one that is loaded; what does not is named and set aside, so that it is never counted among those that
stay (ldm/training/keeping.py), and where nothing is left a run stops rather than start from zero. Stretches belong to
parameters, not to processes, so a checkpoint loads on any number of processes and any ZeRO stage. Nothing is ever
unpickled.

The folder must be one that every process sees: a local disk on one machine, a shared file system on several.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ldm.aside import set_aside
from ldm.storage import sha256_file
from ldm.training.sealing import mark
from ldm.training.together import by_first, each, rank, world_size

FORMAT = 1
KINDS = ("weight", "exp_avg", "exp_avg_sq")
log = logging.getLogger(__name__)
Tell = Callable[[str, str], None]  # subject, what somebody should know who reads no logs


class NotWhole(RuntimeError):
    """There are checkpoints and none of them is whole: `refused` says of each what is wrong."""

    stops_the_run = True  # a restart finds the same

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.refused: dict[Path, list[str]] = {}


@dataclass(frozen=True)
class Stretch:
    """What one process holds of one parameter: elements [start, start + n) of it, flattened; each tensor is (n,)."""

    name: str
    start: int
    tensors: Mapping[str, Tensor]  # kind -> values
    in_files: bool = False  # and in memory only inside a step of the optimizer


def step_name(step: int) -> str:
    return f"step-{step:08d}"


def step_of(name: str) -> int:
    """-1 of anything else."""
    digits = name.removeprefix("step-")
    return int(digits) if digits.isdigit() else -1


@dataclass
class Checkpoint:
    """A checkpoint that was verified."""

    path: Path
    manifest: dict[str, Any]
    config: dict[str, Any]
    _files: dict[str, Any] = field(default_factory=dict)
    _where: dict[str, list[tuple[str, int, int]]] = field(default_factory=dict)

    @property
    def step(self) -> int:
        return self.manifest["step"]

    def read(self, kind: str, name: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of a flattened parameter or of its optimizer state, from whichever files hold them."""
        out = torch.empty(stop - start)
        filled = 0
        for file, first, last in self._stretches().get(name, ()):
            low, high = max(start, first), min(stop, last)
            if low < high:
                out[low - start : high - start] = self._file(file).get_slice(f"{kind}/{name}")[
                    low - first : high - first
                ]
                filled += high - low
        if filled != stop - start:
            raise ValueError(
                f"{self.path} holds {filled} of the elements {start} to {stop} of {kind}/{name}: another model's?"
            )
        return out

    def read_ema(self, name: str) -> Tensor:
        """One averaged weight, whole."""
        return self._file("ema.safetensors").get_tensor(name)

    def close(self) -> None:
        """Lets go of its files: what a process still has open takes its room on the disk after it was removed."""
        for file in self._files.values():
            file.__exit__(None, None, None)
        self._files.clear()

    def _stretches(self) -> dict[str, list[tuple[str, int, int]]]:
        if not self._where:
            for file in self.manifest["files"]:
                if file.startswith("rank-"):
                    handle = self._file(file)
                    for name, start in json.loads(handle.metadata()["starts"]).items():
                        size = handle.get_slice(f"weight/{name}").get_shape()[0]
                        self._where.setdefault(name, []).append((file, start, start + size))
        return self._where

    def _file(self, name: str) -> Any:
        if name not in self._files:
            self._files[name] = safe_open(self.path / name, framework="pt")
        return self._files[name]


def newest(home: Path, finish: bool = False, tell: Tell | None = None) -> Checkpoint | None:
    """The newest checkpoint that verifies; None when there never was one. A process group shares the work.

    With `finish`, for the one who trains, newer ones that do not verify are set aside. A crash between the rename and
    COMMITTED of the very first save leaves everything but the marker. Where nothing else is left such a checkpoint is
    taken, and with `finish` its marker written. Raises NotWhole when there are checkpoints and none is whole: a run
    never starts again from zero unasked.
    """
    candidates = by_first(lambda: steps(home))
    refused: dict[Path, list[str]] = {}
    for path in candidates:
        found = _problems_of_all(path)
        if not found:
            if finish:
                by_first(lambda: refuse(home, refused, tell))
            return by_first(lambda path=path: opened(path))
        log.warning("%s is not taken: %s", path, "; ".join(found))
        refused[path] = found
    for path, reasons in refused.items():
        if reasons == [NOT_COMMITTED] and not _problems_of_all(path, marker=False):
            log.warning("%s lacks COMMITTED, but every file of it verifies and nothing else is left: it is taken", path)
            if finish:
                others = {other: reasons for other, reasons in refused.items() if other != path}
                by_first(lambda path=path: mark(path, sha256_file(path / "manifest.json")))
                by_first(lambda others=others: refuse(home, others, tell))
            return by_first(lambda path=path: opened(path))
    if refused:
        found = "\n".join(f"  {path.name}: {'; '.join(reasons)}" for path, reasons in refused.items())
        error = NotWhole(
            f"no checkpoint in {home} is whole:\n{found}\nbring one of them back from a copy, or remove them all "
            f"(overwrite=true) to train again from step 0"
        )
        error.refused = refused
        raise error
    return None


def refuse(home: Path, refused: dict[Path, list[str]], tell: Tell | None = None) -> None:
    """Sets aside checkpoints that are not whole and says why. The first process of the one who trains calls it."""
    if refused:
        place = set_aside(home, [path.name for path in refused])
        for path, reasons in refused.items():
            message = f"{path.name} lies in {place}: {'; '.join(reasons)}"
            log.warning("%s", message)
            if tell is not None:
                tell(f"refused/{path.name}", message)


NOT_COMMITTED = "COMMITTED is missing"


def problems(path: Path, share: int | None = 0, shares: int = 1, marker: bool = True) -> list[str]:
    """What is wrong with a checkpoint; of its files only every `shares`-th is hashed, or none. Empty: nothing."""
    manifest_path, committed = path / "manifest.json", path / "COMMITTED"
    if marker and not committed.exists():
        return [NOT_COMMITTED]
    if not manifest_path.exists():
        return ["manifest.json is missing"]
    data = manifest_path.read_bytes()
    if marker and committed.read_bytes() != hashlib.sha256(data).hexdigest().encode():
        return ["manifest.json does not have the sha256 that COMMITTED names"]
    try:
        manifest = json.loads(data)
    except ValueError:
        return ["manifest.json does not hold JSON"]
    if manifest.get("format") != FORMAT:
        return [f"manifest.json has format {manifest.get('format')!r}; this version reads format {FORMAT}"]
    found = []
    for i, (name, known) in enumerate(sorted(manifest["files"].items())):
        if not (path / name).is_file():
            found.append(f"{name} is missing")
        elif (size := (path / name).stat().st_size) != known["bytes"]:
            found.append(f"{name} has {size} bytes, not {known['bytes']}")
        elif i % shares == share and sha256_file(path / name) != known["sha256"]:
            found.append(f"{name} does not have the sha256 of its manifest")
    return found


def opened(path: Path) -> Checkpoint:
    """Also of a folder to which somebody took ema.safetensors and config.json alone, to draw pictures: no manifest."""
    manifest = path / "manifest.json"
    known = json.loads(manifest.read_bytes()) if manifest.exists() else {}
    return Checkpoint(path, known, json.loads((path / "config.json").read_bytes()))


def _problems_of_all(path: Path, marker: bool = True) -> list[str]:
    shares = each(lambda: problems(path, rank(), world_size(), marker))
    return sorted({problem for share in shares for problem in share})


def steps(home: Path) -> list[Path]:
    """Folders with the name of a checkpoint, newest first."""
    found = (path for path in home.glob("step-[0-9]*") if path.name == step_name(step_of(path.name)))
    return sorted(found, reverse=True)

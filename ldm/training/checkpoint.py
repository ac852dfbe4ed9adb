"""Checkpoints that are whole or not there.

    step-00001000/
        rank-00000-of-00002.safetensors    what this process holds of weights and optimizer, as float32 stretches
        rank-00001-of-00002.safetensors    weight/NAME, exp_avg/NAME, exp_avg_sq/NAME; the header says where each begins
        ema.safetensors                    every weight under its own name, averaged: enough to generate from, with
        config.json                        the settings
        manifest.json                      step, samples seen, and bytes and sha256 of every file above
        COMMITTED                          the manifest's sha256; written last

All processes write into step-00001000.tmp-ATTEMPT, each hashes what it wrote, and when all are done the first process
renames the folder and writes COMMITTED. The newest checkpoint that verifies is the one that is loaded; what does not is
named, and where nothing is left a run stops rather than start from zero. Stretches belong to parameters, not to
processes, so a checkpoint loads on any number of processes and any ZeRO stage. Nothing is ever unpickled.

The folder must be one that every process sees: a local disk on one machine, a shared file system on several.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ldm.crash import crash_point

FORMAT = 1
KINDS = ("weight", "exp_avg", "exp_avg_sq")
log = logging.getLogger(__name__)
Result = TypeVar("Result")


@dataclass(frozen=True)
class Stretch:
    """What one process holds of one parameter: elements [start, start + n) of it, flattened; each tensor is (n,)."""

    name: str
    start: int
    tensors: dict[str, Tensor]  # kind -> values


# ---- writing -----------------------------------------------------------------------------------------------
def save(
    home: Path,
    step: int,
    *,
    stretches: list[Stretch],
    ema: dict[str, Tensor] | None,
    config: dict[str, Any],
    facts: dict[str, Any],
) -> Path:
    """Commits a checkpoint; every process calls it. `ema` is given by the first process only.

    Raises RuntimeError on every process when one of them could not write; older checkpoints stay as they are.
    """
    final = home / step_name(step)
    attempt = _from_first(uuid.uuid4().hex)
    temporary = home / f"{final.name}.tmp-{attempt}"
    _together(lambda: temporary.mkdir(parents=True) if _rank() == 0 else None, final)
    crash_point("checkpoint_begin")
    written = _together(lambda: _write_stretches(temporary, stretches), final)
    files = dict(written)
    _together(
        lambda: _finish(temporary, final, ema, config, {"step": step, **facts}, files) if _rank() == 0 else None, final
    )
    return final


def step_name(step: int) -> str:
    return f"step-{step:08d}"


def _write_stretches(folder: Path, stretches: list[Stretch]) -> tuple[str, dict[str, Any]]:
    """Writes this process's file; returns its name, size and hash."""
    path = folder / f"rank-{_rank():05d}-of-{_world_size():05d}.safetensors"
    tensors = {f"{kind}/{s.name}": x.detach() for s in stretches for kind, x in s.tensors.items()}
    crash_point("checkpoint_before_rank_file")
    save_file(tensors, path, {"starts": json.dumps({s.name: s.start for s in stretches})})
    crash_point("checkpoint_after_rank_file")
    return path.name, _seal(path)


def _finish(
    temporary: Path,
    final: Path,
    ema: dict[str, Tensor] | None,
    config: dict[str, Any],
    facts: dict[str, Any],
    files: dict[str, dict[str, Any]],
) -> None:
    """The first process's part: the files of the whole, the manifest, the rename and, last of all, COMMITTED."""
    crash_point("checkpoint_all_written")
    if ema is not None:
        save_file({name: x.detach().contiguous() for name, x in ema.items()}, temporary / "ema.safetensors")
        crash_point("checkpoint_after_ema")
        files["ema.safetensors"] = _seal(temporary / "ema.safetensors")
    files["config.json"] = _write_json(temporary / "config.json", {"format": FORMAT, **config})
    crash_point("checkpoint_before_manifest")
    manifest = _write_json(temporary / "manifest.json", {"format": FORMAT, **facts, "files": files})
    _sync_folder(temporary)
    crash_point("checkpoint_before_rename")
    replaced = final.with_name(f"{temporary.name}-replaced")
    if final.exists():  # left without COMMITTED by a crash, or damaged since
        os.rename(final, replaced)
        crash_point("checkpoint_old_aside")
    os.rename(temporary, final)
    _sync_folder(final.parent)
    crash_point("checkpoint_after_rename")
    _commit(final, manifest["sha256"])
    if replaced.exists():
        shutil.rmtree(replaced)


def _commit(final: Path, sha256: str) -> None:
    # Under another name first, so that COMMITTED is never there with half of its line.
    (final / "COMMITTED.tmp").write_text(sha256)
    _seal(final / "COMMITTED.tmp")
    crash_point("checkpoint_before_committed")
    os.rename(final / "COMMITTED.tmp", final / "COMMITTED")
    _sync_folder(final)
    crash_point("checkpoint_after_committed")


def retain(home: Path, keep: int, every: int | None, best: bool = False) -> list[str]:
    """Removes committed checkpoints but for the newest `keep`, those at multiples of `every`, and with `best` the one
    with the lowest validation loss; returns their names.

    The first process calls it.
    """
    found = [path for path in _steps(home) if (path / "COMMITTED").exists()]
    stays = _best(found) if best else None
    gone = [path for path in found[keep:] if path != stays and (every is None or _step(path) % every)]
    for path in gone:
        # Renamed first: a removal that is cut short leaves nothing that looks like a checkpoint.
        aside = path.with_name(f"{path.name}.tmp-removed")
        os.rename(path, aside)
        crash_point("checkpoint_in_removal")
        shutil.rmtree(aside)
    return [path.name for path in gone]


def _best(paths: list[Path]) -> Path | None:
    """The one with the lowest validation loss, where any was validated."""
    losses = {path: json.loads((path / "manifest.json").read_bytes()).get("validation_loss") for path in paths}
    known = {path: loss for path, loss in losses.items() if loss is not None}
    return min(known, key=lambda path: known[path], default=None)


def sweep(home: Path) -> list[str]:
    """Removes what crashed attempts left; only for the one who runs the training. Returns their names."""
    orphans = sorted(home.glob("step-*.tmp-*"))
    for path in orphans:
        shutil.rmtree(path)
    return [path.name for path in orphans]


# ---- reading -----------------------------------------------------------------------------------------------
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


def newest(home: Path, finish: bool = False) -> Checkpoint | None:
    """The newest checkpoint that verifies; None when there never was one. A process group shares the work.

    A crash between the rename and COMMITTED of the very first save leaves everything but the marker. Where nothing else
    is left such a checkpoint is taken, and with `finish` its marker written. Raises RuntimeError when there are
    checkpoints and none is whole: a run never starts again from zero unasked.
    """
    candidates = [Path(path) for path in _from_first([str(path) for path in _steps(home)])]
    refused: dict[Path, list[str]] = {}
    for path in candidates:
        refused[path] = _problems_of_all(path)
        if not refused[path]:
            return _open(path)
        log.warning("%s is not taken: %s", path, "; ".join(refused[path]))
    for path, reasons in refused.items():
        if reasons == [NOT_COMMITTED] and not _problems_of_all(path, marker=False):
            log.warning("%s lacks COMMITTED, but every file of it verifies and nothing else is left: it is taken", path)
            if finish and _rank() == 0:
                _commit(path, _sha256(path / "manifest.json"))
            return _open(path)
    if refused:
        found = "\n".join(f"  {path.name}: {'; '.join(reasons)}" for path, reasons in refused.items())
        raise RuntimeError(
            f"no checkpoint in {home} is whole:\n{found}\nbring one of them back from a copy, or remove them all "
            f"(overwrite=true) to train again from step 0"
        )
    return None


NOT_COMMITTED = "COMMITTED is missing"


def problems(path: Path, share: int = 0, shares: int = 1, marker: bool = True) -> list[str]:
    """What is wrong with a checkpoint; of its data files only every `shares`-th is hashed. Empty: nothing."""
    manifest_path, committed = path / "manifest.json", path / "COMMITTED"
    if marker and not committed.exists():
        return [NOT_COMMITTED]
    if not manifest_path.exists():
        return ["manifest.json is missing"]
    data = manifest_path.read_bytes()
    if marker and committed.read_text() != hashlib.sha256(data).hexdigest():
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
        elif i % shares == share and _sha256(path / name) != known["sha256"]:
            found.append(f"{name} does not have the sha256 of its manifest")
    return found


def differences(there: Any, now: Any, path: str = "") -> list[str]:
    """Where two settings differ, by dotted key, with both values."""
    if isinstance(there, dict) and isinstance(now, dict):
        keys = sorted({*there, *now})
        return [d for key in keys for d in differences(there.get(key), now.get(key), f"{path}.{key}" if path else key)]
    return [] if there == now else [f"{path}: {there!r} in the checkpoint, {now!r} now"]


def _open(path: Path) -> Checkpoint:
    return Checkpoint(
        path, json.loads((path / "manifest.json").read_bytes()), json.loads((path / "config.json").read_bytes())
    )


def _problems_of_all(path: Path, marker: bool = True) -> list[str]:
    shares = _gather(problems(path, _rank(), _world_size(), marker))
    return sorted({problem for share in shares for problem in share})


def _steps(home: Path) -> list[Path]:
    """Folders with the name of a checkpoint, newest first."""
    return sorted((path for path in home.glob("step-[0-9]*") if path.name == step_name(_step(path))), reverse=True)


def _step(path: Path) -> int:
    digits = path.name.removeprefix("step-")
    return int(digits) if digits.isdigit() else -1


# ---- files -------------------------------------------------------------------------------------------------
def _seal(path: Path) -> dict[str, Any]:
    """Syncs a file and returns its size and hash, read back from where it was written."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    return {"bytes": path.stat().st_size, "sha256": _sha256(path)}


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_json(path: Path, value: Any) -> dict[str, Any]:
    path.write_text(json.dumps(value, sort_keys=True, indent=1, ensure_ascii=False) + "\n")
    return _seal(path)


def _sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# ---- processes ---------------------------------------------------------------------------------------------
def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _gather(value: Result) -> list[Result]:
    """The values of all processes, on every one of them."""
    if _world_size() == 1:
        return [value]
    values: list[Any] = [None] * _world_size()
    dist.all_gather_object(values, value)
    return values


def _from_first(value: Result) -> Result:
    return _gather(value)[0]


def _together(work: Callable[[], Result], final: Path) -> list[Result]:
    """Does each process's part of a save and waits for the others; an error of one is an error of all."""
    result, error = None, ""
    try:
        result = work()
    except (OSError, SafetensorError) as raised:
        error = f"process {_rank()}: {raised}"
    outcomes = _gather((result, error))
    if errors := [error for _, error in outcomes if error]:
        if _rank() == 0:
            for path in final.parent.glob(f"{final.name}.tmp-*"):
                shutil.rmtree(path, ignore_errors=True)
        raise RuntimeError(
            f"{final} could not be written ({'; '.join(errors)}); older checkpoints stay as they are. "
            f"Make room or mend the disk, and the same command goes on from the newest of them"
        )
    return [result for result, _ in outcomes]  # type: ignore[misc]

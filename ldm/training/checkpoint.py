"""Checkpoints that are whole or not there.

    step-00001000/
        rank-00000-of-00002.safetensors    what this process holds of weights and optimizer, as float32 stretches
        rank-00001-of-00002.safetensors    weight/NAME, exp_avg/NAME, exp_avg_sq/NAME; the header says where each begins
        ema.safetensors                    every weight under its own name, averaged: enough to generate from, with
        config.json                        the settings
        manifest.json                      step, samples seen, and bytes and sha256 of every file above
        COMMITTED                          the manifest's sha256; written last

All processes write into step-00001000.tmp-ATTEMPT while training goes on, each hashes what it wrote, and when all are
done the first process renames the folder and writes COMMITTED. The newest checkpoint that verifies is the one that is
loaded; what does not is named and set aside, so that it is never counted among those that stay, and where nothing is
left a run stops rather than start from zero. Stretches belong to parameters, not to processes, so a checkpoint loads on
any number of processes and any ZeRO stage. Nothing is ever unpickled.

The folder must be one that every process sees: a local disk on one machine, a shared file system on several.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import shutil
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ldm.aside import set_aside
from ldm.crash import crash_point
from ldm.training.together import from_first, gather, rank, world_size

FORMAT = 1
KINDS = ("weight", "exp_avg", "exp_avg_sq")
log = logging.getLogger(__name__)
Result = TypeVar("Result")
Tell = Callable[[str, str], None]  # subject, what somebody should know who reads no logs


class NotWhole(RuntimeError):
    """There are checkpoints and none of them is whole: `refused` says of each what is wrong."""

    stops_the_run = True  # a restart finds the same

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.refused: dict[Path, list[str]] = {}


class DiskFull(RuntimeError):
    """A checkpoint could not be written for want of room."""

    stops_the_run = True  # nobody makes room meanwhile


@dataclass(frozen=True)
class Stretch:
    """What one process holds of one parameter: elements [start, start + n) of it, flattened; each tensor is (n,)."""

    name: str
    start: int
    tensors: dict[str, Tensor]  # kind -> values


# ---- writing -----------------------------------------------------------------------------------------------
class Saving:
    """A checkpoint under way: what the processes hold is copied at once, and written while training goes on.

    Every process makes one at the same step, `ema` given by the first alone, and all call `commit` together; before
    that there is no checkpoint.
    """

    def __init__(
        self,
        home: Path,
        step: int,
        *,
        stretches: list[Stretch],
        ema: dict[str, Tensor] | None,
        config: dict[str, Any],
        facts: dict[str, Any],
    ) -> None:
        self._final = home / step_name(step)
        attempt = from_first(uuid.uuid4().hex)
        self._temporary = home / f"{self._final.name}.tmp-{attempt}"
        self._facts = {"step": step, **facts}
        _together(lambda: self._temporary.mkdir(parents=True) if rank() == 0 else None, self._final)
        crash_point("checkpoint_begin")
        held = {f"{kind}/{s.name}": x.detach().to("cpu", copy=True) for s in stretches for kind, x in s.tensors.items()}
        starts = {s.name: s.start for s in stretches}
        writer = ThreadPoolExecutor(1, "checkpoint")
        self._written = writer.submit(_write, self._temporary, held, starts, ema, config if rank() == 0 else None)
        writer.shutdown(wait=False)

    def is_written(self) -> bool:
        """Whether this process has done its part."""
        return self._written.done()

    def commit(self) -> Path:
        """Waits for all processes and makes it a checkpoint.

        Raises RuntimeError on every process when one of them could not write; older checkpoints stay as they are.
        """
        files = dict(file for part in _together(self._written.result, self._final) for file in part.items())
        _together(
            lambda: _finish(self._temporary, self._final, self._facts, files) if rank() == 0 else None, self._final
        )
        return self._final


def save(home: Path, step: int, **held: Any) -> Path:
    """A checkpoint that is waited for."""
    return Saving(home, step, **held).commit()


def step_name(step: int) -> str:
    return f"step-{step:08d}"


def step_of(name: str) -> int:
    """-1 of anything else."""
    digits = name.removeprefix("step-")
    return int(digits) if digits.isdigit() else -1


def _write(
    folder: Path,
    held: dict[str, Tensor],
    starts: dict[str, int],
    ema: dict[str, Tensor] | None,
    config: dict[str, Any] | None,
) -> dict[str, dict[str, Any]]:
    """Writes this process's file, and those that only the first has something for; returns their sizes and hashes."""
    path, files = folder / f"rank-{rank():05d}-of-{world_size():05d}.safetensors", {}
    crash_point("checkpoint_before_rank_file")
    save_file(held, path, {"starts": json.dumps(starts)})
    crash_point("checkpoint_after_rank_file")
    files[path.name] = seal(path)
    if ema is not None:
        save_file({name: x.detach().contiguous() for name, x in ema.items()}, folder / "ema.safetensors")
        crash_point("checkpoint_after_ema")
        files["ema.safetensors"] = seal(folder / "ema.safetensors")
    if config is not None:
        files["config.json"] = _write_json(folder / "config.json", {"format": FORMAT, **config})
    return files


def _finish(temporary: Path, final: Path, facts: dict[str, Any], files: dict[str, dict[str, Any]]) -> None:
    """The first process's part, once all have written: the manifest, the rename and, last of all, COMMITTED."""
    crash_point("checkpoint_all_written")
    crash_point("checkpoint_before_manifest")
    manifest = _write_json(temporary / "manifest.json", {"format": FORMAT, **facts, "files": files})
    replaced = final.with_name(f"{temporary.name}-replaced")
    if final.exists():  # left without COMMITTED by a crash, or damaged since
        os.rename(final, replaced)
        crash_point("checkpoint_old_aside")
    adopt(temporary, final, manifest["sha256"])
    if replaced.exists():
        shutil.rmtree(replaced)


def adopt(temporary: Path, final: Path, sha256: str) -> None:
    """Makes a checkpoint of a folder that is whole; `sha256` is its manifest's."""
    sync_folder(temporary)
    crash_point("checkpoint_before_rename")
    os.rename(temporary, final)
    sync_folder(final.parent)
    crash_point("checkpoint_after_rename")
    _commit(final, sha256)


def _commit(final: Path, sha256: str) -> None:
    # Under another name first, so that COMMITTED is never there with half of its line.
    (final / "COMMITTED.tmp").write_text(sha256)
    seal(final / "COMMITTED.tmp")
    crash_point("checkpoint_before_committed")
    os.rename(final / "COMMITTED.tmp", final / "COMMITTED")
    sync_folder(final)
    crash_point("checkpoint_after_committed")


def staying(losses: dict[int, float | None], keep: int, every: int | None, best: bool) -> set[int]:
    """Of steps with their validation loss, where there was one: the newest `keep`, multiples of `every`, the `best`."""
    found = sorted(losses, reverse=True)
    stay = {*found[:keep], *(step for step in found if every is not None and step % every == 0)}
    known = {step: loss for step in found if (loss := losses[step]) is not None}
    return stay | {min(known, key=lambda step: known[step])} if best and known else stay


def retain(
    home: Path,
    keep: int,
    every: int | None,
    best: bool = False,
    tell: Tell | None = None,
    but: Path | None = None,
) -> list[str]:
    """Removes checkpoints but for those that are `staying`, and for one that may not go yet; returns their names.

    Those that were damaged meanwhile are set aside and count for nothing. The first process calls it.
    """
    looked_at = {path: problems(path, share=None) for path in steps(home)}
    refuse(home, {path: reasons for path, reasons in looked_at.items() if reasons}, tell)
    found = [path for path, reasons in looked_at.items() if not reasons]
    stay = staying({step_of(path.name): _validation_loss(path) for path in found}, keep, every, best)
    gone = [path for path in found if step_of(path.name) not in stay and path != but]
    for path in gone:
        # Renamed first: a removal that is cut short leaves nothing that looks like a checkpoint.
        aside = path.with_name(f"{path.name}.tmp-removed")
        os.rename(path, aside)
        crash_point("checkpoint_in_removal")
        shutil.rmtree(aside)
    return [path.name for path in gone]


def _validation_loss(path: Path) -> float | None:
    return json.loads((path / "manifest.json").read_bytes()).get("validation_loss")


def refuse(home: Path, refused: dict[Path, list[str]], tell: Tell | None = None) -> None:
    """Sets aside checkpoints that are not whole and says why. The first process of the one who trains calls it."""
    if refused:
        place = set_aside(home, [path.name for path in refused])
        for path, reasons in refused.items():
            message = f"{path.name} lies in {place}: {'; '.join(reasons)}"
            log.warning("%s", message)
            if tell is not None:
                tell(f"refused/{path.name}", message)


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


def newest(home: Path, finish: bool = False, tell: Tell | None = None) -> Checkpoint | None:
    """The newest checkpoint that verifies; None when there never was one. A process group shares the work.

    With `finish`, for the one who trains, newer ones that do not verify are set aside. A crash between the rename and
    COMMITTED of the very first save leaves everything but the marker. Where nothing else is left such a checkpoint is
    taken, and with `finish` its marker written. Raises NotWhole when there are checkpoints and none is whole: a run
    never starts again from zero unasked.
    """
    candidates = [Path(path) for path in from_first([str(path) for path in steps(home)])]
    refused: dict[Path, list[str]] = {}
    for path in candidates:
        found = _problems_of_all(path)
        if not found:
            if finish and rank() == 0:
                refuse(home, refused, tell)
            return opened(path)
        log.warning("%s is not taken: %s", path, "; ".join(found))
        refused[path] = found
    for path, reasons in refused.items():
        if reasons == [NOT_COMMITTED] and not _problems_of_all(path, marker=False):
            log.warning("%s lacks COMMITTED, but every file of it verifies and nothing else is left: it is taken", path)
            if finish and rank() == 0:
                _commit(path, _sha256(path / "manifest.json"))
                refuse(home, {other: reasons for other, reasons in refused.items() if other != path}, tell)
            return opened(path)
    if refused:
        found = "\n".join(f"  {path.name}: {'; '.join(reasons)}" for path, reasons in refused.items())
        error = NotWhole(
            f"no checkpoint in {home} is whole:\n{found}\nbring one of them back from a copy, or remove them all "
            f"(overwrite=true) to train again from step 0"
        )
        error.refused = refused
        raise error
    return None


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
        elif i % shares == share and _sha256(path / name) != known["sha256"]:
            found.append(f"{name} does not have the sha256 of its manifest")
    return found


def differences(there: Any, now: Any, path: str = "") -> list[str]:
    """Where two settings differ, by dotted key, with both values."""
    if isinstance(there, dict) and isinstance(now, dict):
        keys = sorted({*there, *now})
        return [d for key in keys for d in differences(there.get(key), now.get(key), f"{path}.{key}" if path else key)]
    return [] if there == now else [f"{path}: {there!r} in the checkpoint, {now!r} now"]


def opened(path: Path) -> Checkpoint:
    return Checkpoint(
        path, json.loads((path / "manifest.json").read_bytes()), json.loads((path / "config.json").read_bytes())
    )


def _problems_of_all(path: Path, marker: bool = True) -> list[str]:
    shares = gather(problems(path, rank(), world_size(), marker))
    return sorted({problem for share in shares for problem in share})


def steps(home: Path) -> list[Path]:
    """Folders with the name of a checkpoint, newest first."""
    found = (path for path in home.glob("step-[0-9]*") if path.name == step_name(step_of(path.name)))
    return sorted(found, reverse=True)



# ---- files -------------------------------------------------------------------------------------------------
def seal(path: Path) -> dict[str, Any]:
    """Syncs a file and returns its size and hash, read back from where it was written."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    return {"bytes": path.stat().st_size, "sha256": _sha256(path)}


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_json(path: Path, value: Any) -> dict[str, Any]:
    path.write_text(json.dumps(value, sort_keys=True, indent=1, ensure_ascii=False) + "\n")
    return seal(path)


def sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# ---- processes ---------------------------------------------------------------------------------------------
def _together(work: Callable[[], Result], final: Path) -> list[Result]:
    """Does each process's part of a save and waits for the others; an error of one is an error of all."""
    result, error, full = None, "", False
    try:
        result = work()
    except (OSError, SafetensorError) as raised:
        error, full = f"process {rank()}: {raised}", _is_full(raised)
    outcomes = gather((result, error, full))
    if errors := [error for _, error, _ in outcomes if error]:
        if rank() == 0:
            for path in final.parent.glob(f"{final.name}.tmp-*"):
                shutil.rmtree(path, ignore_errors=True)
        raise (DiskFull if any(full for _, _, full in outcomes) else RuntimeError)(
            f"{final} could not be written ({'; '.join(errors)}); older checkpoints stay as they are. "
            f"Make room or mend the disk, and the same command goes on from the newest of them"
        )
    return [result for result, _, _ in outcomes]  # type: ignore[misc]


def _is_full(error: OSError | SafetensorError) -> bool:
    """Whether there was no room; safetensors says the system's number in words alone."""
    said = re.search(r"os error (\d+)", str(error))
    number = int(said[1]) if said else getattr(error, "errno", None)
    return number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

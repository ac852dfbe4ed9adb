"""Writing a checkpoint: what the processes hold is copied at once, and written and hashed while training goes on."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ldm.crash import crash_point
from ldm.training.checkpoint import FORMAT, Stretch, step_name
from ldm.training.sealing import adopt, seal, write_json
from ldm.training.together import from_first, outcomes, rank, world_size

Result = TypeVar("Result")


class DiskFull(RuntimeError):
    """A checkpoint could not be written for want of room."""

    stops_the_run = True  # nobody makes room meanwhile


class Saving:
    """A checkpoint under way: what the processes hold is copied at once, and written while training goes on.

    Every process makes one at the same step, `ema` given by the first alone, and all call `commit` together; before
    that there is no checkpoint. The copies are made in `room`, which is memory or, where there is none to spare, files.
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
        room: Callable[[int], Tensor] = torch.empty,
    ) -> None:
        self._final = home / step_name(step)
        attempt = from_first(uuid.uuid4().hex)
        self._temporary = home / f"{self._final.name}.tmp-{attempt}"
        self._facts = as_json({"step": step, **facts})
        _together(lambda: self._temporary.mkdir(parents=True) if rank() == 0 else None, self._final)
        crash_point("checkpoint_begin")
        held: dict[str, Tensor] = {}
        _together(lambda: held.update(_copied(stretches, room)), self._final)
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


def as_json(value: Any) -> Any:
    """A copy as JSON will hold it: what changes later changes nothing of it, and numbers that are none are null."""
    if isinstance(value, dict):
        return {key: as_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_json(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _copied(stretches: list[Stretch], room: Callable[[int], Tensor]) -> Iterator[tuple[str, Tensor]]:
    for stretch in stretches:
        for kind, values in stretch.tensors.items():
            yield f"{kind}/{stretch.name}", room(values.numel()).copy_(values.detach())


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
        files["config.json"] = write_json(folder / "config.json", {"format": FORMAT, **config})
    return files


def _finish(temporary: Path, final: Path, facts: dict[str, Any], files: dict[str, dict[str, Any]]) -> None:
    """The first process's part, once all have written: the manifest, the rename and, last of all, COMMITTED."""
    crash_point("checkpoint_all_written")
    crash_point("checkpoint_before_manifest")
    manifest = write_json(temporary / "manifest.json", {"format": FORMAT, **facts, "files": files})
    replaced = final.with_name(f"{temporary.name}-replaced")
    if final.exists():  # left without COMMITTED by a crash, or damaged since
        os.rename(final, replaced)
        crash_point("checkpoint_old_aside")
    adopt(temporary, final, manifest["sha256"])
    if replaced.exists():
        shutil.rmtree(replaced)


def _together(work: Callable[[], Result], final: Path) -> list[Result]:
    """Does each process's part of a save and waits for the others; an error of one is an error of all."""
    results, errors = outcomes(work)
    if errors:
        if rank() == 0:
            for path in final.parent.glob(f"{final.name}.tmp-*"):
                shutil.rmtree(path, ignore_errors=True)
        said = "; ".join(f"process {who}: {type(error).__name__}: {error}" for who, error in errors.items())
        raise (DiskFull if any(map(_is_full, errors.values())) else RuntimeError)(
            f"{final} could not be written ({said}); older checkpoints stay as they are. "
            f"Once there is room, or what else was wrong is mended, the same command goes on from the newest of them"
        )
    return results


def _is_full(error: Exception) -> bool:
    """Whether there was no room; safetensors says the system's number in words alone."""
    said = re.search(r"os error (\d+)", str(error)) if isinstance(error, SafetensorError) else None
    number = int(said[1]) if said else getattr(error, "errno", None)
    return number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

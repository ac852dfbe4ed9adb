"""Which checkpoints stay: the newest few, every so many steps, and the one with the lowest validation loss."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from ldm.crash import crash_point
from ldm.training.checkpoint import Tell, problems, refuse, step_of, steps


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


def sweep(home: Path) -> list[str]:
    """Removes what crashed attempts left; only for the one who runs the training. Returns their names."""
    orphans = sorted(home.glob("step-*.tmp-*"))
    for path in orphans:
        shutil.rmtree(path)
    return [path.name for path in orphans]

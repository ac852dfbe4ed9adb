"""Which checkpoints stay: the newest few, some at long intervals, the one with the lowest validation loss, pinned ones.

`touch outputs/NAME/train/step-00001000/PINNED` keeps a checkpoint, and its copy, whatever the rules say.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import uuid
from pathlib import Path
from typing import Any

from ldm.crash import crash_point
from ldm.training.checkpoint import Tell, problems, refuse, step_of, steps

PINNED = "PINNED"
Measured = tuple[int | None, float]  # over how many held-out samples, and their mean loss
log = logging.getLogger(__name__)


def staying(losses: dict[int, Measured | None], keep: int, every: int | None, best: bool) -> set[int]:
    """Of steps with their validation loss, where there was one: the newest `keep`, multiples of `every`, the `best`.

    Losses are compared that were measured over as many samples as the newest: others are of other samples.
    """
    found = sorted(losses, reverse=True)
    stay = {*found[:keep], *(step for step in found if every is not None and step % every == 0)}
    known = [(step, *measured) for step in found if (measured := losses[step]) is not None]
    if best and known:
        samples = known[0][1]
        stay.add(min((entry for entry in known if entry[1] == samples), key=lambda entry: entry[2])[0])
    return stay


def measured(manifest: dict[str, Any]) -> Measured | None:
    """The validation loss that a checkpoint's manifest knows; None where there was none, or where it was no number."""
    loss = manifest.get("validation_loss")
    return None if loss is None or not math.isfinite(loss) else (manifest.get("validation_samples"), loss)


def retain(
    home: Path,
    keep: int,
    every: int | None,
    best: bool = False,
    tell: Tell | None = None,
    but: Path | None = None,
) -> list[str]:
    """Removes checkpoints but for those that are `staying` or pinned, and for one that may not go yet; returns their
    names.

    Those that were damaged meanwhile are set aside and count for nothing. The first process calls it.
    """
    looked_at = {path: problems(path, share=None) for path in steps(home)}
    refuse(home, {path: reasons for path, reasons in looked_at.items() if reasons}, tell)
    found = [path for path, reasons in looked_at.items() if not reasons]
    manifests = {step_of(path.name): json.loads((path / "manifest.json").read_bytes()) for path in found}
    stay = staying({step: measured(manifest) for step, manifest in manifests.items()}, keep, every, best)
    gone = [path for path in found if step_of(path.name) not in stay and path != but and not (path / PINNED).exists()]
    for path in gone:
        # Renamed first: a removal that is cut short leaves nothing that looks like a checkpoint.
        aside = path.with_name(f"{path.name}.tmp-removed-{uuid.uuid4().hex}")
        os.rename(path, aside)
        crash_point("checkpoint_in_removal")
        _remove(aside)
    return [path.name for path in gone]


def sweep(home: Path) -> list[str]:
    """Removes what crashed attempts left; only for the one who runs the training. Returns their names."""
    orphans = sorted(home.glob("step-*.tmp-*"))
    for path in orphans:
        _remove(path)
    return [path.name for path in orphans]


def _remove(folder: Path) -> None:
    """What cannot be removed now, because somebody on another machine still has it open, is swept another time."""
    try:
        shutil.rmtree(folder)
    except OSError as error:
        log.warning("%s cannot be removed yet and is left to the next start: %s", folder, error)

"""Training goes back to an earlier checkpoint: before a loss spike, say, whose samples it then leaves out.

    python -m pipelines.run training.resume=step-41000 training.skip_samples=[28016000,28084000]

Nothing is deleted: later checkpoints, and the record of a training that had come to its end, are moved to
train/aside/001/. It happens once for a request, which train/rewinds.json remembers: the same command, given again
after a crash, goes on from where the new way has got to. The journal learns of it too: curves follow the new way.
"""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

from ldm.aside import set_aside
from ldm.config import TrainingConfig
from pipelines.journal import Journal
from pipelines.manifest import FORMAT, check_format, read_json, write_json

NOTES = "rewinds.json"


def is_due(folder: Path, training: TrainingConfig) -> bool:
    """Whether training.resume asks for something that was not done yet."""
    if training.resume is None:
        return False
    done = _notes(folder)
    return not done or done[-1]["request"] != _request(training)


def go_back(folder: Path, training: TrainingConfig, journal: Journal, copies: Any | None = None) -> None:
    """Sets aside what is later than the checkpoint that training.resume names, where it is copied too.

    The journal is closed. Raises ValueError where there is no such checkpoint, or where it is not whole.
    """
    if is_due(folder, training):
        step = _check(folder, training)
        later = sorted(path.name for path in folder.glob("step-*") if _step(path.name) > step)
        later += [name for name in ("record.json",) if (folder / name).exists()]
        if copies is not None:
            from ldm.training.copies import disown

            disown(copies, step)
        place = set_aside(folder, later)
        journal.rewind(step)
        note = {"request": _request(training), "time": time.time(), "aside": place.name, "moved": later}
        write_json(folder / NOTES, {"format": FORMAT, "rewinds": [*_notes(folder), note]})
        print(f"training goes back to step {step}; {len(later)} later results lie in {place}")
    elif training.resume is not None:
        print(f"training went back to {training.resume} before, on this very request, and goes on from there")
    journal.close()


def _request(training: TrainingConfig) -> dict[str, Any]:
    return {"resume": training.resume, "skip_samples": training.skip_samples}


def _notes(folder: Path) -> list[dict[str, Any]]:
    path = folder / NOTES
    return check_format(read_json(path), path)["rewinds"] if path.exists() else []


def _check(folder: Path, training: TrainingConfig) -> int:
    from ldm.training.checkpoint import problems

    steps = {_step(path.parent.name): path.parent for path in sorted(folder.glob("step-*/COMMITTED"))}
    step = _step(training.resume or "")
    if step not in steps:
        aside = sorted(str(path.relative_to(folder)) for path in folder.glob("aside/*/step-*"))
        raise ValueError(
            f"training.resume is {training.resume!r}; in {folder} there are: "
            f"{', '.join(path.name for path in steps.values()) or 'no checkpoints'}"
            + (f"; set aside, to be moved back by hand: {', '.join(aside)}" if aside else "")
        )
    if found := problems(steps[step]):
        raise ValueError(f"training.resume is {training.resume!r}, which is not whole: {'; '.join(found)}")
    return step


def _step(name: str) -> int:
    """N of step-N, with or without zeros before it; -1 of anything else."""
    found = re.fullmatch(r"step-(\d+)", name)
    return int(found[1]) if found else -1

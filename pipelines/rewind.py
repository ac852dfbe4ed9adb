"""Training goes back to an earlier checkpoint: before a loss spike, say, whose samples it then leaves out.

    python -m pipelines.run training.resume=step-41000 training.skip_samples=[28016000,28084000]

Nothing is deleted: later checkpoints, and the record of a training that had come to its end, are moved to
train/aside/001/. It happens once for a request, which train/rewinds.json remembers: the same command, given again
after a crash, goes on from where the new way has got to. The journal learns of it too: curves follow the new way.
They do so as well where a training that had crashed goes on with other settings, which training.accept allows: steps
after the checkpoint, told before the crash, are told anew, and would be another curve.
"""

from __future__ import annotations

import json
import re
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ldm import storage
from ldm.aside import set_aside
from ldm.config import TrainingConfig, TrainingRunConfig
from pipelines.journal import Journal, last_step, rewinds_in
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
        for name in later:  # in the run that is left: they lie elsewhere now
            if name != "record.json":
                journal.model_removed(f"{folder.parent.name}-{name}", _step(name))
        journal.tags({f"set_aside/{place.name}": f"{', '.join(later)} in {place}"})
        journal.rewind(step, ", ".join(_changes(folder / f"step-{step:08d}", training)))
        note = {"request": _request(training), "time": time.time(), "aside": place.name, "moved": later}
        write_json(folder / NOTES, {"format": FORMAT, "rewinds": [*_notes(folder), note]})
        print(f"training goes back to step {step}; {len(later)} later results lie in {place}")
    else:
        if training.resume is not None:
            print(f"training went back to {training.resume} before, on this very request, and goes on from there")
        _follow_settings(folder, training, journal, copies)
    journal.close()


def leave_copies(run: TrainingRunConfig, folder: Path) -> None:
    """Training begins anew, and nobody goes on from copies of what it had made before."""
    from ldm.training.copies import disown, place_of

    place = place_of(run, folder)
    if place is not None and (left := disown(place, -1)):
        print(f"overwrite=true: the copies {', '.join(left)} in {place} are set aside: no training goes on from them")


def _follow_settings(folder: Path, training: TrainingConfig, journal: Journal, copies: Any | None) -> None:
    """What was told after the checkpoint that training goes on from is abandoned where other settings told it."""
    from ldm.training.checkpoint import problems

    told = last_step(journal.path)
    for step, path in _committed(folder, copies) if told > 0 else ():
        if told <= step:
            return
        last = list(rewinds_in(journal.path))[-1:]
        told_with = last[0].get("why", "") if last and last[0]["step"] == step else ""
        goes_on_with = ", ".join(_changes(path, training))
        if goes_on_with == told_with:
            return
        if storage.is_remote(path) or not problems(path):
            journal.rewind(step, goes_on_with)
            print(f"training goes on from step {step} with {goes_on_with or 'its settings'}; later steps are told anew")
            return


def _committed(folder: Path, copies: Any | None) -> list[tuple[int, Any]]:
    """The checkpoints that training may go on from, the newest first; where there are none here, the copies of them."""
    from ldm.training.copies import committed

    here = [path.parent for path in folder.glob("step-*/COMMITTED")]
    if not here and copies is not None:
        here = [copies / name for name in committed(copies)]
    return sorted(((_step(path.name), path) for path in here), key=lambda pair: -pair[0])


def _changes(checkpoint: Any, training: TrainingConfig) -> list[str]:
    """What makes the steps after a checkpoint other ones: settings that are accepted, and samples that are left out."""
    there = json.loads(storage.read(checkpoint / "config.json"))["settings"]["training"]
    now, seen = asdict(training), json.loads(storage.read(checkpoint / "manifest.json"))["samples_seen"]
    accepted = [key.removeprefix("training.") for key in training.accept or ()]
    found = [f"training.{name}={now[name]}" for name in accepted if name in now and now[name] != there.get(name)]
    skips = (there.get("skip_samples"), now["skip_samples"])
    left_out = [skip if skip and skip[1] > seen else None for skip in skips]
    return found + ([f"training.skip_samples={left_out[1]}"] if left_out[0] != left_out[1] else [])


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

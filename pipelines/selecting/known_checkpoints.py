"""The checkpoints of a folder of runs, wherever they lie, by what each says of itself."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm.storage import is_remote, matching, place
from pipelines.manifest import read_json

CHECKPOINT = re.compile(r"step-\d+")


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint says of itself."""

    path: Any  # on disk, or on an object store
    training: Path  # the stage's folder that it lies in, or was copied from
    seen: int
    left_out: tuple[tuple[int, int], ...]  # positions that were skipped on purpose, [a, b)
    settings: dict[str, Any]  # of training
    data: dict[str, Any]  # edition and selection
    weights: str | None  # sha256 of its ema.safetensors


def checkpoints_in(outputs: Path) -> list[Checkpoint]:
    """Those of every run of a folder of runs, with those that were set aside."""
    return [read_checkpoint(path, train) for train in sorted(outputs.glob("*/train"))
            for path in sorted([*train.glob("step-*"), *train.glob("aside/*/step-*")])
            if CHECKPOINT.fullmatch(path.name) and path.is_dir()]  # fmt: skip


def copies_of(copy_to: str | None, outputs: Path) -> list[Checkpoint]:
    """Copies of the checkpoints of a folder of runs, at the place that cluster.train.run.copy_to names."""
    if copy_to is None:
        return []
    pattern = "*/train/step-*/manifest.json"
    if is_remote(copy_to):
        found = [place(name) for name in matching(f"{copy_to.rstrip('/')}/{pattern}")]
    else:
        found = sorted(Path(copy_to).glob(pattern))
    return [read_checkpoint(path.parent, outputs / path.parent.parent.parent.name / "train") for path in found]


def address_of(path: Any) -> str:
    """What a checkpoint is known by, whichever way leads there."""
    return str(path if is_remote(path) else path.resolve())


def read_checkpoint(path: Any, training: Path) -> Checkpoint:
    """A checkpoint's own account; one that cannot be read has no data, and is suspected of everything."""
    try:
        manifest, config = read_json(path / "manifest.json"), read_json(path / "config.json")
        skipped = (entry["skipped_samples"] for entry in manifest.get("history", []) if "skipped_samples" in entry)
        weights = manifest.get("files", {}).get("ema.safetensors", {}).get("sha256")
        return Checkpoint(path, training, manifest["samples_seen"], tuple((a, b) for a, b in skipped),
                          config["settings"]["training"], config["data"], weights)  # fmt: skip
    except (FileNotFoundError, ValueError, KeyError):
        return Checkpoint(path, training, 0, (), {}, {}, None)


def order_key(checkpoint: Checkpoint) -> tuple[Path, str, str, tuple[int, ...]]:
    """All that the order of a checkpoint's training depends on."""
    names = ("held_out_shards", "seed", "lanes", "window_shards", "batch_size")
    settings = tuple(checkpoint.settings[name] for name in names)
    return checkpoint.training, checkpoint.data["edition"], checkpoint.data["selection"], settings

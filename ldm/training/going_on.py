"""What a training that goes on may change, where it may go on at all, and where it begins instead of at random.

A checkpoint knows the settings, the data and the frozen weights that it was made from. What is asked for now is held
against them before anything is loaded; a difference is refused by name, unless it is free or was accepted.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from ldm.config import TrainingConfig, TrainSettings
from ldm.models.denoiser import Denoiser
from ldm.storage import sha256_file
from ldm.training import checkpoint, lr
from ldm.training.loader import TrainData
from ldm.training.may_change import ACCEPTABLE, FREE, GROWS
from ldm.training.together import by_first


def run_config(settings: TrainSettings, data: TrainData) -> dict[str, Any]:
    """What config.json says: enough to build the model and its autoencoder again, and what it was trained on.

    The digests of what is frozen beside it come to it as "frozen" once that is loaded.
    """
    known = {name: getattr(data, name) for name in ("edition", "selection", "field", "latent_shape", "scale_factor")}
    return json.loads(json.dumps({"settings": asdict(settings), "data": known, "autoencoder": data.autoencoder}))


def identity(config: dict[str, Any]) -> str:
    """By what a training is known from its first step on: what it began with. Its later checkpoints carry it on."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:16]


def accepted_changes(
    last: checkpoint.Checkpoint, config: dict[str, Any], settings: TrainSettings, data: TrainData
) -> list[str]:
    """What is other than in the checkpoint that a run goes on from, and accepted.

    Raises ValueError when other settings or other data are asked for than it was made from, and nobody accepted that.
    """
    training = settings.training
    free = tuple(key for key in FREE if key not in GROWS or training.lr_schedule not in lr.FALLING)
    found = [
        line
        for part in ("settings", "data", "frozen")
        if part in last.config and part in config  # the frozen part is not loaded yet, or was kept without a hash
        for line in differences(last.config[part], config[part])
        if not _is_of(line, free)
    ]
    refused = [line for line in found if line.partition(":")[0] not in (training.accept or ())]
    if refused:
        keys = [key for line in refused if (key := line.partition(":")[0]) in ACCEPTABLE]
        way = f"; training.accept=[{','.join(keys)}] goes on with the new ones" if len(keys) == len(refused) else ""
        raise ValueError(
            f"{last.path} was made from other settings:\n  "
            + "\n  ".join(refused + rate_change(last, config, settings, refused))
            + f"\nname=OTHER makes a new run; with the old values, or with the old data, this one goes on{way}"
        )
    if any(line.startswith("training.batch_size:") for line in found) and (data.shapes or data.caches):
        raise ValueError(
            "training.batch_size cannot change while a run goes on with pictures of several shapes or with several "
            "caches: the order of samples depends on it, and some would be seen twice and others never"
        )
    return found


def _is_of(difference: str, keys: tuple[str, ...]) -> bool:
    """Whether it is in one of these settings, or below one."""
    return any(f"{difference.partition(':')[0]}.".startswith(f"{key}.") for key in keys)


def differences(there: Any, now: Any, path: str = "") -> list[str]:
    """Where two settings differ, by dotted key, with both values."""
    if isinstance(there, dict) and isinstance(now, dict):
        keys = sorted({*there, *now})
        return [d for key in keys for d in differences(there.get(key), now.get(key), f"{path}.{key}" if path else key)]
    return [] if there == now else [f"{path}: {there!r} in the checkpoint, {now!r} now"]


def rate_change(
    last: checkpoint.Checkpoint, config: dict[str, Any], settings: TrainSettings, refused: list[str]
) -> list[str]:
    """Why more steps are no mere continuation where the schedule falls to an end: what the learning rate would do."""
    if not any(line.startswith("training.max_steps:") for line in refused):
        return []
    there, now = (
        known["learning_rate"]
        * lr.multiplier(
            known["lr_schedule"], last.step + 1, known["warmup_steps"], known["max_steps"], known["lr_end"]
        )
        for known in (last.config["settings"]["training"], config["settings"]["training"])
    )
    name = settings.training.lr_schedule
    return [
        f"training.lr_schedule={name} falls to its end at training.max_steps: the learning rate of step "
        f"{last.step + 1} would be {now:.3g}, where the old settings have {there:.3g}"
    ]


# ---- samples that are left out ------------------------------------------------------------------------------
def is_range(samples: list[int]) -> bool:
    return len(samples) == 2 and 0 <= samples[0] < samples[1]


def check_skipped_samples(
    training: TrainingConfig, data: TrainData, samples_seen: int, history: list[dict[str, Any]], home: Path
) -> None:
    """Raises ValueError where samples cannot be left out as training.skip_samples says.

    They must be still to come, or have been left out before, and begin where a batch does. Where a batch is of one
    shape and one cache, they must end there too.
    """
    if training.skip_samples is None:
        return
    (first, end), batch = training.skip_samples, training.batch_size
    left_out = [entry["skipped_samples"] for entry in history if "skipped_samples" in entry]
    if any(first <= a < end == b for a, b in left_out):
        return
    if first < samples_seen:
        raise ValueError(_too_late(first, samples_seen, home))
    if over := (first - samples_seen) % batch:
        raise ValueError(
            f"training.skip_samples begins at {first}, in the middle of a batch of {batch}; the batches around it "
            f"begin at {first - over} and {first - over + batch}"
        )
    if (data.shapes or data.caches) and (over := end % batch):
        raise ValueError(
            f"training.skip_samples ends at {end}; with pictures of several shapes, or several caches, every {batch} "
            f"samples of the order are one batch and cannot be taken apart: it may end at {end - over} or "
            f"{end - over + batch}"
        )


def _too_late(first: int, samples_seen: int, home: Path) -> str:
    seen = {path.name: json.loads((path / "manifest.json").read_bytes())["samples_seen"]
            for path in checkpoint.steps(home) if not checkpoint.problems(path, share=None)}  # fmt: skip
    before = [f"{name} ({samples} samples)" for name, samples in seen.items() if samples <= first]
    way = f"training.resume=NAME goes back to one of: {', '.join(before)}" if before else "no checkpoint is older"
    return (
        f"training.skip_samples begins at {first}, and {samples_seen} samples were seen before this checkpoint: what "
        f"was trained on cannot be left out any more; {way}"
    )


def after_skipped(skipped: list[int] | None, samples_seen: int) -> int:
    """How many samples are passed once those to be left out are: they count as seen."""
    return skipped[1] if skipped is not None and skipped[0] <= samples_seen < skipped[1] else samples_seen


# ---- where a new run begins ---------------------------------------------------------------------------------
def start_from(denoiser: Denoiser, path: str) -> None:
    """Gives a new model the averaged weights of another run of the same model, at another resolution for example.

    Where the file lies in a checkpoint it must be what that one committed. All processes call it.
    """
    by_first(lambda: _verify(Path(path)))
    weights = load_file(path)
    trained = {name: tuple(p.shape) for name, p in denoiser.named_parameters() if p.requires_grad}
    known = {name: tuple(x.shape) for name, x in denoiser.state_dict().items()}
    found = {name: tuple(x.shape) for name, x in weights.items()}
    wrong = [f"{name} is missing" for name in sorted(trained.keys() - found.keys())]
    wrong += [f"{name} is {list(shape)}, where the model has {list(known[name]) if name in known else 'none'}"
              for name, shape in sorted(found.items()) if known.get(name) != shape]  # fmt: skip
    if wrong:
        raise ValueError(
            f"training.start_from={path} is of another model: it differs in {len(wrong)} of {len(trained)} weights, "
            f"{'; '.join(wrong[:3])}; unet and text_encoder must be those of the run that made it"
        )
    denoiser.load_state_dict(weights, strict=False)


def _verify(path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"training.start_from={path}: there is no such file, and no checkpoint to go on from")
    manifest = path.parent / "manifest.json"
    known = json.loads(manifest.read_bytes())["files"].get(path.name) if manifest.is_file() else None
    if known is not None and sha256_file(path) != known["sha256"]:
        raise ValueError(
            f"training.start_from={path} does not have the sha256 that {manifest} names: it is damaged, or another "
            f"file was put in its place; bring it back from a copy"
        )

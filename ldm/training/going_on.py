"""What a training that goes on may change, where it may go on at all, and where it begins instead of at random.

A checkpoint knows the settings, the data and the frozen weights that it was made from. What is asked for now is held
against them before anything is loaded; a difference is refused by name, unless it is free or was accepted.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from safetensors.torch import load_file

from ldm.config import TrainingConfig, TrainSettings
from ldm.models.denoiser import Denoiser
from ldm.training import checkpoint, lr
from ldm.training.frozen import Frozen
from ldm.training.loader import TrainData

# What may change when a run goes on: how far, what is shown, where equal files lie.
FREE = (
    "training.max_steps",  # but for schedules that fall to an end there
    "training.start_from",
    "training.resume",
    "training.skip_samples",
    "training.accept",
    "training.log_every_steps",
    "training.grid",
    "training.validate_every_steps",
    "training.validation_samples",
    "training.deterministic",
    "text_encoder.vocab_file",
    "text_encoder.weights",
)

# What may change when training.accept names it.
ACCEPTABLE = tuple(
    f"training.{name}"
    for name in (
        "max_steps", "batch_size", "learning_rate", "lr_schedule", "warmup_steps", "lr_end", "beta1", "beta2",
        "epsilon", "weight_decay", "gradient_clipping", "caption_dropout", "precision", "ema_decay",
        "max_skipped_batches",
    )
)  # fmt: skip


def run_config(settings: TrainSettings, data: TrainData, frozen: Frozen) -> dict[str, Any]:
    """What config.json says: enough to build the model again, what it was trained on, and beside which frozen part."""
    known = {name: getattr(data, name) for name in ("edition", "selection", "field", "latent_shape", "scale_factor")}
    return json.loads(json.dumps({"settings": asdict(settings), "data": known, "frozen": frozen.digests()}))


def accepted_changes(
    last: checkpoint.Checkpoint, config: dict[str, Any], settings: TrainSettings, data: TrainData
) -> list[str]:
    """What is other than in the checkpoint that a run goes on from, and accepted.

    Raises ValueError when other settings or other data are asked for than it was made from, and nobody accepted that.
    """
    training = settings.training
    free = FREE[1:] if training.lr_schedule in lr.FALLING else FREE
    found = [
        line
        for part in ("settings", "data", "frozen")
        if part in last.config  # no hash of the frozen part was kept before it left the engine
        for line in differences(last.config[part], config[part])
        if not line.startswith(free)
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


def is_range(samples: list[int]) -> bool:
    return len(samples) == 2 and 0 <= samples[0] < samples[1]


def check_skipped_samples(training: TrainingConfig, samples_seen: int) -> None:
    """Raises ValueError where the first sample to leave out is not the first of a batch."""
    if training.skip_samples is None or (first := training.skip_samples[0]) <= samples_seen:
        return
    if over := (first - samples_seen) % training.batch_size:
        raise ValueError(
            f"training.skip_samples begins at {first}, in the middle of a batch of {training.batch_size}; the batches "
            f"around it begin at {first - over} and {first - over + training.batch_size}"
        )


def after_skipped(skipped: list[int] | None, samples_seen: int) -> int:
    """How many samples are passed once those to be left out are: they count as seen."""
    return skipped[1] if skipped is not None and skipped[0] <= samples_seen < skipped[1] else samples_seen


def start_from(denoiser: Denoiser, path: str) -> None:
    """Gives a new model the averaged weights of another run of the same model, at another resolution for example."""
    missing, unexpected = denoiser.load_state_dict(load_file(path), strict=False)
    trained = {name for name, parameter in denoiser.named_parameters() if parameter.requires_grad}
    if wrong := sorted(trained & set(missing)) + unexpected:
        raise ValueError(
            f"training.start_from={path} is of another model: it differs in {len(wrong)} of {len(trained)} weights, "
            f"{wrong[0]} the first; unet and text_encoder must be those of the run that made it"
        )

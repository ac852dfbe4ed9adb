"""Refuses settings that training could not follow, before anything is loaded."""

from __future__ import annotations

import math

from ldm import generate
from ldm.config import DiffusionConfig, TrainingConfig, TrainingRunConfig, TrainSettings
from ldm.diffusion import objective
from ldm.diffusion.schedule import Schedule, make_schedule
from ldm.training import lr
from ldm.training.going_on import is_range
from ldm.training.grid import grid_config
from ldm.training.may_change import ACCEPTABLE, FREE


def check(settings: TrainSettings) -> None:
    """Refuses settings that cannot be followed, before anything is loaded."""
    training = settings.training
    if unknown := sorted(set(training.accept or ()) - {*ACCEPTABLE, *FREE}):
        raise ValueError(f"training.accept has {unknown}; a run that goes on may change: {', '.join(ACCEPTABLE)}")
    if training.skip_samples is not None and not is_range(training.skip_samples):
        raise ValueError(f"training.skip_samples is {training.skip_samples}; it is [a, b] with 0 <= a < b, or null")
    lr.check(training.lr_schedule, training.warmup_steps, training.max_steps, training.lr_end)
    schedule = schedule_of(settings.diffusion)
    objective.check_prediction_type(settings.diffusion.prediction, schedule)
    objective.check_loss(settings.diffusion.loss, settings.diffusion.min_snr_gamma)
    generate.check(grid_config(training), schedule, settings.diffusion.prediction)
    if training.ema_of not in ("unet", "all"):
        raise ValueError(f"training.ema_of is {training.ema_of!r}; there are: unet, all")
    text = settings.text_encoder
    if text is not None and text.kind == "clip" and text.canvas is not None:
        raise ValueError(
            f"text_encoder.canvas is {text.canvas}; a text encoder of kind 'clip' is frozen and cannot learn to draw "
            f"on one: set it to null"
        )
    if training.held_out_shards and training.validate_every_steps and training.validation_samples < 1:
        raise ValueError(
            f"training.validation_samples is {training.validation_samples}, a loss over nothing; it must be a multiple "
            f"of training.batch_size, {training.batch_size}, or training.validate_every_steps null"
        )
    if training.held_out_shards and training.validation_samples % training.batch_size:
        raise ValueError(
            f"training.validation_samples is {training.validation_samples}; it must be a multiple of "
            f"training.batch_size, {training.batch_size}, so that every process has an equal share"
        )


def check_best(training: TrainingConfig, run: TrainingRunConfig) -> None:
    """Refuses to keep the best checkpoint where none, or next to none, is measured."""
    if not run.keep_best:
        return
    saved, measured = run.checkpoint_every_steps, training.validate_every_steps
    if not training.held_out_shards or measured is None:
        raise ValueError(
            f"cluster.train.run.keep_best is true, and nothing says which is the best: training.held_out_shards is "
            f"{training.held_out_shards} and training.validate_every_steps is {measured}; set both, or keep_best=false"
        )
    if saved % measured and measured % saved:
        raise ValueError(
            f"cluster.train.run.keep_best is true, and a checkpoint of every {saved} steps "
            f"(cluster.train.run.checkpoint_every_steps) is measured where training.validate_every_steps={measured} "
            f"falls on the same step, every {math.lcm(saved, measured)}; make the one a multiple of the other"
        )


def schedule_of(diffusion: DiffusionConfig) -> Schedule:
    """The noise schedule of a configuration."""
    return make_schedule(
        diffusion.schedule, diffusion.timesteps, diffusion.beta_start, diffusion.beta_end, diffusion.zero_terminal_snr
    )

"""The training of a latent diffusion model, read from top to bottom.

It sees torch.distributed and four functions: decode(z0) -> image, log(step, values), log_grid(step, png, name) and
should_stop(). What launches it, and where numbers go, is the business of others; so the same function runs under Ray
Train, under torchrun, and in a single process. It can be killed at any moment and started again: it goes on from the
newest whole checkpoint, and on an equal number of processes ends in the same bits as if nothing had happened.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ldm.config import TrainingRunConfig, TrainSettings
from ldm.diffusion.schedule import add_noise
from ldm.models.attention import AttentionBlock, SpatialTransformer
from ldm.models.blocks import ResBlock, checkpoint_activations
from ldm.models.denoiser import make_denoiser
from ldm.models.tokenizer import make_tokenizer
from ldm.training import checkpoint, copies, keeping, lr
from ldm.training.bad_batches import TooManyBadBatches, non_finite, refusable, refusal
from ldm.training.budget import costs_of
from ldm.training.checks import check, schedule_of
from ldm.training.ema import Ema
from ldm.training.engine import Engine, GradientOverflow, NonFiniteGradient, check_kept, join
from ldm.training.frozen import Frozen
from ldm.training.going_on import accepted_changes, after_skipped, check_skipped_samples, run_config, start_from
from ldm.training.grid import Decode, sample_grid
from ldm.training.loader import TrainData, allow_open_files, hold_out
from ldm.training.meter import Meter
from ldm.training.saving import Saving
from ldm.training.step import loss_of, make_loader, null_context, seed_dropout
from ldm.training.validation import validation_loss
from ldm.training.watchdog import Watchdog

Log = Callable[[int, dict[str, float]], None]
LogGrid = Callable[[int, bytes, str], None]
LogCheckpoint = Callable[[Path, list[str]], None]

log_line = logging.getLogger(__name__)


def train(
    settings: TrainSettings,
    data: TrainData,
    output: Path,
    run: TrainingRunConfig,
    *,
    decode: Decode,
    log: Log,
    log_grid: LogGrid,
    should_stop: Callable[[], bool],
    log_checkpoint: LogCheckpoint = lambda kept, removed: None,
    tell: checkpoint.Tell | None = None,
    peak_flops: float | None = None,
) -> int:
    """Trains up to `max_steps` or until `should_stop`; returns the step of the last checkpoint, in `output`.

    `decode` (scaled z0 -> image in [-1, 1]), `log`, `log_grid` and `log_checkpoint` (the folder of one, the names of
    those removed for it) and `tell` (a subject, what somebody should know who reads no logs) are called in the first
    process only, `should_stop` in all of them after every step: one that says so stops all. With `peak_flops`, what one
    device can do in a second, the log also says what share of it is reached.
    """
    training, diffusion = settings.training, settings.diffusion
    torch.set_num_threads(run.threads)
    if training.deterministic and torch.cuda.is_available():  # on the processor equal runs are equal anyway
        make_deterministic()
    check(settings)
    check_kept(run)

    # Processes: one for each GPU.
    world = join()
    first = world.rank == 0

    # Model: what is trained in one module, which the engine shares out; beside it what is frozen, and averaged weights.
    torch.manual_seed(training.seed)
    denoiser = make_denoiser(settings.unet, settings.text_encoder)
    if training.start_from is not None:
        start_from(denoiser, training.start_from)
    denoiser.to(world.device)
    frozen = Frozen(denoiser, training.precision)
    if run.activation_checkpointing:
        checkpoint_activations(denoiser, (ResBlock, SpatialTransformer, AttentionBlock))
    schedule = schedule_of(diffusion).to(world.device)
    engine = Engine(denoiser, training, run, world)
    ema = Ema(engine.stretches(), training.ema_decay, lambda name: training.ema_of == "all" or name.startswith("unet."))

    # Data: the same sequence of samples, noise and timesteps for every number of processes.
    trained_on, held_out = hold_out(data, training.held_out_shards)
    tokenizer = make_tokenizer(settings.text_encoder) if settings.text_encoder else None
    null = null_context(frozen, tokenizer, world.device) if data.context_shape else None
    loader = make_loader(settings, trained_on, tokenizer, null, run, world)
    held_out_loader = held_out and make_loader(settings, held_out, tokenizer, null, run, world, validation=True)
    allow_open_files(*filter(None, (loader, held_out_loader)))

    # Where the last run got to.
    config = run_config(settings, data, frozen)
    if first:
        keeping.sweep(output)
    dist.barrier()
    step = saved = samples_seen = skipped = 0
    history: list[dict[str, Any]] = []  # where the run went another way than its settings alone would say
    place = copies.place_of(run, output)
    if (last := copies.newest(output, place, tell)) is not None:
        changed = accepted_changes(last, config, settings, data)
        step, saved, samples_seen = last.step, last.step, last.manifest["samples_seen"]
        skipped = last.manifest.get("skipped_batches", 0)  # absent before batches were left out
        history = last.manifest.get("history", []) + ([{"step": step, "accepted": changed}] if changed else [])
        engine.restore(last.read, step)
        engine.restore_scaler(last.manifest.get("loss_scale"))
        ema.restore(last.read_ema, step)
        if first:
            log_line.info("goes on from %s", last.path)
    check_skipped_samples(training, samples_seen)
    batches = loader.batches(samples_seen)
    flop = None
    if peak_flops is not None and first:
        costs = costs_of(settings, data.latent_shape)
        flop = costs.step_flop() - (costs.frozen_flop if data.context_shape else 0)
    meter = Meter(world, flop and flop / (peak_flops * world.world_size))
    shown, stopping, validated = step, False, None
    saving: Saving | None = None  # what is being written while training goes on
    written = False  # by all processes

    with (
        copies.Copier(output, place if first else None, run, tell) as copier,
        Watchdog(output / "stacks", world.rank, run.hang_seconds) as watchdog,
    ):
        while True:
            watchdog.reset()
            # What is due before the next step, so that the last step needs no special case.
            done = step >= training.max_steps or stopping
            if step > shown and first and (step % training.log_every_steps == 0 or done):
                log(step, meter.read())
            if due(step, training.validate_every_steps, shown, done) and held_out_loader is not None:
                validated = validation_loss(engine, frozen, held_out_loader, settings, schedule)
                if first:
                    log(step, {"validation_loss": validated})
            if training.grid.prompts and due(step, training.grid.every_steps, shown, done):
                weights = engine.gather(ema.stretches)
                if weights is not None:
                    weights |= engine.buffers()
                    png = sample_grid(settings, data, weights, frozen, schedule, tokenizer, decode, step)
                    log_grid(step, png, "samples")
                del weights  # as large as the model
            due_save = step > saved and (step % run.checkpoint_every_steps == 0 or done)
            if saving is not None and (written or due_save):
                settle(saving, output, run, tell, log_checkpoint, copier)
                saving = None
            if due_save:
                weights = engine.gather(ema.stretches)
                saving = Saving(
                    output,
                    step,
                    stretches=engine.states(),
                    ema=None if weights is None else weights | engine.buffers(),
                    config=config,
                    facts={
                        "samples_seen": samples_seen,
                        "skipped_batches": skipped,
                        "history": history,
                        "loss_scale": engine.scaler_state(),
                        "validation_loss": validated,
                        "world_size": world.world_size,
                        "zero_stage": run.zero_stage,
                    },
                )
                saved = step
                del weights
            shown, validated = step, None  # a batch that is left out comes by here without a step
            if done:
                if saving is not None:
                    settle(saving, output, run, tell, log_checkpoint, copier)
                if not stopping:
                    copier.patience = copies.END_SECONDS
                break

            if (on := after_skipped(training.skip_samples, samples_seen)) > samples_seen:
                history.append({"step": step, "skipped_samples": [samples_seen, on]})
                samples_seen, batches = on, loader.batches(on)

            watchdog.reset()
            # One step: every process takes its share of the next `batch_size` samples, a micro batch at a time.
            meter.start_step()
            learning_rate = training.learning_rate * lr.multiplier(
                training.lr_schedule, step + 1, training.warmup_steps, training.max_steps, training.lr_end
            )
            keys: list[str] = []
            for _ in range(engine.accumulation):
                with meter.waiting():
                    batch = next(batches).to(world.device)
                seed_dropout(training.seed, batch)
                z_t = add_noise(schedule, batch.z0, batch.eps, batch.t)
                prediction = engine(z_t, batch.t, frozen.encode(batch.condition))
                loss = loss_of(diffusion, schedule, prediction, batch)  # (b,)
                engine.backward(refusable(loss))
                meter.add(loss.detach(), batch.t * 4 // diffusion.timesteps)
                keys += batch.keys

            # The processes agree on what happened before any weight is touched. A batch that is no good counts as seen.
            stopping, finite, written = meter.agree(should_stop(), saving is not None and saving.is_written())
            samples_seen += training.batch_size
            try:
                grad_norm = engine.update(learning_rate)
            except NonFiniteGradient as error:
                if finite and isinstance(error, GradientOverflow):  # no fault of the batch: the next scale is smaller
                    log_line.info("%s at step %d; the batch is left out", error, step + 1)
                    continue
                skipped += 1
                what = str(error) if finite else "the loss is not finite"
                report = non_finite(output, what, step + 1, samples_seen, keys, meter.own_loss_is_finite)
                if skipped > training.max_skipped_batches:
                    if saving is not None:
                        settle(saving, output, run, tell, log_checkpoint, copier)
                    raise TooManyBadBatches(f"{report}\n{refusal(skipped, training.max_skipped_batches)}") from error
                if first:
                    log_line.warning("%s\nthe batch is left out", report)
                continue
            ema.update()
            step += 1
            scale = {} if engine.loss_scale is None else {"loss_scale": engine.loss_scale}
            meter.end_step(training.batch_size, grad_norm=grad_norm, learning_rate=learning_rate, **scale)

    loader.close()
    return saved


def make_deterministic() -> None:
    """Equal runs give equal bits on CUDA too."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


def due(step: int, every: int | None, shown: int, done: bool) -> bool:
    """Whether something that happens every so often, and at the end, has to happen at this step of this process."""
    return every is not None and step > shown and (step % every == 0 or done)


def settle(
    saving: Saving,
    output: Path,
    run: TrainingRunConfig,
    tell: checkpoint.Tell | None,
    log_checkpoint: LogCheckpoint,
    copier: copies.Copier,
) -> None:
    """Commits a checkpoint and removes those whose place it takes."""
    kept = saving.commit()
    if dist.get_rank() == 0:
        rules = (run.keep_checkpoints, run.keep_every_steps, run.keep_best)
        log_checkpoint(kept, keeping.retain(output, *rules, tell, but=copier.under_way))
        copier.look()

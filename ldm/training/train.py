"""The training of a latent diffusion model, read from top to bottom.

It sees torch.distributed and six functions: decode(z0) -> image, log(step, values), log_grid(step, png, name),
log_checkpoints(), tell(subject, words) and should_stop(). What launches it, and where numbers go, is the
business of others; so the same function runs under Ray Train, under torchrun, and in a single process. It can be killed
at any moment and started again: it goes on from the newest whole checkpoint, and on an equal number of processes ends
in the same bits as if nothing had happened.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ldm.config import TrainingRunConfig, TrainSettings
from ldm.diffusion.schedule import add_noise
from ldm.models.attention import AttentionBlock, SpatialTransformer
from ldm.models.blocks import ResBlock, checkpoint_activations
from ldm.models.denoiser import make_denoiser
from ldm.models.tokenizer import make_tokenizer
from ldm.training import checkpoint, copies, fetching, keeping, lr
from ldm.training.arithmetic import choose_arithmetic
from ldm.training.bad_batches import TooManyBadBatches, non_finite, refusable, refusal
from ldm.training.budget import costs_of
from ldm.training.checks import check, check_best, schedule_of
from ldm.training.ema import Ema
from ldm.training.engine import Engine, GradientOverflow, NonFiniteGradient, join
from ldm.training.engine_config import check_kept
from ldm.training.frozen import Frozen
from ldm.training.going_on import (
    accepted_changes,
    after_skipped,
    check_skipped_samples,
    identity,
    run_config,
    start_from,
)
from ldm.training.grid import Decode, sample_grid
from ldm.training.keeper import Keeper, LogCheckpoints
from ldm.training.loader import TrainData, allow_open_files, hold_out
from ldm.training.meter import Agreed, Meter, any_says
from ldm.training.out_of_memory import settings_named
from ldm.training.step import loss_of, make_loader, null_context, seed_dropout
from ldm.training.together import by_first
from ldm.training.validation import validation_loss
from ldm.training.watchdog import Watchdog, collective_seconds

Log = Callable[[int, dict[str, float]], None]
LogGrid = Callable[[int, bytes, str], None]

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
    log_checkpoints: LogCheckpoints = lambda: None,
    tell: checkpoint.Tell | None = None,
    peak_flops: float | None = None,
) -> int:
    """Trains up to `max_steps` or until `should_stop`; returns the step of the last checkpoint, in `output`.

    `decode` (scaled z0 -> image in [-1, 1]), `log`, `log_grid` and `log_checkpoints` (those in `output` are looked at,
    and may be others than before) and `tell` (a subject, what somebody should know who reads no logs) are called in the
    first process only; `should_stop` in all of them, before anything is loaded (then 0 is returned), before the first
    step and after every step: one that says so stops all. With `peak_flops`, what one device can do in a second, the
    log also says what share of it is reached.
    """
    training, diffusion = settings.training, settings.diffusion
    torch.set_num_threads(run.threads)
    choose_arithmetic(training)
    check(settings)
    check_kept(run)
    check_best(training, run)

    # Processes: one for each GPU.
    world = join(collective_seconds=collective_seconds(run.hang_seconds))
    first = world.rank == 0

    def say(subject: str, words: str) -> None:
        """To those who read logs, and to those who do not."""
        if first:
            log_line.warning("%s", words)
            if tell is not None:
                tell(subject, words)

    with ExitStack() as stack:
        stack.enter_context(settings_named(training, run, world.world_size))
        watchdog = stack.enter_context(Watchdog(output / "stacks", world.rank, run.hang_seconds))

        # Who is to leave already loads nothing.
        watchdog.reset(long=True)
        if any_says(should_stop(), world):
            return 0

        # Where the last run got to, looked at before anything is loaded for it.
        config = run_config(settings, data)
        by_first(lambda: keeping.sweep(output))
        place = copies.place_of(run, output)
        last = fetching.newest(output, place, tell, lambda found: accepted_changes(found, config, settings, data))

        # Model: what is trained in one module, which the engine shares out; beside it what is frozen, and averages.
        watchdog.reset(long=True)
        torch.manual_seed(training.seed)
        denoiser = make_denoiser(settings.unet, settings.text_encoder)
        if training.start_from is not None and last is None:
            start_from(denoiser, training.start_from)
        denoiser.to(world.device)
        frozen = Frozen(denoiser, training.precision)
        if run.activation_checkpointing:
            checkpoint_activations(denoiser, (ResBlock, SpatialTransformer, AttentionBlock))
        schedule = schedule_of(diffusion).to(world.device)
        engine = stack.enter_context(closing(Engine(denoiser, training, run, world)))
        ema = Ema(
            engine.stretches(),
            training.ema_decay,
            lambda name: training.ema_of == "all" or name.startswith("unet."),
            engine.room,
        )
        engine.show(ema.look)

        # Data: the same sequence of samples, noise and timesteps for every number of processes.
        watchdog.reset(long=True)
        trained_on, held_out = hold_out(data, training.held_out_shards)
        tokenizer = make_tokenizer(settings.text_encoder) if settings.text_encoder else None
        null = null_context(frozen, tokenizer, world.device) if data.context_shape else None
        loader = stack.enter_context(closing(make_loader(settings, trained_on, tokenizer, null, run, world)))
        held_out_loader = None
        if held_out is not None:
            held_out_loader = make_loader(settings, held_out, tokenizer, null, run, world, validation=True)
            stack.enter_context(closing(held_out_loader))
        allow_open_files(*filter(None, (loader, held_out_loader)))

        # What the last run had learned.
        watchdog.reset(long=True)
        config["frozen"] = frozen.digests()
        step = saved = samples_seen = skipped = overflows = 0
        history: list[dict[str, Any]] = []  # where the run went another way than its settings alone would say
        run_id = identity(config)
        if last is not None:
            run_id = last.manifest.get("run", run_id)  # absent before copies were held against it
            changed = accepted_changes(last, config, settings, data)
            step, saved, samples_seen = last.step, last.step, last.manifest["samples_seen"]
            skipped = last.manifest.get("skipped_batches", 0)  # absent before batches were left out
            history = last.manifest.get("history", []) + ([{"step": step, "accepted": changed}] if changed else [])
            engine.restore(last.read, step)
            engine.restore_scaler(last.manifest.get("loss_scale"))
            ema.restore(last.read_ema, step)
            last.close()
            found = f"goes on from {last.path}, after {samples_seen} samples, on {world.world_size} processes"
            say(f"resumed/{last.path.name}", found)
        check_skipped_samples(training, data, samples_seen, history, output)
        batches = loader.batches(samples_seen)
        copier = stack.enter_context(copies.Copier(output, place if first else None, run, tell))
        keeper = Keeper(output, run, copier, tell, log_checkpoints)
        by_first(log_checkpoints)
        flop = None
        if peak_flops is not None and first:
            costs = costs_of(settings, data.latent_shape)
            flop = costs.step_flop() - (costs.frozen_flop if data.context_shape else 0)
        meter = Meter(world, flop and flop / (peak_flops * world.world_size))
        shown, validated = step, None
        agreed = Agreed(stop=any_says(should_stop(), world))  # what the processes want and know
        refused: TooManyBadBatches | None = None

        while True:
            watchdog.reset()
            # What is due before the next step, so that the last step needs no special case. Who was asked to stop, or
            # cannot go on, keeps a checkpoint and does nothing else.
            hurried = agreed.stop or refused is not None
            done = step >= training.max_steps or hurried
            if first and step > shown and (step % training.log_every_steps == 0 or done):
                log(step, meter.read())
            if held_out_loader is not None and due(step, training.validate_every_steps, shown, done) and not hurried:
                validated = validation_loss(engine, frozen, held_out_loader, settings, schedule)
                if first:
                    log(step, {"validation_loss": validated})
            due_grid = bool(training.grid.prompts) and due(step, training.grid.every_steps, shown, done) and not hurried
            due_save = due(step, run.checkpoint_every_steps, saved, done) or (agreed.save and step > saved)
            weights = None  # averaged, on the first process: as large as the model
            with meter.saving():
                if agreed.written or due_save:
                    keeper.settle(tidy=not hurried)
                if due_save or due_grid:
                    weights = engine.gather(ema.stretches)
                if weights is not None:
                    weights |= engine.buffers()
                if due_save:
                    facts = {
                        "run": run_id,
                        "samples_seen": samples_seen,
                        "skipped_batches": skipped,
                        "history": history,
                        "loss_scale": engine.scaler_state(),
                        "validation_loss": validated,
                        "validation_samples": training.validation_samples,
                        "world_size": world.world_size,
                        "zero_stage": run.zero_stage,
                    }
                    held = {"stretches": engine.states(), "ema": weights, "room": engine.room}
                    keeper.begin(step, **held, config=config, facts=facts)
                    saved = step
            if due_grid:
                draw = partial(sample_grid, settings, data, weights, frozen, schedule, tokenizer, decode, step)
                by_first(lambda draw=draw, step=step: log_grid(step, draw(), "samples"))
                del draw
            del weights
            shown, validated = step, None  # a batch that is left out comes by here without a step
            if done:
                keeper.settle()
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

            # The processes agree on what happened before any weight is touched. A batch that is no good counts as seen,
            # but for the one that ends the run: the checkpoint that is kept then is of before it.
            agreed = meter.agree(should_stop(), keeper.is_late(), keeper.is_written())
            before, samples_seen = samples_seen, samples_seen + training.batch_size
            try:
                grad_norm = engine.update(learning_rate)
            except NonFiniteGradient as error:
                if agreed.finite and isinstance(error, GradientOverflow):  # no fault of the batch: the scale is smaller
                    overflows += 1
                    log_line.info("%s at step %d; the batch is left out", error, step + 1)
                    continue
                what = str(error) if agreed.finite else "the loss is not finite"
                report = non_finite(output, what, step + 1, samples_seen, keys, meter.own_loss_is_finite)
                if skipped == training.max_skipped_batches:
                    refused = TooManyBadBatches(f"{report}\n{refusal(skipped + 1, training, before)}")
                    refused.__cause__, samples_seen = error, before
                    continue
                skipped += 1
                say(f"skipped/samples-{samples_seen:012d}", f"{report}\nthe batch is left out")
                continue
            ema.update()
            step += 1
            counts = {"samples_seen": samples_seen, "skipped_batches": skipped}
            if engine.loss_scale is not None:
                counts |= {"loss_scale": engine.loss_scale, "overflows": overflows}
            meter.end_step(training.batch_size, grad_norm, learning_rate=learning_rate, **counts)

        watchdog.reset(long=True)  # files are copied, threads end
        if refused is not None:
            raise refused
        if not hurried:
            copier.patience = copies.END_SECONDS
    return saved


def due(step: int, every: int | None, last: int, done: bool) -> bool:
    """Whether something that happens every so often, and at the end, is due at this step; it was at `last`."""
    return every is not None and step > last and (step % every == 0 or done)

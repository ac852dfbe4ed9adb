"""Training steps on random latents: images a second, share of the peak, and the memory that was reckoned.

    python -m tests.benchmarks.train_speed +experiment=single_gpu_1p45b     # on a machine with a GPU
    python -m tests.benchmarks.train_speed --micro 8 32 64 --forms eager compiled +experiment=single_gpu_1p45b
    python -m tests.benchmarks.train_speed                                  # the default job's model, on a processor

The real engine, model, loss and average on one device; no data is read, nothing is saved. Every size and form has a
process of its own, so that no memory is left over from the one before, and one that is too large costs that row alone.
Arithmetic counts as python -m pipelines.plan counts it: what activation checkpointing computes again takes time and is
no work. Memory is that of tensors; of a small model on a processor, what libraries load outweighs it.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace

import torch

from ldm.diffusion.schedule import add_noise
from ldm.models.attention import AttentionBlock, SpatialTransformer
from ldm.models.blocks import ResBlock, checkpoint_activations
from ldm.models.denoiser import make_denoiser
from ldm.training.arithmetic import choose_arithmetic
from ldm.training.bad_batches import refusable
from ldm.training.budget import memory
from ldm.training.checks import schedule_of
from ldm.training.ema import Ema
from ldm.training.engine import Engine, World, join
from ldm.training.frozen import Frozen
from ldm.training.loader import Batch
from ldm.training.step import loss_of
from pipelines.config import Config, compose
from pipelines.plan import GB, costs_of
from tests.ldm.training.resident import forget_peak, measure_tensors, resident_bytes

FORMS = ("eager", "compiled", "eager+checkpointing", "compiled+checkpointing")


@dataclass(frozen=True)
class Measured:
    """What one size in one form did."""

    seconds: list[float]  # of each step
    first_seconds: float  # of the first step, which compiles
    peak_bytes: float  # of tensors; on a processor of what the process took beside what it had before
    expected_bytes: float


def shaped(overrides: list[str], size: int, form: str, accumulation: int) -> Config:
    """The configuration with micro batches of a size, in a form."""
    config = compose(overrides)
    train, training = config.cluster.train, config.training
    run = replace(
        train.run,
        micro_batch_size=size,
        compile="compiled" in form,
        activation_checkpointing="checkpointing" in form,
    )
    grid = replace(training.grid, every_steps=None)  # none is drawn here
    training = replace(training, batch_size=size * accumulation, grid=grid)
    train = replace(train, run=run, workers=1)
    return replace(config, training=training, cluster=replace(config.cluster, train=train))


def random_batch(config: Config, device: torch.device) -> Batch:
    """Latents, noise and captions of a micro batch."""
    network, size = config.autoencoder.network, config.cluster.train.run.micro_batch_size
    side = config.dataset.precompute_latents.resolution // network.factor
    z0, eps = (torch.randn(size, network.latent_channels, side, side, device=device) for _ in range(2))
    t = torch.randint(config.diffusion.timesteps, (size,), device=device)
    text = config.text_encoder
    words = {} if text is None else {"tokens": torch.randint(text.vocab_size, (size, text.length), device=device)}
    return Batch([], torch.arange(size), z0, eps, t, words)


def measure(overrides: list[str], size: int, form: str, accumulation: int, steps: int) -> Measured:
    """Trains in this process: a step to compile and to make the optimizer's states, one more, then those that count."""
    if not torch.cuda.is_available():
        measure_tensors()
    world = join()
    config = shaped(overrides, size, form, accumulation)
    training, how = config.training, config.cluster.train.run
    torch.set_num_threads(how.threads)
    choose_arithmetic(training)
    start_counting(world)
    before = taken(world)
    denoiser = make_denoiser(config.unet, config.text_encoder).to(world.device)
    frozen = Frozen(denoiser, training.precision)
    if how.activation_checkpointing:
        checkpoint_activations(denoiser, (ResBlock, SpatialTransformer, AttentionBlock))
    engine = Engine(denoiser, training, how, world)
    ema = Ema(engine.stretches(), training.ema_decay, lambda name: training.ema_of == "all" or name.startswith("unet."))
    schedule, batch = schedule_of(config.diffusion).to(world.device), random_batch(config, world.device)
    seconds = []
    for _ in range(2 + steps):
        started = time.perf_counter()
        for _ in range(engine.accumulation):
            z_t = add_noise(schedule, batch.z0, batch.eps, batch.t)
            prediction = engine(z_t, batch.t, frozen.encode(batch.condition))
            engine.backward(refusable(loss_of(config.diffusion, schedule, prediction, batch)))
        engine.update(training.learning_rate)
        ema.update()
        if world.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    expected = memory(costs_of(config), training, how, world)
    return Measured(seconds[2:], seconds[0], taken(world, peak=True) - before, expected.total() - expected.reserve)


def start_counting(world: World) -> None:
    if world.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        forget_peak()


def taken(world: World, peak: bool = False) -> float:
    """Bytes of tensors on the device, or of this process on a processor."""
    if world.device.type == "cuda":
        return torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()
    return resident_bytes("VmHWM" if peak else "VmRSS")


def row(config: Config, size: int, form: str, found: Measured) -> str:
    """A line of the table."""
    train, training = config.cluster.train, config.training
    rate = training.batch_size / statistics.median(found.seconds)
    share = rate * costs_of(config).step_flop() / train.gpu.peak_flops if train.gpu else float("nan")
    return (
        f"{form:24} {size:5} {rate:9.1f} {share:7.1%} {found.peak_bytes / GB:8.2f} {found.expected_bytes / GB:8.2f} "
        f"{found.peak_bytes / found.expected_bytes:6.2f} {min(found.seconds):8.3f} {max(found.seconds):8.3f} "
        f"{found.first_seconds:7.1f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--micro", type=int, nargs="+", default=None, help="micro batches; none: the configured one")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=["eager"])
    parser.add_argument("--accumulation", type=int, default=1, help="micro batches of a step")
    parser.add_argument("--steps", type=int, default=10, help="that count")
    parser.add_argument("overrides", nargs="*", help="of the configuration, as for pipelines.run")
    asked, more = parser.parse_known_args()
    overrides = [*asked.overrides, *more]
    config = compose(overrides)
    sizes = asked.micro or [config.cluster.train.run.micro_batch_size]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "a processor"
    print(f"{config.name} on {device}, torch {torch.__version__}, precision {config.training.precision}, ZeRO stage "
          f"{config.cluster.train.run.zero_stage}, {asked.accumulation} micro batches a step", flush=True)  # fmt: skip
    print(f"{'form':24} {'micro':>5} {'images/s':>9} {'of peak':>7} {'GB':>8} {'reckoned':>8} {'ratio':>6} "
          f"{'fastest':>8} {'slowest':>8} {'first':>7}", flush=True)  # fmt: skip
    for form in asked.forms:
        for size in sizes:
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                try:
                    found = pool.submit(measure, overrides, size, form, asked.accumulation, asked.steps).result()
                    print(row(shaped(overrides, size, form, asked.accumulation), size, form, found), flush=True)
                except torch.OutOfMemoryError:
                    print(f"{form:24} {size:5} does not fit", flush=True)


if __name__ == "__main__":
    main()

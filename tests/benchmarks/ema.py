"""What averaging the weights costs a training step (goal: under 1%).

    python -m tests.benchmarks.ema                                  # the default job's model
    python -m tests.benchmarks.ema --batch 4 training.ema_of=unet   # any configuration

Steps with and without it take turns, under DeepSpeed in one process, so that a busy machine slows both alike; all the
weights are averaged here, of which several processes would have a share each. The update is also timed by itself:
beside steps of a second the difference of two medians says little.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import replace

import torch

from ldm.config import TrainSettings
from ldm.diffusion.schedule import add_noise
from ldm.models.denoiser import make_denoiser
from ldm.training.checks import schedule_of
from ldm.training.ema import Ema
from ldm.training.engine import Engine, join
from ldm.training.loader import Batch
from ldm.training.step import loss_of
from pipelines.config import Config, compose


def make_batch(config: Config, size: int, device: torch.device) -> Batch:
    network = config.autoencoder.network
    side = config.dataset.precompute_latents.resolution // network.factor
    z0, eps = (torch.randn(size, network.latent_channels, side, side, device=device) for _ in range(2))
    t = torch.randint(config.diffusion.timesteps, (size,), device=device)
    tokens = torch.zeros(size, config.text_encoder.length, dtype=torch.int64, device=device)
    return Batch([], torch.arange(size), z0, eps, t, {"tokens": tokens})


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def measure(config: Config, size: int, steps: int) -> tuple[dict[bool, list[float]], list[float]]:
    """(seconds of each step, by whether weights were averaged in it; seconds of the averaging alone)"""
    world, run = join(), config.cluster.train.run
    torch.set_num_threads(run.threads)
    training = replace(config.training, batch_size=size)
    settings = TrainSettings(config.unet, config.text_encoder, config.diffusion, training)
    engine = Engine(make_denoiser(config.unet, config.text_encoder).to(world.device), training,
                    replace(run, micro_batch_size=size), world)  # fmt: skip
    ema = Ema(engine.stretches(), training.ema_decay, lambda name: training.ema_of == "all" or name.startswith("unet."))
    schedule, batch = schedule_of(settings.diffusion).to(world.device), make_batch(config, size, world.device)
    numbers = sum(stretch.tensors["weight"].numel() for stretch in ema.stretches)
    averaged = "all" if training.ema_of == "all" else "those of the U-Net"
    print(f"{numbers:,} weights, {averaged} averaged; {size} samples a step on {world.device}")
    whole: dict[bool, list[float]] = {True: [], False: []}
    alone = []
    for step in range(2 * steps + 2):
        with_it, started = step % 2 == 0, time.perf_counter()
        prediction = engine(add_noise(schedule, batch.z0, batch.eps, batch.t), batch.t, batch.condition)
        engine.backward(loss_of(settings.diffusion, schedule, prediction, batch).mean())
        engine.update(training.learning_rate)
        synchronise(world.device)
        before = time.perf_counter()
        if with_it:
            ema.update()
            synchronise(world.device)
        now = time.perf_counter()
        if step > 1:  # the first of each kind takes memory
            whole[with_it].append(now - started)
            alone += [now - before] if with_it else []
    return whole, alone


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, help="samples of a step; else those that the configuration trains with")
    parser.add_argument("--steps", type=int, default=30, help="of each kind")
    parser.add_argument("overrides", nargs="*", help="of the configuration")
    args = parser.parse_args()
    config = compose(args.overrides)
    whole, alone = measure(config, args.batch or config.training.batch_size, args.steps)
    with_it, without, update = (1e3 * statistics.median(each) for each in (whole[True], whole[False], alone))
    print(f"a step with the average {with_it:.1f} ms, without {without:.1f} ms, medians of {args.steps} in turn")
    print(f"the average alone {update:.2f} ms: {update / without:.2%} of a step (goal: under 1%)")


if __name__ == "__main__":
    main()

"""What training will cost before it starts: memory for each device, arithmetic, days, money.

    python -m pipelines.plan +experiment=laion400m_1p45b
    python -m pipelines.plan +experiment=laion400m_1p45b cluster.train.workers=40 cluster.train.gpu.price_per_hour=3

Nothing is read but the configuration, and no GPU is needed: the model is built without memory and run once. Settings
that training would refuse are refused here too.

    python -m pipelines.plan +experiment=openmoji_autoencoder +stage=train_autoencoder

says the same of the training of an autoencoder, and

    python -m pipelines.plan +experiment=laion400m_1p45b +stage=precompute_latents

encodes noise on this machine, which should be one of those that are to encode, and says which batch goes fastest there.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from pipelines import plan_encoding
from pipelines.config import Config, ConfigError, compose
from pipelines.settings import GpuConfig

if TYPE_CHECKING:
    from ldm.training.budget import Memory
    from ldm.training.costs import AutoencoderCosts, ModelCosts

GB = 1e9
MOST_COLUMNS = 10


class Plan(Protocol):
    """What a training needs of its devices."""

    config: Config
    gpu: GpuConfig

    @property
    def devices(self) -> int: ...
    @property
    def bytes(self) -> float: ...  # of each device
    @property
    def gpu_hours(self) -> float: ...
    def lines(self) -> list[str]: ...  # what is said below the headline


@dataclass(frozen=True)
class TrainingPlan:
    """The diffusion model's training, with what it costs."""

    config: Config
    gpu: GpuConfig
    costs: ModelCosts
    autoencoder_bytes: float

    def memory(self, zero_stage: int | None = None, micro_batch_size: int | None = None) -> Memory:
        """Of each device, at the configured stage and micro batch unless told otherwise; raises ValueError where the
        engine would refuse them."""
        import torch

        from ldm.training.budget import memory
        from ldm.training.engine_config import World
        from pipelines.model_check import check_layout

        train = self.config.cluster.train
        run = replace(
            train.run,
            zero_stage=train.run.zero_stage if zero_stage is None else zero_stage,
            micro_batch_size=micro_batch_size or train.run.micro_batch_size,
        )
        check_layout(self.config.training, replace(train, run=run))
        world = World(0, train.workers, torch.device("cuda" if train.num_gpus else "cpu"))
        return memory(self.costs, self.config.training, run, world, self.autoencoder_bytes)

    @property
    def devices(self) -> int:
        return self.config.cluster.train.workers

    @property
    def bytes(self) -> float:
        return self.memory().total()

    @property
    def gpu_hours(self) -> float:
        from ldm.training.budget import gpu_seconds

        how, speed = self.config.cluster.train.run, self.gpu.peak_flops * self.gpu.mfu
        return gpu_seconds(self.costs, self.config.training, how, speed) / 3600

    def lines(self) -> list[str]:
        """What the command prints of it."""
        config, costs, training = self.config, self.costs, self.config.training
        train = config.cluster.train
        run, memory, peaks = train.run, self.memory(), self.memory().peaks()
        total = costs.step_flop() * training.batch_size * training.max_steps
        again = costs.blocks_flop if run.activation_checkpointing else 0.0
        parts = {name: getattr(memory, name) for name in ("weights", "gradients", "optimizer", "average", "activations",
                 "buckets", "gathered", "reserve")}  # fmt: skip
        return [
            f"training     {training.max_steps:,} steps of {training.batch_size:,} at "
            f"{config.dataset.precompute_latents.resolution} px",
            f"parameters   {costs.trained:,} trained, {costs.frozen:,} frozen",
            f"arithmetic   {number(costs.step_flop())}FLOP for a sample, {total:.2e} FLOP in all"
            + (f"; activation checkpointing computes {number(again)}FLOP of a sample again" if again else ""),
            f"speed        {training.batch_size * training.max_steps / (self.gpu_hours * 3600 / train.workers):,.0f} "
            f"samples/s, if {self.gpu.mfu:.1%} of the peak is reached",
            f"memory       {', '.join(f'{name} {x / GB:.1f}' for name, x in parts.items() if x)} GB at ZeRO stage "
            f"{run.zero_stage}, micro batch {run.micro_batch_size}",
            f"most         {', '.join(f'{name} {x / GB:.1f}' for name, x in peaks.items())} GB",
            "",
            *self._table(),
        ]

    def _table(self) -> list[str]:
        """Memory by ZeRO stage and micro batch, of those that the engine takes."""
        train = self.config.cluster.train
        checkpointing = "with" if train.run.activation_checkpointing else "without"
        sizes = micro_batches(self.config.training.batch_size // train.workers, train.run.micro_batch_size)
        lines = [
            f"GB of each {unit(self)} by ZeRO stage and micro batch, {checkpointing} activation checkpointing; "
            f"* is too much:",
            "stage " + "".join(f"{n:>8}" for n in sizes),
        ]
        for stage in range(4):
            try:
                totals = [self.memory(stage, n).total() for n in sizes]
            except ValueError:  # the engine refuses this stage with these settings
                continue
            marks = (f"{x / GB:.1f}" + ("*" if x > self.gpu.memory_bytes else " ") for x in totals)
            lines.append(f"{stage:<6}" + "".join(f"{mark:>8}" for mark in marks))
        return lines


@dataclass(frozen=True)
class AutoencoderPlan:
    """The autoencoder's training, in one process on cores of one machine."""

    config: Config
    gpu: GpuConfig  # a core
    costs: AutoencoderCosts

    @property
    def devices(self) -> int:
        return self.config.autoencoder_training.threads

    @property
    def bytes(self) -> float:
        return self.process_bytes / self.devices

    @property
    def process_bytes(self) -> float:
        from ldm.training.budget import RESERVE_BYTES

        return self.costs.memory_bytes + RESERVE_BYTES["cpu"]

    @property
    def gpu_hours(self) -> float:
        return self.costs.core_seconds(self.gpu.peak_flops) / 3600

    def lines(self) -> list[str]:
        """What the command prints of it."""
        training, costs = self.config.autoencoder_training, self.costs
        return [
            f"training     {training.max_steps:,} steps of {training.batch_size:,}, pieces of {training.crop_size} px, "
            f"then pictures of {training.image_size} px",
            f"parameters   {costs.trained:,} trained",
            f"arithmetic   {number(costs.step_flop)}FLOP for a picture, {costs.total_flop:.2e} FLOP in all",
            f"memory       {self.process_bytes / GB:.1f} GB, and {3 * training.image_size**2 / 1e6:.2f} MB for each "
            f"picture of the set",
        ]


def make(config: Config) -> Plan:
    """Of the training that a configuration asks for: the diffusion model's, or with +stage=train_autoencoder the other.

    Raises ConfigError or ValueError for settings that it would refuse, and where nothing is known of the devices.
    """
    autoencoder = config.stage is not None and config.stage.name == "train_autoencoder"
    return make_autoencoder_plan(config) if autoencoder else make_plan(config)


def make_plan(config: Config) -> TrainingPlan:
    from pipelines.model_check import check_training

    gpu = gpu_of(config)
    check_training(config)
    return TrainingPlan(config, gpu, costs_of(config), autoencoder_bytes(config))


def gpu_of(config: Config) -> GpuConfig:
    gpu = config.cluster.train.gpu
    if gpu is None:
        raise ConfigError(
            "cluster.train.gpu is null: nobody wrote down what training runs on; cluster=local and cluster=h100 do"
        )
    return gpu


def make_autoencoder_plan(config: Config) -> AutoencoderPlan:
    from ldm.training.costs import autoencoder_costs

    if config.cluster.train.num_gpus:
        raise ConfigError("an autoencoder is trained on processors; plan for cluster=local")
    return AutoencoderPlan(
        config, gpu_of(config), autoencoder_costs(config.autoencoder.network, config.autoencoder_training)
    )


def costs_of(config: Config) -> ModelCosts:
    """Of the model that a configuration trains, at the resolution that it trains at."""
    from ldm.config import TrainSettings
    from ldm.training import budget

    network, latents = config.autoencoder.network, config.dataset.precompute_latents
    side = latents.resolution // network.factor
    settings = TrainSettings(config.unet, config.text_encoder, config.diffusion, config.training)
    return budget.costs_of(settings, [network.latent_channels, side, side], latents.text_features)


def autoencoder_bytes(config: Config) -> float:
    """Of the weights, float32, of what decodes the samples that training draws."""
    import torch

    from ldm.models.autoencoder import make_autoencoder

    with torch.device("meta"):
        return 4.0 * sum(p.numel() for p in make_autoencoder(config.autoencoder.network).parameters())


def micro_batches(share: int, configured: int) -> list[int]:
    """The smallest that a process's share of a batch comes out even in, and the configured one."""
    from ldm.training.engine_config import divisors

    return sorted({*divisors(share)[:MOST_COLUMNS], configured})


def number(x: float) -> str:
    """With three digits and the letter of its size."""
    size, letter = next(pair for pair in ((1e12, "T"), (1e9, "G"), (1e6, "M")) if x >= pair[0] or pair[1] == "M")
    return f"{x / size:.3g} {letter}"


def duration(hours: float) -> str:
    if hours < 1 / 60:
        return "under a minute"
    if hours < 2:
        return f"{60 * hours:.0f} minutes"
    return f"{hours:.1f} hours" if hours < 12 else f"{hours / 24:.1f} days"


def unit(plan: Plan) -> str:
    return "GPU" if plan.config.cluster.train.num_gpus else "core"


def headline(plan: Plan) -> str:
    """One line that says what a run needs; experiments open with it."""
    digits = 0 if plan.gpu.memory_bytes >= 10 * GB else 1
    memory, most = (f"{x / GB:.{digits}f}" for x in (plan.bytes, plan.gpu.memory_bytes))
    hours, dollars = plan.gpu_hours, plan.gpu_hours * plan.gpu.price_per_hour
    return (
        f"{plan.devices} x {plan.gpu.name}, {memory} of {most} GB each; {duration(hours / plan.devices)}, "
        f"{hours:,.{0 if hours >= 10 else 1}f} {unit(plan)} hours, {dollars:,.{0 if dollars >= 10 else 2}f} USD"
    )


def describe(plan: Plan) -> str:
    """Everything that a plan says, some twenty lines."""
    return "\n".join([headline(plan), "", *plan.lines()])


def main(arguments: list[str] | None = None) -> int:
    """The command. Returns the exit code: 0 it fits, 1 it does not, 2 the request is wrong."""
    from pipelines.run import normalise

    overrides = list(sys.argv[1:] if arguments is None else arguments)
    if {"-h", "--help"} & set(overrides):
        print(__doc__)
        return 0
    try:
        config = compose(normalise(overrides))
        if config.stage is not None and config.stage.name == "precompute_latents":
            return plan_encoding.find_batch_size(config)
        plan = make(config)
    except (ConfigError, ValueError) as error:
        print(f"\n{error}\n", file=sys.stderr)
        return 2
    print(describe(plan))
    if plan.bytes > plan.gpu.memory_bytes:
        print("\nIt does not fit: raise cluster.train.run.zero_stage, or lower cluster.train.run.micro_batch_size, or "
              "set cluster.train.run.activation_checkpointing=true", file=sys.stderr)  # fmt: skip
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What training will cost before it starts: memory for each GPU, arithmetic, days, money.

    python -m pipelines.plan +experiment=laion400m_1p45b
    python -m pipelines.plan +experiment=laion400m_1p45b cluster.train.workers=64 cluster.train.gpu.price_per_hour=3

Nothing is read but the configuration, and no GPU is needed: the model is built without memory and run once. What
cluster.train.run.deepspeed offloads is not counted.

    python -m pipelines.plan +experiment=laion400m_1p45b +stage=precompute_latents

encodes noise on this machine, which should be one of those that are to encode, and says which batch goes fastest there.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pipelines import plan_encoding
from pipelines.config import Config, ConfigError, compose
from pipelines.settings import GpuConfig

if TYPE_CHECKING:
    from ldm.training.budget import Memory, ModelCosts

GB = 1e9
MICRO_BATCHES = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Plan:
    """A configuration with what its model costs."""

    config: Config
    gpu: GpuConfig
    costs: ModelCosts

    def memory(self, zero_stage: int | None = None, micro_batch_size: int | None = None) -> Memory:
        """Of each GPU, at the configured stage and micro batch unless told otherwise."""
        from ldm.training.budget import memory

        train = self.config.cluster.train
        run = replace(
            train.run,
            zero_stage=train.run.zero_stage if zero_stage is None else zero_stage,
            micro_batch_size=micro_batch_size or train.run.micro_batch_size,
        )
        return memory(self.costs, self.config.training, run, train.workers)

    @property
    def gpu_hours(self) -> float:
        from ldm.training.budget import gpu_seconds

        return gpu_seconds(self.costs, self.config.training, self.gpu.peak_flops, self.gpu.mfu) / 3600

    @property
    def days(self) -> float:
        return self.gpu_hours / self.config.cluster.train.workers / 24

    @property
    def dollars(self) -> float:
        return self.gpu_hours * self.gpu.price_per_hour


def make_plan(config: Config) -> Plan:
    """Raises ConfigError where the configuration names no GPU to reckon with."""
    gpu = config.cluster.train.gpu
    if gpu is None:
        raise ConfigError(
            "cluster.train.gpu is null: training runs on processors, whose speed nobody wrote down; "
            "plan for a cluster with GPUs, cluster=h100 for example"
        )
    return Plan(config, gpu, costs_of(config))


def costs_of(config: Config) -> ModelCosts:
    """Of the model that a configuration trains, at the resolution that it trains at."""
    from ldm.config import TrainSettings
    from ldm.training import budget

    network = config.autoencoder.network
    side = config.dataset.precompute_latents.resolution // network.factor
    settings = TrainSettings(config.unet, config.text_encoder, config.diffusion, config.training)
    return budget.costs_of(settings, [network.latent_channels, side, side])


def headline(plan: Plan) -> str:
    """One line that says what a run needs; experiments open with it."""
    train, memory = plan.config.cluster.train, plan.memory()
    return (
        f"{train.workers} x {plan.gpu.name}, {memory.total() / GB:.0f} of {plan.gpu.memory_bytes / GB:.0f} GB each; "
        f"{plan.days:.1f} days, {plan.gpu_hours:,.0f} GPU hours, {plan.dollars:,.0f} USD"
    )


def describe(plan: Plan) -> str:
    """Everything that a plan says, some twenty lines."""
    config, costs, training = plan.config, plan.costs, plan.config.training
    run, memory = config.cluster.train.run, plan.memory()
    total = costs.step_flop() * training.batch_size * training.max_steps
    checkpointing = "with" if run.activation_checkpointing else "without"
    parts = {"weights": memory.weights, "gradients": memory.gradients, "optimizer": memory.optimizer,
             "average": memory.average, "activations": memory.activations}  # fmt: skip
    lines = [
        headline(plan),
        "",
        f"training     {training.max_steps:,} steps of {training.batch_size:,} at "
        f"{config.dataset.precompute_latents.resolution} px",
        f"parameters   {costs.trained:,} trained, {costs.frozen:,} frozen",
        f"arithmetic   {costs.step_flop() / 1e12:.2f} TFLOP for a sample, {total:.2e} FLOP in all",
        f"speed        {config.cluster.train.workers * plan.gpu.peak_flops * plan.gpu.mfu / costs.step_flop():,.0f} "
        f"samples/s, if {plan.gpu.mfu:.1%} of the peak is reached",
        f"memory       {', '.join(f'{name} {x / GB:.1f}' for name, x in parts.items())} GB at ZeRO stage "
        f"{run.zero_stage}, micro batch {run.micro_batch_size}",
        "",
        f"GB of each GPU by ZeRO stage and micro batch, {checkpointing} activation checkpointing; * is too much:",
        "stage " + "".join(f"{n:>8}" for n in MICRO_BATCHES),
    ]
    for stage in range(4):
        totals = [plan.memory(stage, n).total() for n in MICRO_BATCHES]
        marks = (f"{x / GB:.1f}" + ("*" if x > plan.gpu.memory_bytes else " ") for x in totals)
        lines.append(f"{stage:<6}" + "".join(f"{mark:>8}" for mark in marks))
    return "\n".join(lines)


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
        plan = make_plan(config)
    except (ConfigError, ValueError) as error:
        print(f"\n{error}\n", file=sys.stderr)
        return 2
    print(describe(plan))
    if plan.memory().total() > plan.gpu.memory_bytes:
        print("\nIt does not fit: raise cluster.train.run.zero_stage, or lower cluster.train.run.micro_batch_size, or "
              "set cluster.train.run.activation_checkpointing=true", file=sys.stderr)  # fmt: skip
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

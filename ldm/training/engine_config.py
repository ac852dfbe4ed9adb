"""What DeepSpeed is told: a configuration made of our settings, and of the keys that the user passes on.

Everything that can be refused without asking DeepSpeed is refused here, by the settings' own names.
"""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import torch

from ldm.config import TrainingConfig, TrainingRunConfig

WHERE = "cluster.train.run.deepspeed"
PRECISIONS = ("float32", "bf16_autocast", "bf16", "fp16")
WEIGHTS = {"bf16": torch.bfloat16, "fp16": torch.float16}  # dtype that the model computes with; others: float32

# Keys of DeepSpeed's configuration that follow from settings of ours, and those settings.
OWNED = {
    "train_batch_size": "training.batch_size",
    "train_micro_batch_size_per_gpu": "cluster.train.run.micro_batch_size",
    "gradient_accumulation_steps": "training.batch_size and cluster.train.run.micro_batch_size",
    "gradient_clipping": "training.gradient_clipping",
    "optimizer": "training.learning_rate, beta1, beta2, epsilon and weight_decay",
    "scheduler": "training.lr_schedule",
    "bf16.enabled": "training.precision",
    "fp16.enabled": "training.precision",
    "fp16.loss_scale": "training.precision, whose scale follows the overflows",
    "torch_autocast": "training.precision",
    "zero_optimization.stage": "cluster.train.run.zero_stage",
}

# What else DeepSpeed may be told. It takes no notice of other words, so they are refused.
PASSED_ON = (
    "zero_optimization", "bf16", "fp16", "data_types", "aio", "communication_data_type", "prescale_gradients",
    "gradient_predivide_factor", "comms_logger", "flops_profiler", "wall_clock_breakdown", "memory_breakdown",
    "dump_state", "timers", "tensorboard", "wandb", "csv_monitor", "comet", "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer", "disable_python_gc",
)  # fmt: skip


@dataclass(frozen=True)
class World:
    """This process among the others."""

    rank: int
    world_size: int
    device: torch.device


def accumulation(batch_size: int, micro_batch_size: int, world_size: int) -> int:
    """Micro batches of each process in a step. Raises ValueError, naming what fits, where they do not come out even."""
    counts = {
        "training.batch_size": batch_size,
        "cluster.train.run.micro_batch_size": micro_batch_size,
        "cluster.train.workers": world_size,
    }
    if wrong := [f"{name} is {n}" for name, n in counts.items() if n < 1]:
        raise ValueError(f"{', '.join(wrong)}; it is at least 1")
    if batch_size % world_size:
        low = batch_size // world_size * world_size
        sizes = divisors(batch_size)
        nearest = [max(n for n in sizes if n < world_size), *[n for n in sizes if n > world_size][:1]]
        fit = " and ".join(
            f"cluster.train.workers={n} with cluster.train.run.micro_batch_size="
            f"{max(m for m in divisors(batch_size // n) if m <= max(1, micro_batch_size))}"
            for n in nearest
        )
        raise ValueError(
            f"training.batch_size is {batch_size}, which {world_size} processes cannot share equally; the nearest "
            f"numbers of processes that can: {fit}; the nearest batch sizes, for a new run: "
            f"{' and '.join(str(n) for n in (low, low + world_size) if n)}"
        )
    share = batch_size // world_size
    if share % micro_batch_size:
        fit = divisors(share)
        raise ValueError(
            f"cluster.train.run.micro_batch_size is {micro_batch_size}, which does not divide the {share} samples that "
            f"each of {world_size} processes has of a batch; these do: {', '.join(map(str, fit))}"
        )
    return share // micro_batch_size


def divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def refuse(training: TrainingConfig, how: TrainingRunConfig) -> None:
    """Raises ValueError where settings mean nothing, or do not go with each other."""
    if how.zero_stage not in (0, 1, 2, 3):
        raise ValueError(f"cluster.train.run.zero_stage is {how.zero_stage}; there are: 0, 1, 2, 3")
    if training.learning_rate <= 0:
        raise ValueError(f"training.learning_rate is {training.learning_rate}; it is above 0")
    if training.gradient_clipping is not None and training.gradient_clipping <= 0:
        raise ValueError(f"training.gradient_clipping is {training.gradient_clipping}; it is above 0, or null for none")
    if training.precision not in PRECISIONS:
        raise ValueError(f"training.precision is {training.precision!r}; there are: {', '.join(PRECISIONS)}")
    if training.precision in WEIGHTS and how.zero_stage == 0:
        raise ValueError(
            f"training.precision={training.precision} keeps float32 masters only from cluster.train.run.zero_stage=1 "
            f"on; set that"
        )
    if how.compile and how.zero_stage == 3:
        raise ValueError(
            "cluster.train.run.compile does not go with cluster.train.run.zero_stage=3, which swaps weights in and out "
            "while a graph runs; set the one to false or the other to 2"
        )


def told(training: TrainingConfig, how: TrainingRunConfig, world: World) -> dict[str, Any]:
    """DeepSpeed's configuration: our settings, and the keys that the user passes through."""
    refuse(training, how)
    zero: dict[str, Any] = {"stage": how.zero_stage}
    if world.device.type == "cpu":
        # Nothing overlaps on a processor, so gradients need no buffer of their own (measured: 1.3 times as quick).
        zero |= {"overlap_comm": False}
        if how.zero_stage < 3:
            zero |= {"contiguous_gradients": False, "reduce_scatter": False}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": how.micro_batch_size,
        "gradient_accumulation_steps": accumulation(training.batch_size, how.micro_batch_size, world.world_size),
        # At stage 0 update() clips by itself: DeepSpeed would divide by a norm that is not finite.
        "gradient_clipping": (training.gradient_clipping or 0.0) if how.zero_stage else 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,  # torch's AdamW, which needs no compiler
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**62,
        "bf16": {"enabled": training.precision == "bf16"},
        # The loss is multiplied by a power of two, so that small gradients are not lost; it is halved at once when they
        # overflow, and doubled after a thousand steps without.
        "fp16": {
            "enabled": training.precision == "fp16",
            "initial_scale_power": 16,
            "loss_scale_window": 1000,
            "hysteresis": 1,
            "min_loss_scale": 1,
        },
        # No module's gradients are rounded to bfloat16 on their way between processes.
        "torch_autocast": {
            "enabled": training.precision == "bf16_autocast",
            "dtype": "bfloat16",
            "lower_precision_safe_modules": [],
        },
    }
    if training.precision == "bf16":
        # A number of bf16 has eight bits: in a sum of forty like it, it would keep three.
        config["data_types"] = {"grad_accum_dtype": "fp32"}
        if how.zero_stage == 1:
            # Processes exchange the sums, once a step: these are not rounded for it, and no gradient stays in bf16 too.
            config["communication_data_type"] = "fp32"
            config["bf16"] = {"enabled": True, "immediate_grad_update": True}
    return _passed_on(config, how.deepspeed)


def _passed_on(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """Our configuration with the user's keys in it. Raises ValueError where one is none of DeepSpeed's, or ours."""
    for key in theirs:
        if key not in (*OWNED, *PASSED_ON):
            close = get_close_matches(key, PASSED_ON, 1)
            meant = f"; did you mean {close[0]}?" if close else f"; there are: {', '.join(sorted(PASSED_ON))}"
            raise ValueError(f"{WHERE}.{key} is nothing that is passed on to DeepSpeed{meant}")
        if isinstance(ours.get(key), dict) and not isinstance(theirs[key], dict):
            raise ValueError(f"{WHERE}.{key} is {theirs[key]!r}; it is a section of keys and values")
    return _merged(ours, theirs, "")


def offloaded_to(how: TrainingRunConfig, part: str) -> str:
    """Where DeepSpeed's keys put "offload_optimizer" or "offload_param": "none", "cpu" or "nvme"."""
    zero: Any = how.deepspeed.get("zero_optimization") or {}
    return (zero.get(part) or {}).get("device", "none")


def check_kept(how: TrainingRunConfig) -> None:
    """Raises ValueError where a run could not keep its weights: in files while it runs, or in checkpoints."""
    zero, where = how.deepspeed.get("zero_optimization"), f"{WHERE}.zero_optimization"
    if offloaded_to(how, "offload_param") == "nvme":
        raise ValueError(
            f"{where}.offload_param.device is nvme: the weights that the model computes with can be on the processor, "
            f"not in files; set it to cpu. The larger part, float32 weights and optimizer states, can: "
            f"offload_optimizer.device=nvme"
        )
    if offloaded_to(how, "offload_optimizer") == "nvme":
        key = f"{where}.offload_optimizer"
        if how.zero_stage != 3:  # DeepSpeed would keep them in the processor's memory, without a word
            raise ValueError(f"{key}.device is nvme, which needs cluster.train.run.zero_stage=3, not {how.zero_stage}")
        if not zero["offload_optimizer"].get("nvme_path"):
            raise ValueError(f"{key}.device is nvme; set {key}.nvme_path to a folder on a local disk of each machine")
    bf16: Any = how.deepspeed.get("bf16") or {}
    if bf16.get("bf16_master_weights_and_grads"):
        raise ValueError(
            f"{WHERE}.bf16.bf16_master_weights_and_grads is true: averaged weights and checkpoints "
            "are float32, and so must be the weights that they are made of; set it to false"
        )


def _merged(ours: dict[str, Any], theirs: dict[str, Any], path: str) -> dict[str, Any]:
    merged = dict(ours)
    for key, value in theirs.items():
        if path + key in OWNED:
            raise ValueError(f"{WHERE}.{path}{key} is decided by {OWNED[path + key]}; set it there")
        both = isinstance(value, dict) and isinstance(ours.get(key), dict)
        merged[key] = _merged(ours[key], value, f"{path}{key}.") if both else value  # type: ignore[arg-type]
    return merged

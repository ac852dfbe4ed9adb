"""Too little memory: told by the settings that take less, and met only once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ldm.config import TrainingConfig, TrainingRunConfig
from ldm.training.engine_config import divisors


class TooLittleMemory(RuntimeError):
    """A device had less memory than a step takes."""

    stops_the_run = True  # a restart would take as much


@contextmanager
def settings_named(training: TrainingConfig, run: TrainingRunConfig, world_size: int) -> Iterator[None]:
    """Lets torch's word that memory ran out say what takes less. Raises TooLittleMemory in its place."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        said = str(error).partition(". ")[0]
        ways = "; ".join(ways_to_take_less(training, run, world_size)) or "a GPU with more memory"
        raise TooLittleMemory(
            f"{said}. What takes less: {ways}. `python -m pipelines.plan` with the same settings says how much of each "
            f"a GPU holds; what is on disk stays, and the same command goes on from the newest checkpoint"
        ) from error


def ways_to_take_less(training: TrainingConfig, run: TrainingRunConfig, world_size: int) -> list[str]:
    """Settings that change no result, as they are written on the command line, with what they are now."""
    ways, sizes = [], [n for n in divisors(training.batch_size // world_size) if n < run.micro_batch_size]
    if sizes:
        ways.append(f"cluster.train.run.micro_batch_size={sizes[-1]} (now {run.micro_batch_size})")
    if not run.activation_checkpointing:
        ways.append("cluster.train.run.activation_checkpointing=true (now false)")
    if world_size > 1 and run.zero_stage < (2 if run.compile else 3):
        ways.append(f"cluster.train.run.zero_stage={run.zero_stage + 1} (now {run.zero_stage})")
    return ways

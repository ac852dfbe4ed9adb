"""What a run says of itself: of waiting and memory what the worst process had, and nothing twice or left out."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ldm.training import meter as module
from ldm.training.engine import World
from ldm.training.meter import Agreed, Meter
from tests.ldm.training import processes


def steps() -> tuple[dict[str, float], list[Agreed]]:
    """One process of two, by a clock of its own: two steps, a batch that is left out between them, and a save."""
    import torch.distributed as dist

    rank, now = dist.get_rank(), [0.0]
    module.time.perf_counter = lambda: now[0]
    world = World(rank, dist.get_world_size(), torch.device("cpu"))
    meter = Meter(world, share_of_peak=0.01)
    meter._memory = lambda: (1 + rank) * 1000
    agreed = []

    def step(wait: float, norm: float | None, loss: float, **says: Any) -> None:
        meter.start_step()
        with meter.waiting():
            now[0] += wait
        now[0] += 4.0
        meter.add(torch.tensor([loss, 2 * loss]), torch.tensor([0, 3]))
        agreed.append(meter.agree(**{"stop": False, "save": False, "written": False, **says}))
        if norm is not None:
            meter.end_step(8, norm, learning_rate=0.5, samples_seen=24, skipped_batches=1)

    step(1.0 if rank == 1 else 0.0, 2.0, 3.0, save=rank == 1, written=rank == 0)
    step(9.0, None, float("nan") if rank == 1 else 3.0, save=rank == 0, written=True)
    with meter.saving():
        now[0] += 7.0
    step(0.5 if rank == 0 else 0.0, 10.0, 5.0, stop=rank == 1)
    now[0] += 2.0
    return meter.read(), agreed


def test_two_steps_a_batch_left_out_and_a_save() -> None:
    (values, agreed), (others, theirs) = processes.run(steps, world_size=2)
    assert agreed == theirs == [
        Agreed(),  # a save is the first process's to ask for; one has not written
        Agreed(save=True, written=True, finite=False),
        Agreed(stop=True),
    ]
    assert values["loss"] == others["loss"] == pytest.approx(6.0)  # of both steps and both processes, not of the batch
    assert values["loss_t0"] == pytest.approx(4.0) and values["loss_t3"] == pytest.approx(8.0)
    assert (values["grad_norm"], values["grad_norm_max"]) == (6.0, 10.0)
    assert (values["learning_rate"], values["samples_seen"], values["skipped_batches"]) == (0.5, 24, 1)
    assert values["memory_bytes"] == others["memory_bytes"] == 2000
    # The first took 4 and 4.5 seconds for its steps; somebody waited 1 second in one and half a one in the other.
    assert values["samples_per_second"] == pytest.approx(16 / 8.5) and values["mfu"] == pytest.approx(0.16 / 8.5)
    assert values["input_wait"] == pytest.approx(1.5 / 8.5)
    assert values["outside_seconds"] == pytest.approx(13.0 + 7.0 + 2.0) and values["checkpoint_seconds"] == 7.0

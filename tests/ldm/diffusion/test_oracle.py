"""Samplers with an oracle in the network's place return the latent to the last digit, for any number of steps."""

from __future__ import annotations

import pytest
import torch

from ldm.diffusion.objective import target, z0_and_eps
from ldm.diffusion.sampler import ddim
from ldm.diffusion.schedule import Schedule, add_noise, make_schedule

SCHEDULES = {
    "eps": ("sqrt_linear", 0.00085, 0.012, False),
    "v": ("sqrt_linear", 0.00085, 0.012, True),
    "z0": ("cosine", None, None, False),
    "flow": ("flow", None, None, False),
}


def schedule_of(prediction_type: str) -> Schedule:
    name, start, end, zero = SCHEDULES[prediction_type]
    return make_schedule(name, 1000, start, end, zero)


@pytest.mark.parametrize("prediction_type", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 7, 30, 50, 300, 999, 1000])
@pytest.mark.parametrize("spacing", ["trailing", "leading"])
def test_ddim_with_an_oracle_returns_z0(prediction_type: str, steps: int, spacing: str) -> None:
    schedule = schedule_of(prediction_type)
    generator = torch.Generator().manual_seed(0)
    z0, eps = torch.randn(2, 2, 4, 4, 4, generator=generator, dtype=torch.float64)
    last: list[torch.Tensor] = []

    def oracle(z_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return target(prediction_type, schedule, z0, eps, t)

    first = torch.full((2,), len(schedule) - 1)
    if spacing == "leading":
        first = torch.full((2,), max(t + 1 for t in range(0, 1000, 1000 // steps) if t + 1 < 1000))
    z = ddim(oracle, add_noise(schedule, z0, eps, first), schedule, steps, prediction_type, spacing=spacing,
             each=lambda step, z_t, z0: last.append(z0))
    assert (last[-1] - z0).abs().max() < 1e-12
    if spacing == "trailing":
        assert (z - z0).abs().max() < 1e-12


@pytest.mark.parametrize("prediction_type", SCHEDULES)
def test_a_target_taken_apart_gives_back_what_it_was_made_of(prediction_type: str) -> None:
    schedule = schedule_of(prediction_type)
    z0, eps = torch.randn(2, 5, 4, 4, 4, dtype=torch.float64)
    t = torch.tensor([0, 10, 500, 900, 998])
    wanted = target(prediction_type, schedule, z0, eps, t)
    got = z0_and_eps(prediction_type, schedule, wanted, add_noise(schedule, z0, eps, t), t)
    assert (got[0] - z0).abs().max() < 1e-9 and (got[1] - eps).abs().max() < 1e-9

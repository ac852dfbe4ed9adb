"""From noise to latent. Every sampler is a function of a predictor, noise and a schedule, and knows nothing else.

predict(z_t (b, c, h, w), t (b,) int64) -> prediction (b, c, h, w), of the prediction type that is named.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.diffusion.objective import z0_and_eps
from ldm.diffusion.schedule import Schedule

Predict = Callable[[Tensor, Tensor], Tensor]
Draw = Callable[[int, Tensor], Tensor]  # (step, like) -> noise like `like`


@dataclass(frozen=True)
class Grid:
    """Timesteps of a trajectory, noisiest first, and what follows the last one."""

    t: list[int]
    last_signal: float
    last_noise: float

    def after(self, schedule: Schedule, step: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """signal and noise that step `step` leads to."""
        if step + 1 < len(self.t):
            t = self.t[step + 1]
            return schedule.signal[t].to(like), schedule.noise[t].to(like)
        return like.new_tensor(self.last_signal), like.new_tensor(self.last_noise)


def trailing(schedule: Schedule, steps: int) -> Grid:
    """`steps` timesteps from the noisiest on, ending in a clean latent (Lin et al. 2023, Table 2)."""
    if not 1 <= steps <= len(schedule):
        raise ValueError(f"{steps} sampling steps; a schedule of {len(schedule)} timesteps takes 1 to {len(schedule)}")
    t = torch.linspace(len(schedule), 0, steps + 1, dtype=torch.float64)[:-1].round().long() - 1
    return Grid(t.tolist(), 1.0, 0.0)


def leading(schedule: Schedule, steps: int) -> Grid:
    """The timesteps of the original implementation: range(0, T, T // steps) + 1, ending at alpha_bar[0].

    Where T is not a multiple of `steps` the original takes more steps than asked, and raises an index error when the
    last would be T; here the grid has exactly the timesteps that exist.
    """
    if not 1 <= steps <= len(schedule):
        raise ValueError(f"{steps} sampling steps; a schedule of {len(schedule)} timesteps takes 1 to {len(schedule)}")
    t = [t + 1 for t in range(0, len(schedule), len(schedule) // steps) if t + 1 < len(schedule)]
    return Grid(t[::-1], float(schedule.signal[0]), float(schedule.noise[0]))


SPACINGS = {"trailing": trailing, "leading": leading}


def ddim(
    predict: Predict,
    z_T: Tensor,
    schedule: Schedule,
    steps: int,
    prediction_type: str,
    *,
    eta: float = 0.0,
    spacing: str = "trailing",
    draw: Draw | None = None,
    temperature: float = 1.0,
    each: Callable[[int, Tensor, Tensor], None] | None = None,
) -> Tensor:
    """z_T (b, c, h, w) -> z0 (Song et al. 2021, Eq. 12 and 16). eta 0 is deterministic, eta 1 is ancestral.

    `draw(step, like)` gives the fresh noise that eta > 0 needs; `each(step, z_t, z0)` sees the trajectory. For flow
    and eta 0 this is Euler's method on the straight paths.
    """
    if eta and draw is None:
        raise ValueError(f"eta is {eta}, which needs fresh noise: pass draw")
    grid, z_t = SPACINGS[spacing](schedule, steps), z_T
    for step, t in enumerate(grid.t):
        here = torch.full((len(z_t),), t, dtype=torch.int64, device=z_t.device)
        z0, eps = z0_and_eps(prediction_type, schedule, predict(z_t, here), z_t, here)
        signal, noise = grid.after(schedule, step, z_t)
        sigma = eta * _ancestral_sigma(schedule.signal[t].to(z_t), signal)
        z_t = signal * z0 + (noise.square() - sigma.square()).clamp(min=0).sqrt() * eps
        if eta and draw is not None:
            z_t = z_t + sigma * temperature * draw(step, z_t)
        if each is not None:
            each(step, z_t, z0)
    return z_t


def _ancestral_sigma(signal: Tensor, next_signal: Tensor) -> Tensor:
    """Standard deviation of the noise that an ancestral step adds (Song et al. 2021, Eq. 16 with eta 1)."""
    a, p = signal.square(), next_signal.square()
    return ((1 - p) / (1 - a) * (1 - a / p)).clamp(min=0).sqrt()

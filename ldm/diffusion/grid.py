"""Which timesteps a trajectory goes through, how noisy each is, and where it ends."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ldm.diffusion.schedule import Schedule


@dataclass(frozen=True)
class Grid:
    """Timesteps of a trajectory, noisiest first, and the level of each; the one level more is where it ends."""

    t: list[int] | list[float]
    signal: list[float]
    noise: list[float]

    def __len__(self) -> int:
        return len(self.t)

    def last(self, steps: int | None) -> Grid:
        """Only the last, least noisy steps."""
        if steps is None:
            return self
        if not 1 <= steps <= len(self):
            raise ValueError(f"the last {steps} steps are asked for, of a trajectory of {len(self)}")
        start = len(self) - steps
        return Grid(self.t[start:], self.signal[start:], self.noise[start:])


def _grid_at(schedule: Schedule, t: list[int], end: tuple[float, float]) -> Grid:
    """Whole timesteps, least noisy first, and (signal, noise) of the end."""
    signal, noise = schedule.signal.tolist(), schedule.noise.tolist()
    t = t[::-1]
    return Grid(t, [*(signal[i] for i in t), end[0]], [*(noise[i] for i in t), end[1]])


def _steps_fit(schedule: Schedule, steps: int) -> None:
    if not 1 <= steps <= len(schedule):
        raise ValueError(f"{steps} sampling steps; a schedule of {len(schedule)} timesteps takes 1 to {len(schedule)}")


def trailing(schedule: Schedule, steps: int) -> Grid:
    """`steps` timesteps from the noisiest on, ending in a clean latent (Lin et al. 2023, Table 2)."""
    _steps_fit(schedule, steps)
    t = torch.linspace(0, len(schedule), steps + 1, dtype=torch.float64)[1:].round().long() - 1
    return _grid_at(schedule, t.tolist(), (1.0, 0.0))


def leading(schedule: Schedule, steps: int) -> Grid:
    """The timesteps of the original implementation: range(0, T, T // steps) + 1, ending at alpha_bar[0].

    Where T is not a multiple of `steps` this is more steps than asked, as in the original (30 become 31 of 1000); where
    the last would be T, at which the original raises an index error (300, 999, 1000), it is left out.
    """
    _steps_fit(schedule, steps)
    t = [t + 1 for t in range(0, len(schedule), len(schedule) // steps) if t + 1 < len(schedule)]
    if not t:
        raise ValueError(f"spacing leading needs 2 timesteps; the schedule has {len(schedule)}: use trailing")
    return _grid_at(schedule, t, (float(schedule.signal[0]), float(schedule.noise[0])))


def quadratic(schedule: Schedule, steps: int) -> Grid:
    """The original's other grid, dense at little noise: timesteps as squares, up to 0.8 T (Song et al. 2021, D.2).

    Where neighbours fall on one timestep the original stays there for a step; here it is taken once.
    """
    _steps_fit(schedule, steps)
    root = torch.linspace(0, math.sqrt(0.8 * len(schedule)), steps, dtype=torch.float64)
    t = sorted({int(r * r) + 1 for r in root.tolist()})
    if t[-1] >= len(schedule):
        raise ValueError(f"spacing quadratic needs timestep {t[-1]}; the schedule has {len(schedule)}: use trailing")
    return _grid_at(schedule, t, (float(schedule.signal[0]), float(schedule.noise[0])))


def karras(schedule: Schedule, steps: int, rho: float = 7.0) -> Grid:
    """Noise levels evenly spaced in sigma^(1/rho) (Karras et al. 2022, Eq. 5), ending in a clean latent.

    The timestep of a level lies between whole ones and is found in log(sigma), so predict gets t as floats.
    """
    _steps_fit(schedule, steps)
    table = schedule.sigma.cpu()
    if not bool(table.isfinite().all()):
        raise ValueError("spacing karras needs a finite sigma; this schedule ends in noise alone: use trailing")
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    low, high = table[0] ** (1 / rho), table[-1] ** (1 / rho)
    sigma = (high + ramp * (low - high)) ** rho
    after = torch.searchsorted(table, sigma.contiguous()).clamp(1, len(table) - 1)
    left, right = table[after - 1].log(), table[after].log()
    t = after - 1 + ((sigma.log() - left) / (right - left)).clamp(0, 1)
    signal = (1 + sigma.square()).rsqrt()
    return Grid(t.tolist(), [*signal.tolist(), 1.0], [*(sigma * signal).tolist(), 0.0])


SPACINGS: dict[str, Callable[[Schedule, int], Grid]] = {
    "trailing": trailing,
    "leading": leading,
    "quadratic": quadratic,
    "karras": karras,
}


def make_grid(schedule: Schedule, steps: int, spacing: str, last: int | None = None) -> Grid:
    """The grid of a name, or its last steps."""
    if spacing not in SPACINGS:
        raise ValueError(f"spacing is {spacing!r}; there are: {', '.join(SPACINGS)}")
    return SPACINGS[spacing](schedule, steps).last(last)

"""How much signal and how much noise there is at each timestep.

    z_t = signal[t] * z0 + noise[t] * eps        (Ho et al. 2020, Eq. 4; Rombach et al. 2022, Sec. 3.3)

Variance-preserving schedules have signal = sqrt(alpha_bar) and noise = sqrt(1 - alpha_bar); rectified flow (Liu et al.
2022) has signal = 1 - s and noise = s with s = (t + 1) / T. Tables are computed and kept in float64 and cast where they
meet a latent: in float32 the product of a thousand factors loses digits that samplers divide by.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

NAMES = ("sqrt_linear", "linear", "sqrt", "cosine", "flow")


@dataclass(frozen=True)
class Schedule:
    """signal and noise, each (T,) float64, from the least noisy timestep 0 to the noisiest T - 1."""

    signal: Tensor
    noise: Tensor

    def __len__(self) -> int:
        return len(self.signal)

    @property
    def alpha_bar(self) -> Tensor:
        """(T,): the share of the variance that is signal; for variance-preserving schedules."""
        return self.signal.square()

    @property
    def beta(self) -> Tensor:
        """(T,): the variance that is added from each timestep to the next (Ho et al. 2020)."""
        alpha_bar = self.alpha_bar
        return 1 - alpha_bar / torch.cat([alpha_bar.new_ones(1), alpha_bar[:-1]])

    @property
    def snr(self) -> Tensor:
        """(T,): signal to noise ratio, signal^2 / noise^2 (Kingma et al. 2021)."""
        return (self.signal / self.noise).square()

    @property
    def sigma(self) -> Tensor:
        """(T,): noise for each unit of signal, the noise level of Karras et al. 2022."""
        return self.noise / self.signal

    @property
    def straight(self) -> bool:
        """Whether latents go to noise in a straight line, as rectified flow has it."""
        return bool(((self.signal + self.noise) - 1).abs().max() < 1e-9)

    def to(self, device: torch.device | str) -> Schedule:
        """The same tables on another device."""
        return Schedule(self.signal.to(device), self.noise.to(device))

    def at(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """signal and noise at t (b,), shaped (b, 1, 1, 1) and cast to the type of `like` (b, c, h, w)."""
        shape = (-1,) + (1,) * (like.ndim - 1)
        return self.signal[t].to(like).view(shape), self.noise[t].to(like).view(shape)


def make_schedule(
    name: str, timesteps: int, beta_start: float | None, beta_end: float | None, zero_terminal_snr: bool
) -> Schedule:
    """The schedule of a name. "sqrt_linear" is what CompVis calls linear and diffusers scaled_linear.

    "linear" is what CompVis calls sqrt_linear; "cosine" (Nichol & Dhariwal 2021, Eq. 17) and "flow" have no betas to
    choose, and flow ends in noise alone by itself.
    """
    check(name, timesteps, beta_start, beta_end, zero_terminal_snr)
    if name == "flow":
        s = torch.arange(1, timesteps + 1, dtype=torch.float64) / timesteps
        return Schedule(1 - s, s)
    alpha_bar = (1 - _betas(name, timesteps, beta_start, beta_end)).cumprod(0)
    if zero_terminal_snr:
        alpha_bar = _zero_terminal(alpha_bar)
    return Schedule(alpha_bar.sqrt(), (1 - alpha_bar).sqrt())


def check(
    name: str, timesteps: int, beta_start: float | None, beta_end: float | None, zero_terminal_snr: bool
) -> None:
    """Raises ValueError for settings that make no schedule, or that would not be followed."""
    if name not in NAMES:
        raise ValueError(f"diffusion.schedule is {name!r}; there are: {', '.join(NAMES)}")
    if timesteps < 1 + zero_terminal_snr:
        raise ValueError(f"diffusion.timesteps is {timesteps}; at least {1 + zero_terminal_snr} are needed")
    if name in ("cosine", "flow"):
        if beta_start is not None or beta_end is not None:
            raise ValueError(f"diffusion.schedule={name} has no betas; set diffusion.beta_start and beta_end to null")
        if name == "flow" and zero_terminal_snr:
            raise ValueError("diffusion.schedule=flow ends in noise alone; set diffusion.zero_terminal_snr=false")
    elif beta_start is None or beta_end is None or not 0 < beta_start <= beta_end < 1:
        raise ValueError(
            f"diffusion.beta_start is {beta_start} and diffusion.beta_end is {beta_end}; schedule={name} needs "
            f"0 < beta_start <= beta_end < 1"
        )


def _betas(name: str, timesteps: int, start: float | None, end: float | None) -> Tensor:
    if name == "cosine":
        s = torch.arange(timesteps + 1, dtype=torch.float64) / timesteps
        f = torch.cos((s + 0.008) / 1.008 * math.pi / 2).square()
        return (1 - f[1:] / f[:-1]).clamp(0, 0.999)
    if name == "sqrt_linear":
        return torch.linspace(start**0.5, end**0.5, timesteps, dtype=torch.float64).square()
    beta = torch.linspace(start, end, timesteps, dtype=torch.float64)
    return beta.sqrt() if name == "sqrt" else beta


def _zero_terminal(alpha_bar: Tensor) -> Tensor:
    """Shifts and scales sqrt(alpha_bar) so that the last is 0 and the first is kept (Lin et al. 2023, Algorithm 1)."""
    root = alpha_bar.sqrt()
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])).square()


def add_noise(schedule: Schedule, z0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """z0, eps (b, c, h, w), t (b,) -> z_t (b, c, h, w)."""
    signal, noise = schedule.at(t, z0)
    return signal * z0 + noise * eps


def velocity(schedule: Schedule, z0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """z0, eps (b, c, h, w), t (b,) -> v (b, c, h, w), at right angles to z_t (Salimans & Ho 2022, App. D)."""
    signal, noise = schedule.at(t, z0)
    return signal * eps - noise * z0


def reverse(signal: float, noise: float, next_signal: float, next_noise: float) -> tuple[float, float, float]:
    """(a, b, variance) of q(z_s | z_t, z0) = N(a z_t + b z0, variance), from level t to the less noisy s.

    Kingma et al. 2021, App. A; between neighbours of a variance-preserving schedule it is Ho et al. 2020, Eq. 7. It
    holds for every z_t = signal z0 + noise eps, from a level of pure noise and on straight paths too.
    """
    alpha = signal / next_signal
    added = max(0.0, noise**2 - (alpha * next_noise) ** 2)  # variance that is added from s to t
    return alpha * (next_noise / noise) ** 2, next_signal * added / noise**2, added * (next_noise / noise) ** 2

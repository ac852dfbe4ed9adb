"""From noise to latent. Every sampler is a function of a predictor, noise and a schedule, and knows nothing else.

predict(z_t (b, c, h, w), t (b,)) -> prediction (b, c, h, w), of the prediction type that is named.

Four things are chosen apart from each other: the sampler; the grid of timesteps that it follows (`spacing`); guidance,
which wraps the predictor (ldm/diffusion/guidance.py); and inpainting, which mends z_t before each step (`mend`). All
noise comes in from outside: z_T as a tensor, fresh noise through draw(step, like), so that it can be drawn from a seed
and a prompt and be the same in any batch. `last` follows only the last, least noisy steps of the grid, from a z_t that
has been noised to where they begin (`noised`); `each(step, z_t, z0)` sees the result of every step. All samplers take
the same keywords, eta, temperature and clip apart; the deterministic ones draw nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ldm.diffusion.grid import SPACINGS as SPACINGS
from ldm.diffusion.grid import Grid, make_grid
from ldm.diffusion.objective import check_prediction_type, split
from ldm.diffusion.schedule import Schedule, reverse

Predict = Callable[[Tensor, Tensor], Tensor]
Draw = Callable[[int, Tensor], Tensor]  # (step, like) -> noise like `like`
Each = Callable[[int, Tensor, Tensor], None]
Mend = Callable[[int, float, float, Tensor], Tensor]  # (step, signal, noise, z_t) -> z_t


def ddim(
    predict: Predict,
    z_T: Tensor,
    schedule: Schedule,
    steps: int,
    prediction_type: str,
    *,
    eta: float = 0.0,
    temperature: float = 1.0,
    spacing: str = "trailing",
    last: int | None = None,
    draw: Draw | None = None,
    mend: Mend | None = None,
    each: Each | None = None,
) -> Tensor:
    """z_T (b, c, h, w) -> z0 (Song et al. 2021, Eq. 12 and 16): eta 0 is deterministic, eta 1 ancestral."""
    grid = _start(schedule, steps, spacing, last, prediction_type)
    draw = _needed(draw, f"eta is {eta}") if eta else None
    z_t = z_T
    for step in range(len(grid)):
        z_t = _mended(mend, grid, step, z_t)
        z0, eps = _answer(predict, grid, step, z_t, prediction_type)
        signal, noise = grid.signal[step + 1], grid.noise[step + 1]
        sigma = eta * math.sqrt(_reverse(grid, step)[2])
        z_t = signal * z0 + math.sqrt(max(0.0, noise**2 - sigma**2)) * eps
        if draw is not None:
            z_t = z_t + sigma * temperature * draw(step, z_t)
        _see(each, step, z_t, z0)
    return z_t


def ddpm(
    predict: Predict,
    z_T: Tensor,
    schedule: Schedule,
    steps: int,
    prediction_type: str,
    *,
    clip: float | None = None,
    spacing: str = "trailing",
    last: int | None = None,
    draw: Draw | None = None,
    mend: Mend | None = None,
    each: Each | None = None,
) -> Tensor:
    """Ancestral sampling (Ho et al. 2020, Alg. 2), on fewer timesteps where asked (Nichol & Dhariwal 2021, Sec. 4).

    `clip` keeps the predicted z0 within +-clip, for data that has such bounds; steps = T is the original's.
    """
    grid, draw = _start(schedule, steps, spacing, last, prediction_type), _needed(draw, "ddpm is ancestral")
    z_t = z_T
    for step in range(len(grid)):
        z_t = _mended(mend, grid, step, z_t)
        z0, _ = _answer(predict, grid, step, z_t, prediction_type)
        if clip is not None:
            z0 = z0.clamp(-clip, clip)
        of_z_t, of_z0, variance = _reverse(grid, step)
        z_t = of_z_t * z_t + of_z0 * z0
        if variance > 0:
            z_t = z_t + math.sqrt(variance) * draw(step, z_t)
        _see(each, step, z_t, z0)
    return z_t


def euler(
    predict: Predict,
    z_T: Tensor,
    schedule: Schedule,
    steps: int,
    prediction_type: str,
    *,
    spacing: str = "trailing",
    last: int | None = None,
    draw: Draw | None = None,
    mend: Mend | None = None,
    each: Each | None = None,
) -> Tensor:
    """Euler's method on x = z / signal over sigma (Karras et al. 2022, Alg. 1), for flow on z itself (Liu et al. 2022).

    On the same grid it takes the very steps of DDIM with eta 0; its own grid is karras.
    """
    grid = _start(schedule, steps, spacing, last, prediction_type)
    if prediction_type != "flow":
        _refuse_pure_noise(grid, "euler")
    z_t = z_T
    for step in range(len(grid)):
        z_t = _mended(mend, grid, step, z_t)
        z0, eps = _answer(predict, grid, step, z_t, prediction_type)
        (signal, next_signal), (noise, next_noise) = grid.signal[step : step + 2], grid.noise[step : step + 2]
        if prediction_type == "flow":
            z_t = z_t + (next_noise - noise) * (eps - z0)
        else:
            x, sigma, next_sigma = z_t / signal, noise / signal, next_noise / next_signal
            z_t = next_signal * (x + (next_sigma - sigma) * (x - z0) / sigma)
        _see(each, step, z_t, z0)
    return z_t


def plms(
    predict: Predict,
    z_T: Tensor,
    schedule: Schedule,
    steps: int,
    prediction_type: str,
    *,
    spacing: str = "trailing",
    last: int | None = None,
    draw: Draw | None = None,
    mend: Mend | None = None,
    each: Each | None = None,
) -> Tensor:
    """DDIM's step on an eps that is extrapolated from the last four (Liu et al. 2022, "PNDM", Eq. 12, without warm-up).

    The first step asks the network twice, for want of a history.
    """
    grid = _start(schedule, steps, spacing, last, prediction_type)
    _refuse_pure_noise(grid, "plms")
    z_t, history = z_T, []
    for step in range(len(grid)):
        z_t = _mended(mend, grid, step, z_t)
        _, eps = _answer(predict, grid, step, z_t, prediction_type)
        mixed = _adams_bashforth([eps, *history])
        if step == 0 and len(grid) > 1:
            z_next, _ = _along(grid, step, z_t, eps)
            mixed = (eps + _answer(predict, grid, step + 1, z_next, prediction_type)[1]) / 2
        z_t, z0 = _along(grid, step, z_t, mixed)
        history = [eps, *history][:3]
        _see(each, step, z_t, z0)
    return z_t


def _adams_bashforth(eps: list[Tensor]) -> Tensor:
    """The newest first: weights of the linear multistep method of as many values."""
    weights, divisor = {1: ((1,), 1), 2: ((3, -1), 2), 3: ((23, -16, 5), 12), 4: ((55, -59, 37, -9), 24)}[len(eps)]
    return sum(weight * value for weight, value in zip(weights, eps, strict=True)) / divisor


def _along(grid: Grid, step: int, z_t: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
    """DDIM's deterministic step with this eps: -> (z at the next level, z0)."""
    z0 = (z_t - grid.noise[step] * eps) / grid.signal[step]
    return grid.signal[step + 1] * z0 + grid.noise[step + 1] * eps, z0


def dpm_solver_pp_2m(
    predict: Predict,
    z_T: Tensor,
    schedule: Schedule,
    steps: int,
    prediction_type: str,
    *,
    spacing: str = "trailing",
    last: int | None = None,
    draw: Draw | None = None,
    mend: Mend | None = None,
    each: Each | None = None,
) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022, Alg. 2): second order in lambda = log(signal / noise), one call a step.

    The first step is first-order, for want of a history, and the last one too where it goes to a clean latent, whose
    lambda is infinite, or where there are fewer than 15 steps, which steadies it.
    """
    grid = _start(schedule, steps, spacing, last, prediction_type)
    log_snr = [_log(signal) - _log(noise) for signal, noise in zip(grid.signal, grid.noise, strict=True)]
    z_t, z0_before, h_before = z_T, None, 0.0
    for step in range(len(grid)):
        z_t = _mended(mend, grid, step, z_t)
        z0, _ = _answer(predict, grid, step, z_t, prediction_type)
        h = log_snr[step + 1] - log_snr[step]
        ends = step + 1 == len(grid) and (len(grid) < 15 or math.isinf(h))
        d = z0
        if z0_before is not None and not ends and math.isfinite(h_before):
            r = h_before / h
            d = (1 + 1 / (2 * r)) * z0 - 1 / (2 * r) * z0_before
        z_t = grid.noise[step + 1] / grid.noise[step] * z_t - grid.signal[step + 1] * math.expm1(-h) * d
        z0_before, h_before = z0, h
        _see(each, step, z_t, z0)
    return z_t


SAMPLERS: dict[str, Callable[..., Tensor]] = {
    "ddim": ddim,
    "ddpm": ddpm,
    "euler": euler,
    "plms": plms,
    "dpm_solver_pp_2m": dpm_solver_pp_2m,
}


def check_sampler(
    name: str, schedule: Schedule, steps: int, prediction_type: str, *, spacing: str = "trailing", eta: float = 0.0
) -> None:
    """Raises ValueError for what no sampler can follow, before anything is drawn."""
    if name not in SAMPLERS:
        raise ValueError(f"sampler is {name!r}; there are: {', '.join(SAMPLERS)}")
    if eta and name != "ddim":
        raise ValueError(f"eta is {eta}, which only ddim has; sampler={name} needs eta 0")
    grid = _start(schedule, steps, spacing, None, prediction_type)
    if name == "plms" or (name == "euler" and prediction_type != "flow"):
        _refuse_pure_noise(grid, name)


def encode(
    predict: Predict,
    z0: Tensor,
    schedule: Schedule,
    steps: int,
    prediction_type: str,
    *,
    spacing: str = "trailing",
    last: int | None = None,
    each: Each | None = None,
) -> Tensor:
    """DDIM backwards, z0 (b, c, h, w) -> the noise that leads to it (Song et al. 2021, Sec. 4.3; Eq. 14 reversed).

    `ddim` with as many steps brings it back up to the error of its steps. `last` goes only that far up the grid.
    The original tells the network the number of the step instead of its timestep; here it is the timestep.
    """
    grid = _start(schedule, steps, spacing, last, prediction_type)
    z_t = z0
    for step in reversed(range(len(grid))):
        _, eps = _answer(predict, grid, step, z_t, prediction_type)
        clean = (z_t - grid.noise[step + 1] * eps) / grid.signal[step + 1]
        z_t = grid.signal[step] * clean + grid.noise[step] * eps
        _see(each, step, z_t, clean)
    return z_t


def noised(
    schedule: Schedule, z0: Tensor, eps: Tensor, steps: int, last: int, *, spacing: str = "trailing"
) -> Tensor:
    """z0 with the noise at which the last steps of a trajectory begin: where image-to-image starts (b, c, h, w).

    The original starts one step noisier than the network is then told; here both are the same.
    """
    grid = make_grid(schedule, steps, spacing, last)
    return grid.signal[0] * z0 + grid.noise[0] * eps


def keep(z0: Tensor, mask: Tensor, draw: Draw) -> Mend:
    """Inpainting: before each step, what the mask (b, 1, h, w) keeps is replaced by z0 at that step's noise level."""

    def mend(step: int, signal: float, noise: float, z_t: Tensor) -> Tensor:
        return mask * (signal * z0 + noise * draw(step, z_t)) + (1 - mask) * z_t

    return mend


def _start(schedule: Schedule, steps: int, spacing: str, last: int | None, prediction_type: str) -> Grid:
    check_prediction_type(prediction_type, schedule)
    return make_grid(schedule, steps, spacing, last)


def _mended(mend: Mend | None, grid: Grid, step: int, z_t: Tensor) -> Tensor:
    return z_t if mend is None else mend(step, grid.signal[step], grid.noise[step], z_t)


def _answer(predict: Predict, grid: Grid, step: int, z_t: Tensor, prediction_type: str) -> tuple[Tensor, Tensor]:
    """The network's (z0, eps) at a step."""
    here = torch.tensor([grid.t[step]], device=z_t.device).expand(len(z_t))
    return split(prediction_type, predict(z_t, here), z_t, grid.signal[step], grid.noise[step])


def _reverse(grid: Grid, step: int) -> tuple[float, float, float]:
    return reverse(grid.signal[step], grid.noise[step], grid.signal[step + 1], grid.noise[step + 1])


def _see(each: Each | None, step: int, z_t: Tensor, z0: Tensor) -> None:
    if each is not None:
        each(step, z_t, z0)


def _needed(draw: Draw | None, why: str) -> Draw:
    if draw is None:
        raise ValueError(f"{why}, which needs fresh noise: pass draw")
    return draw


def _refuse_pure_noise(grid: Grid, name: str) -> None:
    if grid.signal[0] == 0:
        raise ValueError(f"sampler {name} divides by the signal, which is 0 at the first step here: use ddim")


def _log(value: float) -> float:
    return math.log(value) if value > 0 else -math.inf

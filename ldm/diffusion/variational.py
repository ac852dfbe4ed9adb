"""Diffusion as a variational model: the posterior of a step, the bound's terms (Ho et al. 2020, Sec. 3).

For variance-preserving schedules. Training uses the simple loss; these are for ancestral sampling with a learned or
mixed variance, for likelihoods in bits, and for comparing with the original's tables.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ldm.diffusion.objective import z0_error_weight
from ldm.diffusion.schedule import Schedule


def previous_alpha_bar(schedule: Schedule) -> Tensor:
    """(T,): alpha_bar of the timestep before, 1 before the first."""
    return torch.cat([schedule.alpha_bar.new_ones(1), schedule.alpha_bar[:-1]])


def posterior_variance(schedule: Schedule, beta_share: float = 0.0) -> Tensor:
    """(T,): variance of q(z_{t-1} | z_t, z0), Eq. 7, mixed with a share of beta, the other choice of Sec. 3.2."""
    exact = schedule.beta * (1 - previous_alpha_bar(schedule)) / (1 - schedule.alpha_bar)
    return (1 - beta_share) * exact + beta_share * schedule.beta


def posterior_log_variance(schedule: Schedule, beta_share: float = 0.0) -> Tensor:
    """(T,): its logarithm, cut off at 1e-20: at t = 0 the variance is 0."""
    return posterior_variance(schedule, beta_share).clamp(min=1e-20).log()


def posterior_mean_weights(schedule: Schedule) -> tuple[Tensor, Tensor]:
    """What z0 and z_t weigh in the mean of q(z_{t-1} | z_t, z0), each (T,): Eq. 7."""
    before, alpha_bar = previous_alpha_bar(schedule), schedule.alpha_bar
    of_z0 = schedule.beta * before.sqrt() / (1 - alpha_bar)
    return of_z0, (1 - before) * (1 - schedule.beta).sqrt() / (1 - alpha_bar)


def posterior(schedule: Schedule, z0: Tensor, z_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean (b, c, h, w), variance and cut-off log variance (b, 1, 1, 1) of q(z_{t-1} | z_t, z0), t (b,)."""
    shape = (-1,) + (1,) * (z_t.ndim - 1)
    of_z0, of_z_t, variance, log_variance = (
        table[t].to(z_t).view(shape)
        for table in (*posterior_mean_weights(schedule), posterior_variance(schedule), posterior_log_variance(schedule))
    )
    return of_z0 * z0 + of_z_t * z_t, variance, log_variance


def bound_weight(prediction_type: str, schedule: Schedule, beta_share: float = 0.0) -> Tensor:
    """(T,): weight of the squared error in the prediction that makes it a term of the bound, in nats (Eq. 12).

    At t = 0, where the variance is 0, it is that of t = 1, as in the original; the original's tables for predictions
    of z0 and v are of another form and are not followed.
    """
    of_z0, _ = posterior_mean_weights(schedule)
    t = torch.arange(len(schedule), device=schedule.signal.device)
    variance = posterior_variance(schedule, beta_share)
    weight = of_z0.square() / (2 * variance) * z0_error_weight(prediction_type, schedule, t)
    return torch.cat([weight[1:2], weight[1:]])


def prior_bits(schedule: Schedule, z0: Tensor) -> Tensor:
    """KL(q(z_T | z0) || N(0, 1)) of each sample in bits per dimension: z0 (b, c, h, w) -> (b,)."""
    signal, variance = schedule.signal[-1].to(z0), schedule.noise[-1].square().to(z0)
    nats = 0.5 * (variance + (signal * z0).square() - 1 - variance.log())
    return nats.flatten(1).mean(1) / math.log(2)

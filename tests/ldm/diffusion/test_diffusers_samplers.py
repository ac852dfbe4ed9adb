"""The samplers agree with diffusers' schedulers when those are set as they must be, and only then."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from diffusers import (
        DDIMScheduler,
        DDPMScheduler,
        DPMSolverMultistepScheduler,
        EulerDiscreteScheduler,
        FlowMatchEulerDiscreteScheduler,
        PNDMScheduler,
    )

from ldm.diffusion.objective import min_snr_weight
from ldm.diffusion.sampler import ddim, ddpm, dpm_solver_pp_2m, euler, plms
from ldm.diffusion.schedule import make_schedule
from tests.ldm.diffusion.golden import Case, predictor, released_schedule

BETAS = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
AS_THE_ORIGINAL = {"steps_offset": 1, "set_alpha_to_one": False, "timestep_spacing": "leading"}


def follow(scheduler: object, predict: Callable[[Tensor, Tensor], Tensor], z: Tensor, steps: int) -> Tensor:
    """diffusers' own loop."""
    scheduler.set_timesteps(steps)
    z = z * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(z, t)
        z = scheduler.step(predict(scaled, t.expand(len(z))), t, z).prev_sample
    return z


@pytest.fixture(scope="module")
def case() -> Case:
    return Case("ddim_S10_eta0_cfg3")


def test_ddim_as_the_original_and_not_with_default_settings(case: Case) -> None:
    predict, z_T = predictor(case, 3), case.input("x_T")
    ours = ddim(predict, z_T, released_schedule(), 10, "eps", spacing="leading")
    right = DDIMScheduler(**BETAS, **AS_THE_ORIGINAL, clip_sample=False)
    assert (follow(right, predict, z_T, 10) - ours).abs().max() < 2e-4
    assert (follow(DDIMScheduler(), predict, z_T, 10) - ours).abs().max() > 1
    # Each setting matters: with one of them left out the pictures differ.
    for wrong in ({**BETAS, **AS_THE_ORIGINAL}, {**BETAS, "clip_sample": False, "steps_offset": 1},
                  {**BETAS, "clip_sample": False, "set_alpha_to_one": False}):  # fmt: skip
        assert (follow(DDIMScheduler(**wrong), predict, z_T, 10) - ours).abs().max() > 1e-2


def test_plms_as_the_original(case: Case) -> None:
    predict, z_T = predictor(case, 3), case.input("x_T")
    ours = plms(predict, z_T, released_schedule(), 10, "eps", spacing="leading")
    theirs = follow(PNDMScheduler(**BETAS, **AS_THE_ORIGINAL, skip_prk_steps=True), predict, z_T, 10)
    assert (theirs - ours).abs().max() < 2e-4


class Network:
    """Something smooth, cheap and not linear in place of a U-Net."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.mix, self.rate = (torch.randn(4, 4, generator=generator, dtype=torch.float64) for _ in range(2))

    def __call__(self, z_t: Tensor, t: Tensor) -> Tensor:
        mixed = torch.einsum("kc,bchw->bkhw", self.mix, z_t)
        return torch.tanh(mixed + (t.double() / 1000).view(-1, 1, 1, 1) * self.rate.sum(0).view(1, 4, 1, 1))


def noise() -> Tensor:
    return torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("steps", [5, 14, 20])
def test_dpm_solver_pp_2m(steps: int) -> None:
    theirs = DPMSolverMultistepScheduler(**BETAS, timestep_spacing="trailing", final_sigmas_type="zero")
    ours = dpm_solver_pp_2m(Network(), noise(), released_schedule(), steps, "eps")
    assert (follow(theirs, Network(), noise(), steps) - ours).abs().max() < 2e-4


@pytest.mark.parametrize("steps", [5, 20])
def test_dpm_solver_pp_2m_of_v_with_zero_terminal_snr(steps: int) -> None:
    """diffusers puts a tiny signal in the place of none, so its second step still extrapolates a little."""
    schedule = make_schedule("sqrt_linear", 1000, 0.00085, 0.012, True)
    theirs = DPMSolverMultistepScheduler(**BETAS, timestep_spacing="trailing", final_sigmas_type="zero",
                                         rescale_betas_zero_snr=True, prediction_type="v_prediction")  # fmt: skip
    ours = dpm_solver_pp_2m(Network(), noise(), schedule, steps, "v")
    assert (follow(theirs, Network(), noise(), steps) - ours).abs().max() < 3e-2


@pytest.mark.parametrize("steps", [5, 50])
def test_ddim_of_v_with_zero_terminal_snr_and_trailing_timesteps(steps: int) -> None:
    """For step counts that divide 1000: at others their steps do not end where the next ones begin."""
    schedule = make_schedule("sqrt_linear", 1000, 0.00085, 0.012, True)
    theirs = DDIMScheduler(**BETAS, timestep_spacing="trailing", clip_sample=False, rescale_betas_zero_snr=True,
                           prediction_type="v_prediction")  # fmt: skip
    ours = ddim(Network(), noise(), schedule, steps, "v")
    assert (follow(theirs, Network(), noise(), steps) - ours).abs().max() < 2e-4


def test_euler_on_the_karras_grid() -> None:
    """Their x is z / signal and they start from sigma_max * noise, we from the z_t of the first level."""
    theirs = EulerDiscreteScheduler(**BETAS, timestep_spacing="linspace", use_karras_sigmas=True)
    theirs.set_timesteps(8)
    sigma = float(theirs.sigmas[0])
    ours = euler(Network(), noise() * (1 + sigma**2) ** -0.5, released_schedule(), 8, "eps", spacing="karras")
    start = noise() / float(theirs.init_noise_sigma)
    assert (follow(theirs, Network(), start, 8) - ours).abs().max() < 2e-3  # their timesteps are float32


def test_euler_of_flow() -> None:
    """Their timesteps are 1000 s, ours begin at 0: the network is told the time that it was trained with."""
    theirs = FlowMatchEulerDiscreteScheduler()
    theirs.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    z = noise()
    for t in theirs.timesteps:
        z = theirs.step(Network()(z, t.expand(len(z)) - 1), t, z).prev_sample
    ours = euler(Network(), noise(), make_schedule("flow", 1000, None, None, False), 4, "flow")
    assert (z - ours).abs().max() < 1e-5


def test_ancestral_steps_have_their_mean() -> None:
    """Without noise, each step goes to the mean of the posterior."""
    theirs = DDPMScheduler(**BETAS, clip_sample=False, variance_type="fixed_small")
    schedule, z_t = released_schedule(), noise()
    seen: list[Tensor] = []
    ddpm(Network(), z_t, schedule, 1000, "eps", last=1000, draw=lambda step, like: torch.zeros_like(like),
         each=lambda step, z, z0: seen.append(z))  # fmt: skip
    for t, ours in ((999, seen[0]), (998, seen[1])):
        step = theirs.step(Network()(z_t, torch.full((2,), t)), t, z_t, generator=torch.Generator().manual_seed(0))
        drawn = torch.randn(z_t.shape, generator=torch.Generator().manual_seed(0), dtype=z_t.dtype)
        z_t = step.prev_sample - theirs._get_variance(t) ** 0.5 * drawn
        assert (z_t - ours).abs().max() < 1e-5
        z_t = ours


def test_min_snr_weights_as_diffusers_computes_them() -> None:
    from diffusers.training_utils import compute_snr

    t = torch.tensor([0, 100, 500, 999])
    snr = compute_snr(DDPMScheduler(**BETAS), t).double()
    schedule = released_schedule()
    torch.testing.assert_close(schedule.snr[t], snr, rtol=1e-4, atol=0)
    torch.testing.assert_close(min_snr_weight("v", schedule, t, 5.0), snr.clamp(max=5) / (snr + 1), rtol=1e-4, atol=0)

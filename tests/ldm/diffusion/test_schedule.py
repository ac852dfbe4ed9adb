"""Schedules against closed forms and against the tables of the original implementation."""

from __future__ import annotations

import functools
import os

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from ldm.config import DiffusionConfig
from ldm.diffusion.objective import LOSSES, check_prediction_type
from ldm.diffusion.schedule import Schedule, add_noise, make_schedule, reverse, velocity
from ldm.diffusion.variational import (
    bound_weight,
    posterior_log_variance,
    posterior_mean_weights,
    posterior_variance,
    previous_alpha_bar,
)
from tests.ldm.golden import FOLDER
from tests.ldm.models.settings import CONF, read

SEED = int(os.environ.get("LDM_TEST_SEED", "0"))

# Name in the golden file -> name here, timesteps, betas. The original says linear and sqrt_linear the other way round.
RELEASED = {
    "linear_0.00085_0.012": ("sqrt_linear", 1000, 0.00085, 0.012),
    "linear_0.0015_0.0195": ("sqrt_linear", 1000, 0.0015, 0.0195),
    "linear_0.0015_0.0155": ("sqrt_linear", 1000, 0.0015, 0.0155),
    "linear_0.0015_0.0205": ("sqrt_linear", 1000, 0.0015, 0.0205),
    "linear_0.0015_0.015": ("sqrt_linear", 1000, 0.0015, 0.015),
    "linear_default_0.0001_0.02": ("sqrt_linear", 1000, 0.0001, 0.02),
    "cosine": ("cosine", 1000, None, None),
    "sqrt_linear_0.0001_0.02": ("linear", 1000, 0.0001, 0.02),
    "sqrt_0.0001_0.02": ("sqrt", 1000, 0.0001, 0.02),
    "linear_0.00085_0.012_vposterior0.5": ("sqrt_linear", 1000, 0.00085, 0.012),
    "linear_0.00085_0.012_x0": ("sqrt_linear", 1000, 0.00085, 0.012),
    "linear_0.00085_0.012_T20": ("sqrt_linear", 20, 0.00085, 0.012),
}


@functools.cache
def golden() -> dict[str, Tensor]:
    return load_file(FOLDER / "schedules.safetensors")


def tables(schedule: Schedule, beta_share: float) -> dict[str, Tensor]:
    """The original's buffers, by its names."""
    of_z0, of_z_t = posterior_mean_weights(schedule)
    alpha_bar = schedule.alpha_bar
    return {
        "betas": schedule.beta,
        "alphas_cumprod": alpha_bar,
        "alphas_cumprod_prev": previous_alpha_bar(schedule),
        "sqrt_alphas_cumprod": schedule.signal,
        "sqrt_one_minus_alphas_cumprod": schedule.noise,
        "log_one_minus_alphas_cumprod": schedule.noise.square().log(),
        "sqrt_recip_alphas_cumprod": 1 / schedule.signal,
        "sqrt_recipm1_alphas_cumprod": schedule.sigma,
        "posterior_variance": posterior_variance(schedule, beta_share),
        "posterior_log_variance_clipped": posterior_log_variance(schedule, beta_share),
        "posterior_mean_coef1": of_z0,
        "posterior_mean_coef2": of_z_t,
        "lvlb_weights": bound_weight("eps", schedule, beta_share),
    }


@pytest.mark.parametrize("name", RELEASED)
def test_every_table_of_the_original(name: str) -> None:
    schedule = make_schedule(*RELEASED[name], False)
    compared = 0
    for table, value in tables(schedule, 0.5 if "vposterior" in name else 0.0).items():
        if table == "lvlb_weights" and name.endswith("_x0"):
            continue  # see the test below
        for kind, rtol in (("float64", 1e-10), ("float32", 3e-7)):
            wanted = golden().get(f"output/{kind}/{name}/{table}")
            if wanted is None:
                continue  # the file leaves out what another schedule of it has already
            if kind == "float32" and table == "lvlb_weights":
                rtol = 1e-3  # computed from float32 tables there
            torch.testing.assert_close(value.to(wanted.dtype), wanted, rtol=rtol, atol=1e-14)
            compared += 1
    assert compared or name.endswith("_x0")  # of which the file has nothing else


def test_the_weight_of_z0_predictions_is_the_bound_and_not_the_originals_expression() -> None:
    schedule = make_schedule(*RELEASED["linear_0.00085_0.012_x0"], False)
    theirs = golden()["output/float64/linear_0.00085_0.012_x0/lvlb_weights"]
    alpha_bar = schedule.alpha_bar
    expression = 0.5 * alpha_bar.sqrt() / (2 * 1 - alpha_bar)
    torch.testing.assert_close(expression[1:].float(), theirs[1:], rtol=1e-6, atol=0)  # float32 in the file
    ours = bound_weight("z0", schedule)
    torch.testing.assert_close(ours[1:], (bound_weight("eps", schedule) * schedule.snr)[1:], rtol=1e-12, atol=0)
    assert not torch.allclose(ours.float(), theirs, rtol=0.1)


@pytest.mark.parametrize("end, wanted", [
    (0.012, {0: 0.999150, 250: 0.673793, 500: 0.276333, 750: 0.0561698, 999: 0.00466010}),
    (0.0195, {0: 0.998500, 500: 0.114922, 999: 1.42304e-4}),
    (0.0155, {0: 0.998500, 500: 0.150070, 999: 6.68665e-4}),
    (0.0205, {0: 0.998500, 500: 0.107677, 999: 9.69109e-5}),
])  # fmt: skip
def test_check_values(end: float, wanted: dict[int, float]) -> None:
    schedule = make_schedule("sqrt_linear", 1000, 0.00085 if end == 0.012 else 0.0015, end, False)
    for t, value in wanted.items():
        assert float(schedule.alpha_bar[t]) == pytest.approx(value, rel=5e-6)


def test_sigma_range_of_the_released_schedule() -> None:
    sigma = make_schedule("sqrt_linear", 1000, 0.00085, 0.012, False).sigma
    assert float(sigma[0]) == pytest.approx(0.02917, abs=1e-5) and float(sigma[-1]) == pytest.approx(14.6146, abs=1e-4)


@pytest.mark.parametrize("name, start, end", [("sqrt_linear", 0.00085, 0.012), ("linear", 1e-4, 0.02),
                                              ("sqrt", 1e-4, 0.02)])  # fmt: skip
def test_alpha_bar_is_the_product_of_one_minus_beta(name: str, start: float, end: float) -> None:
    schedule = make_schedule(name, 50, start, end, False)
    product = 1.0
    for t in range(50):
        share = t / 49
        beta = start + (end - start) * share
        if name == "sqrt_linear":
            beta = (start**0.5 + (end**0.5 - start**0.5) * share) ** 2
        product *= 1 - (beta**0.5 if name == "sqrt" else beta)
        assert float(schedule.alpha_bar[t]) == pytest.approx(product, rel=1e-14)


@pytest.mark.parametrize("name, start, end", [("sqrt_linear", 0.00085, 0.012), ("cosine", None, None)])
def test_zero_terminal_snr_moves_the_end_and_keeps_the_start(name: str, start: float | None, end: float | None) -> None:
    plain, moved = (make_schedule(name, 1000, start, end, zero) for zero in (False, True))
    assert float(moved.signal[-1]) == 0 and float(moved.noise[-1]) == 1 and float(plain.signal[-1]) > 0
    assert float(moved.alpha_bar[0]) == pytest.approx(float(plain.alpha_bar[0]), rel=1e-14)
    assert bool((moved.snr.diff() < 0).all())


def test_flow_is_straight_and_ends_in_noise_alone() -> None:
    schedule = make_schedule("flow", 1000, None, None, False)
    assert schedule.straight and not make_schedule("cosine", 1000, None, None, False).straight
    assert float(schedule.signal[-1]) == 0 and float(schedule.noise[249]) == 0.25


def test_add_noise_has_the_mean_and_variance_that_the_schedule_says() -> None:
    schedule = make_schedule("sqrt_linear", 1000, 0.00085, 0.012, False)
    generator = torch.Generator().manual_seed(SEED)
    z0 = torch.tensor([2.0, -1.0], dtype=torch.float64).view(2, 1, 1, 1).expand(2, 1, 500, 500)
    eps = torch.randn(z0.shape, generator=generator, dtype=torch.float64)
    t = torch.tensor([100, 900])
    z_t = add_noise(schedule, z0, eps, t)
    for i in range(2):
        alpha_bar = float(schedule.alpha_bar[t[i]])
        assert float(z_t[i].mean()) == pytest.approx(float(z0[i, 0, 0, 0]) * alpha_bar**0.5, abs=0.01)
        assert float(z_t[i].var()) == pytest.approx(1 - alpha_bar, rel=0.02)
    v = velocity(schedule, z0, eps, t)
    assert torch.equal(v, schedule.signal[t].view(2, 1, 1, 1) * eps - schedule.noise[t].view(2, 1, 1, 1) * z0)


@pytest.mark.parametrize("zero", [False, True])
def test_reverse_between_neighbours_is_the_posterior_of_a_step(zero: bool) -> None:
    schedule = make_schedule("sqrt_linear", 1000, 0.00085, 0.012, zero)
    of_z0, of_z_t = posterior_mean_weights(schedule)
    for t in (1, 500, 999):
        levels = (float(table[i]) for i in (t, t - 1) for table in (schedule.signal, schedule.noise))
        wanted = (float(of_z_t[t]), float(of_z0[t]), float(posterior_variance(schedule)[t]))
        assert reverse(*levels) == pytest.approx(wanted, rel=1e-9)


def test_reverse_on_straight_paths_agrees_with_drawing_both_levels() -> None:
    """q(z_s | z_t, z0) q(z_t | z0) must be q(z_s | z0): its mean and variance, put together from the parts."""
    signal, noise, next_signal, next_noise = 0.3, 0.7, 0.6, 0.4
    of_z_t, of_z0, variance = reverse(signal, noise, next_signal, next_noise)
    assert of_z_t * signal + of_z0 == pytest.approx(next_signal)
    assert (of_z_t * noise) ** 2 + variance == pytest.approx(next_noise**2)


@pytest.mark.parametrize("arguments, words", [
    (("sqrtlinear", 1000, 0.1, 0.2, False), ["diffusion.schedule", "'sqrtlinear'", "cosine"]),
    (("linear", 1000, None, 0.2, False), ["beta_start", "None", "0.2"]),
    (("linear", 1000, 0.3, 0.2, False), ["beta_start", "0.3", "0.2"]),
    (("linear", 0, 0.1, 0.2, False), ["timesteps", "0"]),
    (("linear", 1, 0.1, 0.2, True), ["timesteps", "2"]),
    (("cosine", 1000, 0.1, 0.2, False), ["cosine", "null"]),
    (("flow", 1000, None, None, True), ["zero_terminal_snr=false"]),
])  # fmt: skip
def test_settings_that_make_no_schedule_are_refused(arguments: tuple, words: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        make_schedule(*arguments)
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize("name", sorted(path.stem for path in CONF.glob("diffusion/*.yaml")))
def test_every_configuration_makes_a_schedule_that_its_prediction_fits(name: str) -> None:
    config = read(DiffusionConfig, "diffusion", name)
    schedule = make_schedule(config.schedule, config.timesteps, config.beta_start, config.beta_end,
                             config.zero_terminal_snr)  # fmt: skip
    check_prediction_type(config.prediction, schedule)
    assert len(schedule) == config.timesteps and config.loss in LOSSES

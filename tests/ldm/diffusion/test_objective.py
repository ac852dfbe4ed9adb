"""Targets, conversions, weights and losses: closed forms, and numbers of the original."""

from __future__ import annotations

import os

import pytest
import torch

from ldm.diffusion.objective import (
    PREDICTION_TYPES,
    check_loss,
    check_prediction_type,
    convert,
    loss,
    loss_per_sample,
    min_snr_weight,
    target,
    z0_and_eps,
)
from ldm.diffusion.schedule import Schedule, add_noise, make_schedule, velocity
from ldm.diffusion.variational import bound_weight, posterior, prior_bits
from tests.ldm.diffusion.golden import Case, released_schedule, unet

SEED = int(os.environ.get("LDM_TEST_SEED", "0"))
SCHEDULES = {
    "eps": make_schedule("sqrt_linear", 1000, 0.00085, 0.012, False),
    "v": make_schedule("sqrt_linear", 1000, 0.00085, 0.012, True),
    "z0": make_schedule("cosine", 1000, None, None, False),
    "flow": make_schedule("flow", 1000, None, None, False),
}


def latents(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(SEED), dtype=torch.float64)


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_a_target_taken_apart_gives_back_what_it_was_made_of(kind: str) -> None:
    schedule = SCHEDULES[kind]
    z0, eps = latents(2, 5, 4, 4, 4)
    t = torch.tensor([0, 10, 500, 900, 998])
    got = z0_and_eps(kind, schedule, target(kind, schedule, z0, eps, t), add_noise(schedule, z0, eps, t), t)
    assert (got[0] - z0).abs().max() < 1e-9 and (got[1] - eps).abs().max() < 1e-9


@pytest.mark.parametrize("have, want", [("eps", "v"), ("v", "eps"), ("z0", "eps"), ("eps", "z0"), ("v", "z0")])
def test_a_prediction_converted_there_and_back_is_the_same(have: str, want: str) -> None:
    schedule = SCHEDULES["eps"]
    prediction, z_t = latents(2, 5, 4, 4, 4)
    t = torch.tensor([0, 10, 500, 900, 999])
    there = convert(have, want, schedule, prediction, z_t, t)
    assert not torch.allclose(there, prediction)
    assert (convert(want, have, schedule, there, z_t, t) - prediction).abs().max() < 1e-11


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_weight_is_min_snr_gamma_on_the_error_in_z0(kind: str, gamma: float) -> None:
    """By its definition: a wrong prediction is taken apart, and its error in z0 weighed with min(SNR, gamma)."""
    schedule = SCHEDULES[kind]
    z0, eps, error = latents(3, 6, 4, 4, 4)
    t = torch.tensor([0, 50, 200, 500, 900, 990])
    wanted, z_t = target(kind, schedule, z0, eps, t), add_noise(schedule, z0, eps, t)
    wrong, _ = z0_and_eps(kind, schedule, wanted + 0.1 * error, z_t, t)
    by_definition = loss_per_sample(wrong, z0) * schedule.snr[t].clamp(max=gamma)
    ours = loss(kind, schedule, wanted + 0.1 * error, z0, eps, t, min_snr_gamma=gamma)
    torch.testing.assert_close(ours, by_definition, rtol=1e-6, atol=1e-12)


def test_min_snr_weight_in_closed_form() -> None:
    schedule, t = SCHEDULES["eps"], torch.tensor([0, 100, 400, 999])
    snr = schedule.snr[t]
    low = snr.clamp(max=5)
    torch.testing.assert_close(min_snr_weight("eps", schedule, t, 5.0), low / snr)
    torch.testing.assert_close(min_snr_weight("v", schedule, t, 5.0), low / (snr + 1))
    torch.testing.assert_close(min_snr_weight("z0", schedule, t, 5.0), low)
    zero = SCHEDULES["v"]
    assert float(min_snr_weight("v", zero, torch.tensor([999]), 5.0)) == 0  # (min(0, 5) / (0 + 1)): not nan


@pytest.mark.parametrize("kind, wanted", [("l2", 2.5), ("l1", 1.5)])
def test_loss_of_each_sample(kind: str, wanted: float) -> None:
    prediction = torch.tensor([[1.0, 2.0], [0.0, 0.0]]).view(2, 1, 1, 2)
    assert loss_per_sample(prediction, torch.zeros_like(prediction), kind).tolist() == [wanted, 0.0]
    assert loss_per_sample(prediction.bfloat16(), torch.zeros_like(prediction)).dtype == torch.float32
    assert loss_per_sample(prediction.double(), torch.zeros_like(prediction)).dtype == torch.float64


def schedule_of(name: str) -> Schedule:
    return SCHEDULES[name]


@pytest.mark.parametrize("kind, schedule, word", [
    ("epsilon", "eps", "'epsilon'"), ("eps", "flow", "flow"), ("flow", "eps", "flow"), ("eps", "v", "prediction=v"),
])  # fmt: skip
def test_a_type_that_does_not_fit_is_refused(kind: str, schedule: str, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        check_prediction_type(kind, schedule_of(schedule))


def test_a_weight_that_does_not_belong_to_the_loss_is_refused() -> None:
    check_loss("l2", 5.0)
    check_loss("l1", None)
    with pytest.raises(ValueError, match="min_snr_gamma=5 weighs squared errors, and diffusion.loss is l1"):
        check_loss("l1", 5.0)
    with pytest.raises(ValueError, match="diffusion.loss is 'l3'; there are: l2, l1"):
        check_loss("l3", None)


@pytest.fixture(scope="module")
def ops() -> Case:
    return Case("diffusion_ops")


def test_closed_form_operations_of_the_original(ops: Case) -> None:
    schedule, t = released_schedule(), ops.input("t")
    z0, eps, z_t = ops.input("x_start"), ops.input("noise"), ops.input("x_t")
    signal, noise = schedule.at(t, z0)
    ops.check("q_sample", add_noise(schedule, z0, eps, t))
    ops.check("q_mean", signal * z0)
    ops.check("q_variance", noise.square())
    ops.check("q_log_variance", schedule.noise[t].square().log().float().view(-1, 1, 1, 1))
    ops.check("predict_start_from_noise", z0_and_eps("eps", schedule, eps, z_t, t)[0])
    ops.check("predict_eps_from_xstart", z0_and_eps("z0", schedule, z0, z_t, t)[1])
    for name, value in zip(("posterior_mean", "posterior_variance", "posterior_log_variance_clipped"),
                           posterior(schedule, z0, z_t, t), strict=True):  # fmt: skip
        ops.check(name, value)
    ops.check("prior_bpd", prior_bits(schedule, z0))


def test_the_networks_posterior_mean_with_and_without_clipping(ops: Case) -> None:
    schedule, t, z_t = released_schedule(), ops.input("t"), ops.input("x_t")
    prediction = unet()(z_t, t, context=ops.input("context"))
    ops.check("model_output_at_x_t", prediction)
    z0, _ = z0_and_eps("eps", schedule, prediction, z_t, t)
    for name, clean in (("clip_false", z0), ("clip_true", z0.clamp(-1, 1))):
        ops.check(f"p_mean_variance/{name}/pred_x0", clean)
        ops.check(f"p_mean_variance/{name}/mean", posterior(schedule, clean, z_t, t)[0])


@pytest.mark.parametrize("kind, theirs", [("eps", "eps"), ("z0", "x0")])
@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_losses_of_the_original(ops: Case, kind: str, theirs: str, norm: str) -> None:
    schedule, t = released_schedule(), ops.input("t")
    z0, eps = ops.input("x_start"), ops.input("noise")
    prediction = unet()(add_noise(schedule, z0, eps, t), t, context=ops.input("context"))
    each = loss(kind, schedule, prediction, z0, eps, t, kind=norm)
    ops.check(f"p_losses/{theirs}/{norm}/per_sample", each)
    ops.check(f"p_losses/{theirs}/{norm}/loss_simple", each.mean())
    bound = (bound_weight("eps", schedule)[t] * each).mean().float()  # the original weighs both kinds as eps here
    ops.check(f"p_losses/{theirs}/{norm}/loss_vlb", bound)
    if (kind, norm) == ("eps", "l2"):
        logvar = torch.linspace(-0.5, 0.5, 1000)[t]
        total = 0.7 * (each / logvar.exp() + logvar).mean() + 0.1 * bound
        ops.check("p_losses/eps/l2/loss_logvar_linspace_elbo0.1_simple0.7", total)


def test_gradients_of_the_loss_equal_the_originals(ops: Case) -> None:
    schedule, t = released_schedule(), ops.input("t")
    z0, eps = ops.input("x_start"), ops.input("noise")
    start = "p_losses/eps/l2/grad/"
    names = [key.removeprefix(f"output/{start}") for key in ops.tensors if key.startswith(f"output/{start}")]
    weights = [unet().get_parameter(name).requires_grad_(True) for name in names]
    prediction = unet()(add_noise(schedule, z0, eps, t), t, context=ops.input("context"))
    gradients = torch.autograd.grad(loss("eps", schedule, prediction, z0, eps, t).mean(), weights)
    unet().requires_grad_(False)
    assert len(names) == 3
    for name, gradient in zip(names, gradients, strict=True):
        ops.check(start + name, gradient)


def test_v_prediction_of_the_original() -> None:
    case, schedule = Case("v_prediction"), released_schedule()
    t, z0, eps = case.input("t"), case.input("x_start"), case.input("noise")
    case.check("get_v", velocity(schedule, z0, eps, t))
    got = z0_and_eps("v", schedule, case.input("v"), case.input("x_t"), t)
    case.check("predict_start_from_z_and_v", got[0])
    case.check("predict_eps_from_z_and_v", got[1])
    prediction = unet()(add_noise(schedule, z0, eps, t), t, context=case.input("context"))
    case.check("p_losses/loss", loss("v", schedule, prediction, z0, eps, t).mean())

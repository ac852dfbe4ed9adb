"""Samplers without a network: an oracle in its place, and data whose exact trajectories are known."""

from __future__ import annotations

import math
import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ldm.diffusion.grid import SPACINGS, make_grid
from ldm.diffusion.objective import target
from ldm.diffusion.sampler import SAMPLERS, check_sampler, ddim, ddpm, encode, euler, keep, noised
from ldm.diffusion.schedule import Schedule, make_schedule

SEED = int(os.environ.get("LDM_TEST_SEED", "0"))
SCHEDULES = {
    "eps": make_schedule("sqrt_linear", 1000, 0.00085, 0.012, False),
    "v": make_schedule("sqrt_linear", 1000, 0.00085, 0.012, True),
    "z0": make_schedule("cosine", 1000, None, None, False),
    "flow": make_schedule("flow", 1000, None, None, False),
}
STEPS = [1, 7, 30, 50, 300, 999, 1000]
DETERMINISTIC = ["ddim", "euler", "plms", "dpm_solver_pp_2m"]


def latents(*shape: int, seed: int = SEED) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def oracle(kind: str, z0: Tensor, eps: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda z_t, t: target(kind, SCHEDULES[kind], z0, eps, t)


def fits(name: str, kind: str, spacing: str = "trailing") -> bool:
    """Whether a sampler can follow a schedule at all; what cannot is refused, which has a test of its own."""
    try:
        check_sampler(name, SCHEDULES[kind], 10, kind, spacing=spacing)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("spacing", ["trailing", "leading"])
def test_ddim_with_an_oracle_returns_z0(kind: str, steps: int, spacing: str) -> None:
    schedule, seen = SCHEDULES[kind], []
    z0, eps = latents(2, 2, 4, 4, 4)
    grid = make_grid(schedule, steps, spacing)
    z = ddim(oracle(kind, z0, eps), grid.signal[0] * z0 + grid.noise[0] * eps, schedule, steps, kind, spacing=spacing,
             each=lambda step, z_t, clean: seen.append(clean))  # fmt: skip
    assert len(seen) == len(grid) and (seen[-1] - z0).abs().max() < 1e-12
    wanted = z0 if spacing == "trailing" else schedule.signal[0] * z0 + schedule.noise[0] * eps
    assert (z - wanted).abs().max() < 1e-12


@pytest.mark.parametrize("name, kind", [
    (name, kind) for name in DETERMINISTIC for kind in SCHEDULES if fits(name, kind)
])  # fmt: skip
@pytest.mark.parametrize("steps", [1, 2, 10, 50, 999])
def test_every_sampler_with_an_oracle_returns_z0(name: str, kind: str, steps: int) -> None:
    schedule = SCHEDULES[kind]
    z0, eps = latents(2, 2, 4, 4, 4)
    z_T = noised(schedule, z0, eps, steps, steps)
    z = SAMPLERS[name](oracle(kind, z0, eps), z_T, schedule, steps, kind)
    # plms divides by the signal of two levels, of which cosine schedules leave little
    close = max(1e-11, 1e-15 / float(schedule.signal[-1]) ** 2) if name == "plms" else 1e-11
    assert (z - z0).abs().max() < close


@pytest.mark.parametrize("sampler, keywords", [(ddim, {"eta": 1.0}), (ddpm, {}), (ddim, {"eta": 0.5})])
@pytest.mark.parametrize("kind", SCHEDULES)
def test_fresh_noise_does_not_lead_an_oracle_astray(sampler: Callable, keywords: dict, kind: str) -> None:
    """An oracle that knows z0 and reads eps off z_t, as a network does."""
    schedule = SCHEDULES[kind]
    z0, z_T = latents(2, 2, 4, 4, 4)

    def predict(z_t: Tensor, t: Tensor) -> Tensor:
        signal, noise = schedule.at(t, z_t)
        return target(kind, schedule, z0, (z_t - signal * z0) / noise, t)

    z = sampler(predict, z_T, schedule, 50, kind, draw=lambda step, like: latents(*like.shape, seed=step), **keywords)
    assert (z - z0).abs().max() < 1e-11


SPREAD = 0.5  # of the data, which are normal: the best possible prediction and the exact trajectories are known


def of_normal_data(kind: str, schedule: Schedule) -> Callable[[Tensor, Tensor], Tensor]:
    """E[z0 | z_t] as a prediction; t may lie between whole timesteps, as those of the karras grid do."""

    def predict(z_t: Tensor, t: Tensor) -> Tensor:
        if t.is_floating_point():
            low, share = int(t[0]), float(t[0]) % 1
            high = min(low + 1, len(schedule) - 1)
            sigma = math.exp((1 - share) * math.log(schedule.sigma[low]) + share * math.log(schedule.sigma[high]))
            signal, noise = 1 / math.hypot(1, sigma), sigma / math.hypot(1, sigma)
        else:
            signal, noise = (float(table[int(t[0])]) for table in (schedule.signal, schedule.noise))
        z0 = signal * SPREAD**2 / ((signal * SPREAD) ** 2 + noise**2) * z_t
        eps = (z_t - signal * z0) / noise
        return {"eps": eps, "z0": z0, "flow": eps - z0, "v": signal * eps - noise * z0}[kind]

    return predict


def exact(signal: float, noise: float, next_signal: float, next_noise: float) -> float:
    """What the exact trajectory multiplies z by: normal data stay normal, so it keeps pace with their spread."""
    return math.hypot(next_signal * SPREAD, next_noise) / math.hypot(signal * SPREAD, noise)


def error(name: str, kind: str, steps: int, spacing: str) -> float:
    schedule = SCHEDULES[kind]
    z_T, grid = torch.ones(1, 1, 1, 1, dtype=torch.float64), make_grid(schedule, steps, spacing)
    z = SAMPLERS[name](of_normal_data(kind, schedule), z_T, schedule, steps, kind, spacing=spacing)
    wanted = exact(grid.signal[0], grid.noise[0], grid.signal[-1], grid.noise[-1])
    return abs(float(z) - wanted) / wanted


@pytest.mark.parametrize("name, kind, spacing", [
    (name, kind, spacing) for name in DETERMINISTIC for kind in SCHEDULES for spacing in SPACINGS
    if fits(name, kind, spacing)
])  # fmt: skip
def test_more_steps_come_closer_to_the_exact_trajectory(name: str, kind: str, spacing: str) -> None:
    few, many = error(name, kind, 20, spacing), error(name, kind, 80, spacing)
    assert many < few / 2 and many < 0.1


def test_the_order_of_each_sampler() -> None:
    """Between two levels far from the ends, four times the steps divide the error by 4, or by 16 in second order."""
    schedule = SCHEDULES["eps"]

    def error_between(name: str, steps: int) -> float:
        every = 400 // steps
        sub = Schedule(schedule.signal[100:501:every].clone(), schedule.noise[100:501:every].clone())
        predict = of_normal_data("eps", sub)
        seen: list[Tensor] = []
        z_T = torch.ones(1, 1, 1, 1, dtype=torch.float64)
        SAMPLERS[name](predict, z_T, sub, steps + 1, "eps", each=lambda step, z_t, z0: seen.append(z_t))
        first, last = sub.signal[-1], sub.signal[0]
        wanted = exact(float(first), float(sub.noise[-1]), float(last), float(sub.noise[0]))
        return abs(float(seen[-2]) - wanted)  # the last step goes to a clean latent

    ratio = {name: error_between(name, 100) / error_between(name, 400) for name in DETERMINISTIC}
    assert 3 < ratio["ddim"] < 6 and ratio["euler"] == pytest.approx(ratio["ddim"], rel=1e-3)
    assert 12 < ratio["dpm_solver_pp_2m"] < 30
    assert 12 < ratio["plms"] < 30


@pytest.mark.parametrize("kind", ["eps", "z0", "flow"])
def test_euler_takes_the_steps_of_deterministic_ddim(kind: str) -> None:
    schedule, z_T = SCHEDULES[kind], latents(2, 4, 4, 4)
    predict = of_normal_data(kind, schedule)
    ours, theirs = (sampler(predict, z_T, schedule, 12, kind) for sampler in (euler, ddim))
    assert (ours - theirs).abs().max() < 1e-12


def test_ancestral_sampling_is_ddim_with_eta_one() -> None:
    schedule, z_T = SCHEDULES["eps"], latents(2, 4, 4, 4)
    predict, draw = of_normal_data("eps", schedule), lambda step, like: latents(*like.shape, seed=step)
    ours = ddpm(predict, z_T, schedule, 40, "eps", draw=draw)
    assert (ours - ddim(predict, z_T, schedule, 40, "eps", eta=1.0, draw=draw)).abs().max() < 1e-11


@pytest.mark.parametrize("kind", SCHEDULES)
def test_ancestral_sampling_of_normal_data_has_their_spread(kind: str) -> None:
    schedule = SCHEDULES[kind]
    z_T = latents(1, 1, 100, 100)
    z = ddpm(of_normal_data(kind, schedule), z_T, schedule, 1000, kind,
             draw=lambda step, like: latents(*like.shape, seed=SEED + step + 1))  # fmt: skip
    assert float(z.std()) == pytest.approx(SPREAD, rel=0.03)


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize("spacing", ["trailing", "leading"])
def test_what_is_encoded_is_sampled_back(kind: str, spacing: str) -> None:
    """Up to the error of the steps, which shrinks with their number."""
    schedule, z0 = SCHEDULES[kind], latents(1, 4, 4, 4)
    predict = of_normal_data(kind, schedule)
    for steps, last, close in ((50, 40, 0.06), (500, 400, 0.007)):
        z_t = encode(predict, z0, schedule, steps, kind, spacing=spacing, last=last)
        assert (z_t - z0).abs().max() > 0.1
        back = ddim(predict, z_t, schedule, steps, kind, spacing=spacing, last=last)
        assert (back - z0).abs().max() < close * z0.abs().max()


def test_the_last_steps_of_a_trajectory_are_those_of_the_whole_one() -> None:
    schedule, z_T, seen = SCHEDULES["eps"], latents(1, 4, 4, 4), []
    predict = of_normal_data("eps", schedule)
    whole = ddim(predict, z_T, schedule, 10, "eps", each=lambda step, z_t, z0: seen.append(z_t))
    assert torch.equal(ddim(predict, seen[5], schedule, 10, "eps", last=4), whole)


def test_noised_starts_where_the_last_steps_begin() -> None:
    schedule, z0, eps = SCHEDULES["eps"], latents(2, 4, 4, 4), latents(2, 4, 4, 4, seed=SEED + 1)
    t, *_ = make_grid(schedule, 10, "trailing", 3).t
    wanted = schedule.signal[t] * z0 + schedule.noise[t] * eps
    assert torch.equal(noised(schedule, z0, eps, 10, 3), wanted) and t == 299


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_inpainting_keeps_what_the_mask_keeps(name: str) -> None:
    """The kept part is pulled to the wanted latent, and the network sees it noised to the very level of each step."""
    schedule, z_T = SCHEDULES["eps"], latents(2, 4, 4, 4)
    wanted, noise = torch.full_like(z_T, 3.0), latents(2, 4, 4, 4, seed=SEED + 1)
    mask = torch.zeros(2, 1, 4, 4, dtype=torch.float64)
    mask[..., :2] = 1
    asked: list[tuple[int, Tensor]] = []

    def predict(z_t: Tensor, t: Tensor) -> Tensor:
        asked.append((int(t[0]), z_t))
        signal, sigma = schedule.at(t, z_t)
        return (z_t - signal * 0) / sigma * mask + (1 - mask) * z_t

    mend = keep(wanted, mask, lambda step, like: noise)
    SAMPLERS[name](predict, z_T, schedule, 10, "eps", mend=mend)
    firsts = [z for i, (t, z) in enumerate(asked) if name != "plms" or i != 1]  # whose second call looks ahead
    for t, z in zip(make_grid(schedule, 10, "trailing").t, firsts, strict=True):
        at_level = schedule.signal[t] * wanted + schedule.noise[t] * noise
        assert torch.equal(z[..., :2], at_level[..., :2])
        assert not torch.equal(z[..., 2:], at_level[..., 2:])


def test_a_latents_trajectory_does_not_depend_on_its_batch_or_precision() -> None:
    schedule, z_T = SCHEDULES["eps"], latents(3, 4, 4, 4).float()
    predict = of_normal_data("eps", schedule)
    for name in DETERMINISTIC:
        whole = SAMPLERS[name](predict, z_T, schedule, 7, "eps")
        assert whole.dtype == torch.float32
        assert torch.equal(SAMPLERS[name](predict, z_T[1:2], schedule, 7, "eps"), whole[1:2])


def test_timesteps_are_whole_but_on_the_karras_grid() -> None:
    asked: list[Tensor] = []
    schedule, z_T = SCHEDULES["eps"], latents(3, 4, 4, 4)
    predict = of_normal_data("eps", schedule)
    for spacing in ("trailing", "karras"):
        euler(lambda z_t, t: asked.append(t) or predict(z_t, t), z_T, schedule, 3, "eps", spacing=spacing)
    assert [t.tolist() for t in asked[:3]] == [[999] * 3, [666] * 3, [332] * 3] and asked[0].dtype == torch.int64
    assert asked[3].dtype == torch.float32 and asked[3].tolist() == [999.0] * 3
    assert asked[5].tolist() == pytest.approx([0.0] * 3, abs=1e-9)
    sigma = torch.tensor(make_grid(schedule, 5, "karras").noise) / torch.tensor(make_grid(schedule, 5, "karras").signal)
    assert torch.allclose((sigma[:-1] ** (1 / 7)).diff(n=2), torch.zeros(3), atol=1e-5) and sigma[-1] == 0


@pytest.mark.parametrize("name, kind, steps, keywords, words", [
    ("ddimm", "eps", 10, {}, ["'ddimm'", "dpm_solver_pp_2m"]),
    ("ddim", "eps", 0, {}, ["0 sampling steps", "1 to 1000"]),
    ("ddim", "eps", 1001, {}, ["1001", "1000"]),
    ("ddim", "eps", 10, {"spacing": "trail"}, ["'trail'", "trailing"]),
    ("plms", "eps", 10, {"eta": 0.5}, ["eta is 0.5", "ddim"]),
    ("plms", "v", 10, {}, ["plms", "use ddim"]),
    ("euler", "v", 10, {}, ["euler", "use ddim"]),
    ("ddim", "v", 10, {"spacing": "karras"}, ["karras", "trailing"]),
    ("ddim", "flow", 10, {"spacing": "karras"}, ["karras", "trailing"]),
])  # fmt: skip
def test_what_cannot_be_followed_is_refused(name: str, kind: str, steps: int, keywords: dict, words: list[str]) -> None:
    with pytest.raises(ValueError) as problem:
        check_sampler(name, SCHEDULES[kind], steps, kind, **keywords)
    assert all(word in str(problem.value) for word in words)
    if name in SAMPLERS:
        if "eta" in keywords:
            return
        with pytest.raises(ValueError) as again:
            SAMPLERS[name](lambda z_t, t: z_t, latents(1, 1, 2, 2), SCHEDULES[kind], steps, kind, **keywords)
        assert str(again.value) == str(problem.value)


@pytest.mark.parametrize("sampler, keywords", [(ddpm, {}), (ddim, {"eta": 0.1})])
def test_fresh_noise_must_be_passed_in(sampler: Callable, keywords: dict) -> None:
    with pytest.raises(ValueError, match="pass draw"):
        sampler(lambda z_t, t: z_t, latents(1, 1, 2, 2), SCHEDULES["eps"], 5, "eps", **keywords)


def test_more_last_steps_than_steps_are_refused() -> None:
    with pytest.raises(ValueError, match="last 11 steps"):
        make_grid(SCHEDULES["eps"], 10, "trailing", 11)

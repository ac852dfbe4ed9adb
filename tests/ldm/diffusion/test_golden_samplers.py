"""Every sampler's trajectory equals the original's: same small U-Net, same noise, the tolerance of each case."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ldm.diffusion.grid import make_grid
from ldm.diffusion.sampler import SAMPLERS, ddim, ddpm, encode, keep
from ldm.diffusion.schedule import add_noise, reverse
from tests.ldm.diffusion.golden import Case, predictor, released_schedule

LEADING = {"spacing": "leading"}


def noise_of(case: Case, name: str = "noises") -> Callable[[int, Tensor], Tensor]:
    return lambda step, like: case.input(name)[step]


class Seen(list):
    """Remembers (z_t, z0) of every step."""

    def __call__(self, step: int, z_t: Tensor, z0: Tensor) -> None:
        self.append((z_t, z0))

    def check(self, case: Case, start: str = "") -> None:
        for name, value in {"x_after_step_1": self[0][0], "x_after_step_2": self[1][0], "pred_x0_step_1": self[0][1],
                            "pred_x0_step_2": self[1][1], "pred_x0_last": self[-1][1]}.items():  # fmt: skip
            if f"output/{start}{name}" in case.tensors:
                case.check(start + name, value)


@pytest.mark.parametrize("name, sampler, steps, scale, keywords", [
    ("ddim_S10_eta0_cfg1", "ddim", 10, 1, {}),
    ("ddim_S10_eta0_cfg3", "ddim", 10, 3, {}),
    ("ddim_S10_eta1_cfg3", "ddim", 10, 3, {"eta": 1.0}),
    ("ddim_S10_eta0.5_temp0.8", "ddim", 10, 1, {"eta": 0.5, "temperature": 0.8}),
    ("ddim_S50_eta0_cfg1", "ddim", 50, 1, {}),
    ("plms_S10_cfg1", "plms", 10, 1, {}),
    ("plms_S10_cfg3", "plms", 10, 3, {}),
    ("plms_S10_mask", "plms", 10, 1, {}),
])  # fmt: skip
def test_ddim_and_plms(name: str, sampler: str, steps: int, scale: float, keywords: dict) -> None:
    case, schedule, seen = Case(name), released_schedule(), Seen()
    if "input/noises" in case.tensors:
        keywords = keywords | {"draw": noise_of(case)}
    if "input/mask" in case.tensors:
        keywords["mend"] = keep(case.input("x0"), case.input("mask"), noise_of(case, "q_sample_noises"))
    z = SAMPLERS[sampler](predictor(case, scale), case.input("x_T"), schedule, steps, "eps", each=seen, **LEADING,
                          **keywords)  # fmt: skip
    assert make_grid(schedule, steps, "leading").t == case.output("timesteps").tolist()
    seen.check(case)
    case.check("final", z)


def test_ddim_of_a_v_prediction() -> None:
    case, seen = Case("v_prediction"), Seen()
    z = ddim(predictor(case, 3), case.input("x_T"), released_schedule(), 10, "v", each=seen, **LEADING)
    seen.check(case, "ddim_S10_cfg3/")
    case.check("ddim_S10_cfg3/final", z)


@pytest.mark.parametrize("name, clip", [("ddpm_T20_clip0", None), ("ddpm_T20_clip1", 1.0)])
def test_ancestral_sampling(name: str, clip: float | None) -> None:
    case, seen = Case(name), Seen()
    z = ddpm(predictor(case), case.input("x_T"), released_schedule(20), 20, "eps", clip=clip, draw=noise_of(case),
             each=seen)  # fmt: skip
    seen.check(case)
    case.check("final", z)


def test_what_an_ancestral_trajectory_thinks_of_its_end() -> None:
    case, seen = Case("ddpm_T20_progressive"), Seen()
    z = ddpm(predictor(case), case.input("x_T"), released_schedule(20), 20, "eps", draw=noise_of(case), each=seen)
    case.check("final", z)
    logged = [seen[step][1] for step in range(20) if (19 - step) % 5 == 0 or step == 0]
    case.check("pred_x0", torch.stack(logged))


@pytest.mark.parametrize("scale", [1, 3])
@pytest.mark.parametrize("last", [3, 7])
def test_image_to_image(scale: int, last: int) -> None:
    """The original starts one table entry above the first step that it takes."""
    case, schedule = Case("ddim_img2img"), released_schedule()
    above = make_grid(schedule, 10, "leading").t[-last - 1]
    assert above == case.output("timesteps")[last]
    z_t = add_noise(schedule, case.input("z0"), case.input("noise"), torch.full((2,), above))
    case.check(f"stochastic_encode/t_enc_{last}", z_t)
    z = ddim(predictor(case, scale), z_t, schedule, 10, "eps", last=last, **LEADING)
    case.check(f"decode/t_enc_{last}_cfg{scale}", z)


@pytest.mark.parametrize("scale", [1, 2])
def test_inversion(scale: int) -> None:
    """The original tells the network the number of the step in place of its timestep."""
    case, schedule, seen = Case("ddim_encode"), released_schedule(), Seen()
    predict, t = predictor(case, scale), make_grid(schedule, 10, "leading").t[::-1]
    numbered = lambda z_t, here: predict(z_t, torch.full_like(here, t.index(int(here[0]))))  # noqa: E731
    z = encode(numbered, case.input("z0"), schedule, 10, "eps", last=6, each=seen, **LEADING)
    case.check(f"encoded_cfg{scale}", z)
    if scale == 1:
        steps = case.output("intermediate_steps").tolist()
        case.check("intermediates_cfg1", torch.stack([seen[step][0] for step in steps]))


TABLES = [key.removeprefix("output/").removesuffix("/timesteps")
          for key in Case("ddim_tables").tensors if key.endswith("/timesteps")]  # fmt: skip


@pytest.mark.parametrize("name", TABLES)
def test_tables_of_many_step_counts(name: str) -> None:
    case, schedule = Case("ddim_tables"), released_schedule()
    kind, steps = name.split("/")
    grid = make_grid(schedule, int(steps), {"uniform": "leading", "quad": "quadratic"}[kind])
    wanted = case.output(f"{name}/timesteps").tolist()
    if f"{name}/alphas" not in {key.removeprefix("output/") for key in case.tensors}:
        assert wanted[-1] == 1000 and grid.t[::-1] == wanted[:-1]  # the original fails; here the last is left out
        return
    first = [i for i, t in enumerate(wanted) if t not in wanted[:i]]  # quad repeats timesteps; here each comes once
    assert grid.t[::-1] == [wanted[i] for i in first]
    signal = torch.tensor(grid.signal, dtype=torch.float64)
    compare(case, f"{name}/alphas", first, signal[:-1].square())
    compare(case, f"{name}/alphas_prev", first, signal[1:].square())
    sigma = [reverse(*levels)[2] ** 0.5 for levels in zip(grid.signal, grid.noise, grid.signal[1:], grid.noise[1:],
                                                         strict=False)]  # fmt: skip
    compare(case, f"{name}/sigmas_eta1", first, torch.tensor(sigma, dtype=torch.float64))


def compare(case: Case, name: str, entries: list[int], value: Tensor) -> None:
    """With these entries, to the float32 in which the original computes the tables; ours come noisiest first."""
    wanted = case.output(name)[entries]
    torch.testing.assert_close(value.flip(0).to(wanted.dtype), wanted, rtol=5e-5, atol=2e-7)

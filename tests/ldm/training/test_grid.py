"""The pictures that training draws of itself: the averaged weights as they are, in the arithmetic of the training."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm.config import SampleGridConfig, TrainSettings
from ldm.generate import Painter, draw_latents
from ldm.models.denoiser import Denoiser, make_denoiser
from ldm.models.tokenizer import make_tokenizer
from ldm.training import grid
from ldm.training.checks import schedule_of
from ldm.training.frozen import Frozen
from tests.ldm.training.tiny import SEED, SHAPE, settings

GRID = SampleGridConfig(every_steps=4, prompts=["0 1", "what"], steps=3, guidance_scale=3.0)


def trained(what: TrainSettings) -> Denoiser:
    """A denoiser that predicts something."""
    torch.manual_seed(SEED)
    denoiser = make_denoiser(what.unet, what.text_encoder).eval().requires_grad_(False)
    for parameter in denoiser.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return denoiser


def drawn(what: TrainSettings, weights: dict[str, Tensor]) -> Tensor:
    """The latents (n, c, h, w) of a grid."""
    latents: list[Tensor] = []

    def decode(z0: Tensor) -> Tensor:
        latents.append(z0)
        return torch.zeros(len(z0), 3, 8, 8)

    data: Any = SimpleNamespace(latent_shape=SHAPE)
    frozen = Frozen(make_denoiser(what.unet, what.text_encoder), what.training.precision)
    tokenizer = make_tokenizer(what.text_encoder)
    schedule = schedule_of(what.diffusion)
    assert grid.sample_grid(what, data, weights, frozen, schedule, tokenizer, decode, 4).startswith(b"\x89PNG")
    return latents[0]


@pytest.mark.parametrize("precision", ["float32", "bf16_autocast", "bf16"])
def test_a_grid_is_drawn_by_the_weights_that_there_are(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    what = settings(grid=GRID)
    denoiser = trained(what)
    weights = {name: x.clone() for name, x in denoiser.state_dict().items()}
    tokenizer, schedule = make_tokenizer(what.text_encoder), schedule_of(what.diffusion)
    painter = Painter(denoiser, tokenizer, schedule, what.diffusion.prediction, (2, 4, 4))
    expected = draw_latents(painter, GRID.prompts, grid.grid_config(what.training))
    made: list[set[str]] = []

    def make(*parts: Any) -> Denoiser:
        denoiser = make_denoiser(*parts)
        made.append({parameter.device.type for parameter in denoiser.parameters()})
        return denoiser

    monkeypatch.setattr(grid, "make_denoiser", make)
    found = drawn(replace(what, training=replace(what.training, precision=precision)), weights)
    assert made == [{"meta"}]  # no second model of random numbers
    assert found.dtype == torch.float32
    if precision == "float32":
        torch.testing.assert_close(found, expected)
    else:
        error = float((found - expected).square().mean().sqrt() / expected.std())
        print(f"{precision}: {error:.4f} of the spread")
        assert 0 < error < 0.05
    assert all(torch.equal(weights[name], x) for name, x in denoiser.state_dict().items())

"""Generation with denoisers whose answer is known, and with a small real one."""

from __future__ import annotations

import dataclasses
import os

import pytest
import torch
from torch import Tensor, nn

from ldm.config import GenerationConfig, TextEncoderConfig, UNetConfig
from ldm.diffusion.sampler import SAMPLERS
from ldm.diffusion.schedule import Schedule, make_schedule
from ldm.generate import Painter, decode, draw_latents, noise
from ldm.models.denoiser import make_denoiser
from ldm.models.tokenizer import make_tokenizer

SEED = int(os.environ.get("LDM_TEST_SEED", "0"))
SHAPE = (4, 8, 8)

CONFIG = GenerationConfig(
    prompts=None, unseen_prompts=[], sampler="ddim", steps=10, spacing="trailing", guidance_scale=3.0, eta=0.0,
    seed=SEED, batch_size=4, grid_pictures=4,
)  # fmt: skip

TEXT = TextEncoderConfig(
    canvas=None,
    kind="transformer", tokenizer="bytes", vocab_file=None, vocab_sha256=None, vocab_size=259, length=16, width=32,
    layers=1, heads=2, head_width=16, towers=None, weights=None,
)  # fmt: skip

UNET = UNetConfig(
    in_channels=4, out_channels=4, model_channels=32, channel_mult=[1, 2], num_res_blocks=1, attention_resolutions=[2],
    num_heads=2, num_head_channels=None, transformer_depth=[1, 1], context_dim=32, cross_only_resolutions=[],
    linear_projections=False, qkv_order="head_first", scale_shift_norm=False, resblock_updown=False, num_classes=None,
    vector_dim=None, norm_groups=8, dropout=0.0,
)  # fmt: skip


def schedule() -> Schedule:
    return make_schedule("sqrt_linear", 1000, 0.00085, 0.012, False)


class Oracle(nn.Module):
    """Knows the picture of every caption and predicts the eps that leads there; the empty caption is a grey one."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.encoded: list[int] = []

    def encode_condition(self, condition: dict[str, Tensor]) -> dict[str, Tensor]:
        self.encoded.append(len(condition["tokens"]))
        return {"context": condition["tokens"].double()}

    def forward(self, z_t: Tensor, t: Tensor, condition: dict[str, Tensor]) -> Tensor:
        signal, sigma = schedule().at(t, z_t)
        return (z_t - signal * picture_of(condition["context"], z_t)) / sigma


def picture_of(context: Tensor, like: Tensor) -> Tensor:
    """The sum of a caption's letters as the brightness of its picture."""
    return (context[:, 1:].sum(dim=1) / 1000).to(like)[:, None, None, None].expand_as(like)


def oracle() -> Painter:
    return Painter(Oracle(), make_tokenizer(TEXT), schedule(), "eps", SHAPE)  # type: ignore[arg-type]


def network() -> Painter:
    torch.manual_seed(SEED)
    denoiser = make_denoiser(UNET, TEXT)
    for parameter in denoiser.parameters():  # an untrained U-Net predicts 0 whatever it is told
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    return Painter(denoiser, make_tokenizer(TEXT), schedule(), "eps", SHAPE)


PROMPTS = ["cat", "dog", "red apple", "", "house", "a", "zebra"]


def test_each_prompt_gives_its_own_picture() -> None:
    painter = oracle()
    z0 = draw_latents(painter, PROMPTS, dataclasses.replace(CONFIG, guidance_scale=1.0))
    expected = picture_of(painter.tokenizer(PROMPTS).double(), z0)  # type: ignore[misc]
    assert z0.dtype == torch.float32 and z0.shape == (7, *SHAPE)
    torch.testing.assert_close(z0, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("sampler", sorted(SAMPLERS))
def test_every_sampler_draws_what_the_denoiser_knows(sampler: str) -> None:
    painter, config = oracle(), dataclasses.replace(CONFIG, guidance_scale=1.0, sampler=sampler, steps=50)
    z0 = draw_latents(painter, PROMPTS, config)
    expected = picture_of(painter.tokenizer(PROMPTS).double(), z0)  # type: ignore[misc]
    torch.testing.assert_close(z0, expected, atol=1e-3, rtol=1e-3)


def test_guidance_pushes_away_from_the_empty_caption() -> None:
    painter = oracle()
    z0 = draw_latents(painter, PROMPTS, CONFIG)
    own = picture_of(painter.tokenizer(PROMPTS).double(), z0)  # type: ignore[misc]
    null = picture_of(painter.tokenizer([""]).double(), z0[:1])  # type: ignore[misc]
    torch.testing.assert_close(z0, null + 3.0 * (own - null), atol=1e-3, rtol=1e-4)


def test_captions_are_encoded_once_for_a_trajectory() -> None:
    painter = oracle()
    draw_latents(painter, PROMPTS, CONFIG)
    assert painter.denoiser.encoded == [5, 4]  # batches of 4 and 3, each with the empty caption


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_a_picture_does_not_depend_on_its_batch(eta: float) -> None:
    painter, config = network(), dataclasses.replace(CONFIG, eta=eta, steps=4)
    together = draw_latents(painter, PROMPTS, config)
    alone = draw_latents(painter, PROMPTS, dataclasses.replace(config, batch_size=1))
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(together[0], together[1], atol=0.1)


def test_the_start_depends_on_seed_and_place_and_nothing_else() -> None:
    start = noise(SEED, range(64), -1, SHAPE)
    assert torch.equal(start[5], noise(SEED, [5], -1, SHAPE)[0])
    assert not torch.equal(start[5], noise(SEED + 1, [5], -1, SHAPE)[0])
    assert not torch.equal(start[5], noise(SEED, [5], 0, SHAPE)[0])
    assert len({tuple(row.flatten().tolist()) for row in start}) == 64
    assert abs(start.mean().item()) < 0.05 and abs(start.std().item() - 1) < 0.05


def test_a_prompt_at_another_place_starts_from_other_noise() -> None:
    painter, config = network(), dataclasses.replace(CONFIG, steps=2)
    z0 = draw_latents(painter, ["cat", "cat"], config)
    assert not torch.allclose(z0[0], z0[1], atol=0.1)
    assert torch.equal(z0, draw_latents(painter, ["cat", "cat"], config))


def test_no_prompts_give_no_pictures() -> None:
    assert draw_latents(oracle(), [], CONFIG).shape == (0, *SHAPE)


def test_decode_divides_by_the_scale_factor_and_cuts() -> None:
    class Doubler(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.tensor(2.0))

        def decode(self, z: Tensor) -> Tensor:
            return self.weight * z

    z0 = torch.tensor([0.1, 0.2, 4.0]).reshape(3, 1, 1, 1).expand(3, 3, 2, 2)
    image = decode(Doubler(), z0, scale_factor=0.5, batch_size=2)
    assert image[:, 0, 0, 0].tolist() == pytest.approx([0.4, 0.8, 1.0])


@pytest.mark.parametrize(("change", "words"), [
    ({"sampler": "dimm"}, "there are: ddim"),
    ({"spacing": "even"}, "there are: trailing, leading"),
    ({"steps": 0}, "1 to 1000"),
    ({"batch_size": 0}, "must be 1 or more"),
    ({"sampler": "plms", "eta": 0.5}, "which only ddim has"),
])  # fmt: skip
def test_settings_that_cannot_be_followed_are_refused(change: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        draw_latents(oracle(), ["cat"], dataclasses.replace(CONFIG, **change))  # type: ignore[arg-type]

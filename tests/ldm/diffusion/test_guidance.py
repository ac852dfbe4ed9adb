"""Guidance: the order of its batch, what it does at scale 1, and rescaling."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ldm.diffusion.guidance import guided, rescaled

Z, T = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([1, 2, 3])
CONDITION, NULL = {"context": torch.full((3, 1, 1), 5.0)}, {"context": torch.full((3, 1, 1), 2.0)}


class Denoiser:
    """Predicts context * z_t + t and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[Tensor, Tensor, Tensor]] = []

    def __call__(self, z_t: Tensor, t: Tensor, condition: dict[str, Tensor]) -> Tensor:
        self.asked.append((z_t, t, condition["context"]))
        return condition["context"].view(-1, 1, 1, 1) * z_t + t.view(-1, 1, 1, 1)


def test_scale_one_is_the_conditional_prediction_exactly_and_asks_once() -> None:
    denoiser = Denoiser()
    assert torch.equal(guided(denoiser, CONDITION, NULL, 1.0)(Z, T), Denoiser()(Z, T, CONDITION))
    assert len(denoiser.asked) == 1 and len(denoiser.asked[0][0]) == 3


@pytest.mark.parametrize("scale", [0.0, 3.0, 7.5])
def test_one_batch_holds_the_null_half_first(scale: float) -> None:
    denoiser = Denoiser()
    prediction = guided(denoiser, CONDITION, NULL, scale)(Z, T)
    (z_t, t, context), = denoiser.asked
    assert torch.equal(z_t, torch.cat([Z, Z])) and t.tolist() == [1, 2, 3, 1, 2, 3]
    assert context.flatten().tolist() == [2, 2, 2, 5, 5, 5]
    wanted = (2 + scale * 3) * Z + T.view(-1, 1, 1, 1)
    assert (prediction - wanted).abs().max() < 1e-4
    if scale == 0:
        assert torch.equal(prediction, Denoiser()(Z, T, NULL))


def test_a_model_without_condition_is_asked_once() -> None:
    asked = []
    guided(lambda z_t, t, condition: asked.append(condition) or z_t, {}, {}, 5.0)(Z, T)
    assert asked == [{}]


def test_a_null_condition_that_lacks_a_tensor_is_refused() -> None:
    with pytest.raises(ValueError, match="concat"):
        guided(Denoiser(), {**CONDITION, "concat": Z}, NULL, 3.0)


def test_rescaling_brings_back_the_spread_of_each_sample() -> None:
    scale, share = 5.0, 0.7
    plain = guided(Denoiser(), CONDITION, NULL, scale)(Z, T)
    conditional = Denoiser()(Z, T, CONDITION)
    whole = guided(Denoiser(), CONDITION, NULL, scale, rescale=1.0)(Z, T)
    torch.testing.assert_close(whole.std((1, 2, 3)), conditional.std((1, 2, 3)))
    part = guided(Denoiser(), CONDITION, NULL, scale, rescale=share)(Z, T)
    torch.testing.assert_close(part, share * whole + (1 - share) * plain)
    torch.testing.assert_close(rescaled(plain, conditional, 0.0), plain)

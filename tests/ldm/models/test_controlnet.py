"""ControlNet's size, and its numbers against diffusers' class with the same weights."""

import os
import re
import warnings

import pytest
import torch

from ldm.models.controlnet import ControlNet
from ldm.models.unet import UNet
from tests.benchmarks.unet_step import make_pair, to_diffusers
from tests.ldm.models import settings
from tests.ldm.models.test_unet import conf, tiny, trained

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from diffusers import ControlNetModel

SEED = int(os.environ.get("LDM_TEST_SEED", 0))
SMALL = tiny(norm_groups=8)


@pytest.mark.parametrize("name, count", [("sd15", 361_279_120), ("sd21", 364_228_240)])
def test_released_sizes(name: str, count: int) -> None:
    with torch.device("meta"):
        state = ControlNet(conf(name), hint_channels=3).state_dict()
    assert len(state) == 340 and sum(value.numel() for value in state.values()) == count
    assert f"{count:,}" in (settings.CONF / "unet" / f"{name}.yaml").read_text()


def their_name(key: str) -> str:
    """The name of a weight in diffusers' ControlNetModel."""
    key = re.sub(r"^zero_convs\.(\d+)\.0\.", r"controlnet_down_blocks.\1.", key)
    key = key.replace("middle_block_out.0.", "controlnet_mid_block.")
    if match := re.match(r"input_hint_block\.(\d+)\.(.*)", key):
        i = int(match[1]) // 2
        place = {0: "conv_in", 7: "conv_out"}.get(i, f"blocks.{i - 1}")
        return f"controlnet_cond_embedding.{place}.{match[2]}"
    return to_diffusers(key, SMALL.num_res_blocks)


@torch.no_grad()
def test_predictions_under_control_equal_those_of_diffusers() -> None:
    unet, their_unet = make_pair(SMALL)
    ours, theirs = trained(ControlNet(SMALL, hint_channels=3)), ControlNetModel.from_unet(their_unet)
    theirs.load_state_dict({their_name(key): value for key, value in ours.state_dict().items()})
    z_t, t, context = torch.randn(2, 4, 8, 8), torch.tensor([3, 900]), torch.randn(2, 5, 24)
    hint = torch.rand(2, 3, 64, 64)
    control = ours(z_t, t, hint, context)
    down, middle = theirs(z_t, t, context, controlnet_cond=hint, return_dict=False)
    for found, expected in zip(control, [*down, middle], strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    prediction = unet(z_t, t, context, control=control)
    expected = their_unet(z_t, t, context, down_block_additional_residuals=down, mid_block_additional_residual=middle)
    torch.testing.assert_close(prediction, expected.sample, rtol=0, atol=1e-4)
    assert (prediction - unet(z_t, t, context)).abs().max() > 1e-2


@torch.no_grad()
def test_an_untrained_one_changes_nothing() -> None:
    torch.manual_seed(SEED)
    unet, control = trained(UNet(SMALL)), ControlNet(SMALL, hint_channels=1)
    z_t, t, context = torch.randn(1, 4, 8, 8), torch.tensor([3]), torch.randn(1, 5, 24)
    added = control(z_t, t, torch.rand(1, 1, 64, 64), context)
    assert torch.equal(unet(z_t, t, context, control=added), unet(z_t, t, context))


@pytest.mark.parametrize("hint", [(1, 3, 64, 56), (1, 1, 64, 64), (1, 3, 8, 8)])
def test_a_hint_of_another_size_is_refused(hint: tuple[int, ...]) -> None:
    control = ControlNet(SMALL, hint_channels=3)
    with pytest.raises(ValueError, match="control is 1 tensors; this U-Net takes 7"):
        UNet(SMALL)(
            torch.zeros(1, 4, 8, 8), torch.tensor([1]), torch.zeros(1, 5, 24), control=[torch.zeros(1, 32, 8, 8)]
        )
    with pytest.raises(ValueError, match=r"the hint is .*it must be \(3, 64, 64\)"):
        control(torch.zeros(1, 4, 8, 8), torch.tensor([1]), torch.zeros(hint), torch.zeros(1, 5, 24))

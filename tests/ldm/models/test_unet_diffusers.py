"""The same weights here and in diffusers' UNet2DConditionModel give the same predictions and gradients."""

import os
from dataclasses import replace

import pytest
import torch

from tests.benchmarks.unet_step import make_pair, to_diffusers
from tests.ldm.models.test_unet import tiny

SEED = int(os.environ.get("LDM_TEST_SEED", 0))
# with one channel in each group, biases before a norm would have no gradient but rounding
KINDS = {
    "text": tiny(norm_groups=8),
    "linear": tiny(norm_groups=8, num_heads=None, num_head_channels=16, linear_projections=True, num_res_blocks=2),
    "shallow": tiny(norm_groups=8, attention_resolutions=[2, 4], channel_mult=[1, 2, 2]),
}


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_predictions_and_gradients_agree(kind: str, memory_format: torch.memory_format) -> None:
    config = KINDS[kind]
    ours, theirs = (network.to(memory_format=memory_format) for network in make_pair(config))
    torch.manual_seed(SEED)
    z_t = torch.randn(2, 4, 8, 8).contiguous(memory_format=memory_format)
    t, context = torch.randint(0, 1000, (2,)), torch.randn(2, 5, config.context_dim)
    prediction, expected = ours(z_t, t, context), theirs(z_t, t, context).sample
    torch.testing.assert_close(prediction, expected, rtol=0, atol=1e-4)
    prediction.square().sum().backward()
    expected.square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        other = gradients[to_diffusers(name, config.num_res_blocks)]
        largest = other.abs().max().clamp(min=1e-3)
        torch.testing.assert_close(parameter.grad / largest, other / largest, rtol=0, atol=1e-3, msg=name)


def test_one_weight_off_shows() -> None:
    """The twin: the comparison notices a single changed weight."""
    ours, theirs = make_pair(replace(KINDS["text"]))
    with torch.no_grad():
        theirs.conv_in.weight[0, 0, 1, 1] += 0.1
        batch = torch.ones(1, 4, 8, 8), torch.tensor([3]), torch.ones(1, 5, 24)
        assert (ours(*batch) - theirs(*batch).sample).abs().max() > 1e-4

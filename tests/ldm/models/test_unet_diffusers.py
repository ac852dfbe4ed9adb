"""The same weights here and in diffusers' UNet2DConditionModel give the same predictions and gradients."""

import os
import time
from dataclasses import replace

import pytest
import torch

from ldm.models.winograd import use_winograd
from tests.benchmarks.unet_step import make_contenders, make_pair, measure, to_diffusers
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


def test_every_contender_of_the_benchmark_predicts_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    config = replace(KINDS["shallow"], model_channels=64)
    contenders = make_contenders(config, compiled=[], bfloat16=False)  # bfloat16 may be emulated, and slow
    measure(config, contenders, batch_size=2, side=16, repeats=2, clock=time.perf_counter)
    table = capsys.readouterr().out
    assert len(contenders) == 5 and all(table.count(contender.name + " ") >= 2 for contender in contenders)
    with torch.no_grad():
        contenders[3].network.get_parameter("conv_in.weight").mul_(2)
    with pytest.raises(AssertionError):
        measure(config, contenders, batch_size=2, side=16, repeats=2, clock=time.perf_counter)


@pytest.mark.slow
@pytest.mark.parametrize("winograd", [False, True])
def test_compiled_network_predicts_the_same(winograd: bool) -> None:
    config = replace(KINDS["shallow"], model_channels=64, channel_mult=[1, 1], transformer_depth=[1, 1])
    unet = make_pair(config)[0].to(memory_format=torch.channels_last)
    if winograd:
        use_winograd(unet)
    torch.manual_seed(SEED)
    batch = torch.randn(2, 4, 16, 16), torch.tensor([3, 900]), torch.randn(2, 5, config.context_dim)
    compiled = torch.compile(unet)
    grads = []
    for network in (unet, compiled):
        unet.zero_grad()
        prediction = network(*batch)
        prediction.square().mean().backward()
        grads.append([parameter.grad.clone() for parameter in unet.parameters()])
    torch.testing.assert_close(compiled(*batch), unet(*batch), rtol=0, atol=1e-4)
    for found, expected in zip(*grads, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)

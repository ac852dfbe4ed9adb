"""U-Nets against numbers of the original code, their sizes against the published counts, and what they refuse."""

import os
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ldm.config import UNetConfig
from ldm.models.attention import SpatialTransformer, TransformerBlock
from ldm.models.blocks import ResBlock, checkpoint_activations, embed_timestep
from ldm.models.unet import LatentClassifier, UNet
from tests.ldm.models import settings
from tests.ldm.models.original import Golden, unet_config

SEED = int(os.environ.get("LDM_TEST_SEED", 0))
CASES = ["text", "adm", "churches", "sdxl", "semantic", "class", "uncond", "layout"]
RELEASED = {
    "txt2img_1p45b": 872_300_484,
    "text2img256": 403_623_939,
    "lsun_churches256": 294_966_916,
    "bsr_sr": 113_622_563,
    "inpainting_big": 387_245_827,
    "inpainting_base": 215_230_467,
    "semantic_synthesis256": 215_229_315,
    "layout2img_openimages256": 246_277_379,
    "rdm768": 1_335_480_400,
    "cin256_f4": 400_920_579,
    "cin256_f8": 394_984_196,
    "uncond_f4": 274_056_163,
    "sd15": 859_520_964,
    "sd15_inpainting": 859_535_364,
    "sd21": 865_910_724,
    "sd21_inpainting": 865_925_124,
    "sd21_depth": 865_913_604,
    "x4_upscaler": 473_398_020,
    "sdxl_base": 2_567_463_684,
    "sdxl_refiner": 2_259_526_660,
}
# in millions, as Tables 13 and 14 of the paper were counted
SWEEP = {
    "cin256": {1: 396.84, 2: 390.89, 4: 400.92, 8: 394.98, 16: 395.00, 32: 395.11},
    "uncond": {1: 270.46, 2: 264.51, 4: 274.06, 8: 257.73, 16: 257.75, 32: 257.86},
}
FORMATS = [torch.contiguous_format, torch.channels_last]


def conf(name: str) -> UNetConfig:
    return settings.read(UNetConfig, "unet", name)


def tiny(**changes: object) -> UNetConfig:
    """A small text U-Net of three levels, with changes."""
    small = replace(conf("txt2img_1p45b"), model_channels=32, channel_mult=[1, 1, 2], num_res_blocks=1, context_dim=24)
    return replace(small, **{"transformer_depth": [1, 1, 1], **changes})


def trained(unet: torch.nn.Module) -> torch.nn.Module:
    """With random numbers where training starts at zero, so that every block shows in the result."""
    torch.manual_seed(SEED)
    for parameter in unet.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return unet


def load(case: Golden) -> UNet:
    unet = UNet(unet_config(case.params))
    unet.load_state_dict(case.weights())
    return unet


def condition(case: Golden) -> dict[str, Tensor | None]:
    y = case.input("y")
    name = "class_label" if y is None or not y.is_floating_point() else "vector"
    return {"context": case.input("context"), name: y}


@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_prediction_equals_the_original(name: str, memory_format: torch.memory_format) -> None:
    case = Golden("unet_" + name)
    unet = load(case).to(memory_format=memory_format)
    z_t = case.input("x").contiguous(memory_format=memory_format)
    prediction = unet(z_t, case.input("timesteps"), **condition(case))
    print("largest difference", (prediction - case.output("prediction")).abs().max().item())
    torch.testing.assert_close(prediction, case.output("prediction"), **case.bounds("prediction"))


@pytest.mark.parametrize(
    "change",
    [{"norm_groups": 16}, {"num_heads": 4}, {"attention_resolutions": [4, 2]}],
    ids=lambda change: next(iter(change)),
)
@torch.no_grad()
def test_another_configuration_gives_other_numbers(change: dict) -> None:
    """The twin of the test above: its tolerance does tell architectures apart."""
    case = Golden("unet_text")
    unet = UNet(replace(unet_config(case.params), **change))
    unet.load_state_dict(case.weights(), strict=False)
    prediction = unet(case.input("x"), case.input("timesteps"), **condition(case))
    assert (prediction - case.output("prediction")).abs().max() > 100 * case.bounds("prediction")["atol"]


def test_qkv_orders_differ() -> None:
    case = Golden("unet_adm")
    swapped = UNet(replace(unet_config(case.params), qkv_order="head_first"))
    swapped.load_state_dict(case.weights())
    prediction = swapped(case.input("x"), case.input("timesteps"), **condition(case))
    assert (prediction - case.output("prediction")).abs().max() > 0.1


@pytest.mark.parametrize("checkpointed", [False, True])
def test_gradients_equal_the_original(checkpointed: bool) -> None:
    case = Golden("unet_text")
    unet = load(case)
    if checkpointed:
        checkpoint_activations(unet, (ResBlock, SpatialTransformer))
    z_t, context = case.input("x").requires_grad_(), case.input("context").requires_grad_()
    (unet(z_t, case.input("timesteps"), context) * case.input("grad_weight")).sum().backward()
    found = {"grad_input/x": z_t.grad, "grad_input/context": context.grad}
    found |= {"grad/" + name: parameter.grad for name, parameter in unet.named_parameters()}
    names = [name for name in case.tolerance if name.startswith("grad")]
    assert len(names) == 5
    for name in names:
        torch.testing.assert_close(found[name], case.output(name), **case.bounds(name))


def test_timestep_embedding_equals_the_original() -> None:
    case = Golden("unet_text")
    found = embed_timestep(case.input("timesteps"), case.params["model_channels"])
    torch.testing.assert_close(found, case.output("t_emb"), **case.bounds("t_emb"))


def test_classifier_equals_the_original() -> None:
    case = Golden("classifier_attention")
    classifier = LatentClassifier(unet_config(case.params), latent_size=case.params["image_size"])
    classifier.load_state_dict(case.weights())
    z_t = case.input("x").requires_grad_()
    logits = classifier(z_t, case.input("timesteps"))
    chosen = logits.log_softmax(dim=1).gather(1, case.input("labels")[:, None]).sum()
    (grad,) = torch.autograd.grad(chosen, z_t)
    torch.testing.assert_close(logits, case.output("logits"), **case.bounds("logits"))
    torch.testing.assert_close(grad, case.output("grad_log_prob_wrt_x"), **case.bounds("grad_log_prob_wrt_x"))


@pytest.mark.parametrize("name", RELEASED)
def test_released_sizes(name: str) -> None:
    assert count(UNet, conf(name)) == RELEASED[name]
    assert f"{RELEASED[name]:,} parameters" in (settings.CONF / "unet" / f"{name}.yaml").read_text()


@pytest.mark.parametrize("factor", SWEEP["cin256"])
@pytest.mark.parametrize("kind", SWEEP)
def test_sizes_of_the_sweep_over_downsampling(kind: str, factor: int) -> None:
    found = count(UNet, conf(f"{kind}_f{factor}"))
    assert round(found / 1e6, 2) == SWEEP[kind][factor]
    assert f"{found:,} parameters" in (settings.CONF / "unet" / f"{kind}_f{factor}.yaml").read_text()


def test_size_of_the_classifier() -> None:
    assert count(LatentClassifier, conf("cin256_f8_classifier"), 32) == 111_604_200


def test_no_file_of_the_section_is_forgotten() -> None:
    swept = {f"{kind}_f{factor}" for kind, factors in SWEEP.items() for factor in factors}
    files = {file.stem for file in (settings.CONF / "unet").glob("*.yaml")}
    assert files - swept - set(RELEASED) == {"cin256_f8_classifier", "openmoji"}
    assert count(UNet, conf("openmoji")) < 30e6


def count(kind: type[torch.nn.Module], *arguments: object) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in kind(*arguments).parameters())


@torch.no_grad()
def test_an_untrained_network_predicts_zero() -> None:
    torch.manual_seed(SEED)
    unet = UNet(tiny())
    assert not unet(torch.randn(2, 4, 8, 8), torch.tensor([3, 4]), torch.randn(2, 5, 24)).any()
    assert trained(unet)(torch.randn(2, 4, 8, 8), torch.tensor([3, 4]), torch.randn(2, 5, 24)).any()


@torch.no_grad()
def test_concatenated_channels_come_after_those_of_z_t() -> None:
    unet = trained(UNet(tiny(in_channels=7)))
    z_t, concat, context = torch.randn(2, 4, 8, 8), torch.randn(2, 3, 8, 8), torch.randn(2, 5, 24)
    t = torch.tensor([1, 2])
    joined = unet(torch.cat([z_t, concat], dim=1), t, context)
    torch.testing.assert_close(unet(z_t, t, context, concat=concat), joined, rtol=0, atol=0)


@torch.no_grad()
def test_cross_only_levels_do_not_mix_positions() -> None:
    """Without self-attention, a transformer treats each position by itself."""
    torch.manual_seed(SEED)
    tokens, context = torch.randn(1, 16, 32), torch.randn(1, 5, 24)
    other = tokens.clone()
    other[:, 0] = torch.randn(32)
    for cross_only in (True, False):
        block = TransformerBlock(32, 4, context_dim=24, cross_only=cross_only)
        moved = (block(tokens, context) - block(other, context)).abs().amax(dim=2)[0]  # (l,)
        assert moved[0] > 0.01
        assert (moved[1:].max() < 1e-6) == cross_only


def test_checkpointing_computes_blocks_again_and_keeps_names() -> None:
    unet, calls = trained(UNet(tiny())), []
    names = list(unet.state_dict())
    checkpoint_activations(unet, (ResBlock,))
    assert list(unet.state_dict()) == names
    unet.middle_block[0].in_layers[2].register_forward_hook(lambda *_: calls.append(1))
    unet(torch.randn(1, 4, 8, 8), torch.tensor([5]), torch.randn(1, 5, 24)).sum().backward()
    assert len(calls) == 2  # once forward, once more on the way back


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"z_t": (1, 4, 10, 12)}, r"10 x 12 cannot be halved 2 times.*divide by 4.*unet\.channel_mult"),
        ({"z_t": (1, 3, 8, 8)}, r"3 channels.*condition 0.*unet\.in_channels is 4"),
        ({"concat": (1, 3, 8, 8)}, r"4 channels.*condition 3.*unet\.in_channels is 4"),
        ({"context": (1, 5, 48)}, r"context's width is 48.*unet\.context_dim is 24"),
        ({"context": None}, r"context's width is None.*unet\.context_dim is 24"),
        ({"vector": (1, 9)}, r"vector's width is 9.*unet\.vector_dim is None"),
        ({"class_label": (1,)}, r"class_label was given.*unet\.num_classes is None"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_before_computing(shapes: dict, message: str) -> None:
    unet = UNet(tiny())
    unet.time_embed.register_forward_hook(lambda *_: pytest.fail("it has begun to compute"))
    given = {"z_t": (1, 4, 8, 8), "context": (1, 5, 24)} | shapes
    tensors = {name: None if shape is None else torch.zeros(shape) for name, shape in given.items()}
    with pytest.raises(ValueError, match=message):
        unet(t=torch.tensor([1]), **tensors)


def test_sides_of_concat_and_of_a_classifier_are_checked() -> None:
    with pytest.raises(ValueError, match=r"concat is \(4, 4\) and z_t \(8, 8\)"):
        UNet(tiny(in_channels=7))(
            torch.zeros(1, 4, 8, 8), torch.tensor([1]), torch.zeros(1, 5, 24), concat=torch.zeros(1, 3, 4, 4)
        )
    classifier = LatentClassifier(tiny(transformer_depth=None, context_dim=None), latent_size=16)
    with pytest.raises(ValueError, match="8 x 8.*latent_size is 16"):
        classifier(torch.zeros(1, 4, 8, 8), torch.tensor([1]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_head_channels": 16}, r"unet\.num_heads is 8 and unet\.num_head_channels 16"),
        ({"num_heads": None}, r"unet\.num_heads is None and unet\.num_head_channels None"),
        ({"num_heads": 7}, r"32 channels.*unet\.num_heads, 7"),
        ({"norm_groups": 24}, r"32 channels.*unet\.norm_groups, 24"),
        ({"transformer_depth": [1, 1]}, r"unet\.transformer_depth has 2 entries; unet\.channel_mult has 3"),
        ({"transformer_depth": None}, r"unet\.context_dim is 24 but unet\.transformer_depth is null"),
        ({"num_classes": 10, "vector_dim": 8}, r"unet\.num_classes is 10 and unet\.vector_dim 8"),
        ({"num_res_blocks": 0}, r"unet\.num_res_blocks is 0"),
        ({"channel_mult": []}, r"unet\.channel_mult is \[\]"),
        ({"qkv_order": "vkq"}, r'unet\.qkv_order is "vkq"'),
    ],
)
def test_settings_that_describe_no_network_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        UNet(tiny(**changes))

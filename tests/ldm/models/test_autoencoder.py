"""The paper's autoencoders against numbers of the original code, and their sizes against the published counts."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ldm.config import AutoencoderConfig, AutoencoderSettings, CompvisConfig
from ldm.models.autoencoder import (
    Autoencoder,
    ResBlock,
    draw_latent,
    enlarged_conv,
    gaussian_kl,
    load_autoencoder,
    make_autoencoder,
    posterior_kl,
    split_moments,
)
from ldm.models.quantize import codebook_loss
from ldm.models.winograd import use_winograd
from tests.ldm import golden
from tests.ldm.models import settings

SEED = int(os.environ.get("LDM_TEST_SEED", 0))
RELEASED = {
    "kl_f4": 55_312_063,
    "kl_f8": 83_653_863,
    "kl_f16": 69_610_963,
    "kl_f32": 103_880_131,
    "vq_f4": 55_322_782,
    "vq_f4_noattn": 53_219_486,
    "vq_f8": 67_717_295,
    "vq_f8_n256": 67_652_783,
    "vq_f16": 69_593_371,
    "sdxl_f8": 83_653_863,
    "x4_upscaler_f4": 55_325_927,
}


def from_original(params: dict) -> AutoencoderConfig:
    """Our settings for an original's, whose attention is given by the side of a map."""
    sizes = params["ddconfig"]
    return AutoencoderConfig(
        kind="compvis",
        posterior="kl" if sizes["double_z"] else "vq",
        factor=2 ** (len(sizes["ch_mult"]) - 1),
        latent_channels=params["embed_dim"],
        compvis=CompvisConfig(
            channels=sizes["ch"],
            channel_mult=sizes["ch_mult"],
            num_res_blocks=sizes["num_res_blocks"],
            attention_factors=[sizes["resolution"] // side for side in sizes["attn_resolutions"]],
            middle_attention=True,
            codes=params.get("n_embed"),
        ),
        tiny=None,
    )


def load(name: str) -> tuple[Autoencoder, dict[str, torch.Tensor], dict]:
    values, about = golden.load(name), golden.facts(name)
    autoencoder = make_autoencoder(from_original(about["config"]["params"])).requires_grad_(False).eval()
    weights = {k.removeprefix("weights/"): v.float() for k, v in values.items() if k.startswith("weights/")}
    autoencoder.load_state_dict(weights)
    return autoencoder, values, about["tolerance"]


def compare(found: dict, values: dict[str, torch.Tensor], tolerance: dict, atol: float = 0.0) -> None:
    for name, value in found.items():
        expected, bound = values[f"output/{name}"], tolerance[name]
        largest = (value - expected).abs().max().item()
        print(f"{name}: largest difference {largest:.1e}, allowed {bound['suggested_atol']:.0e}")
        allowed = max(atol, bound["suggested_atol"]) + bound["suggested_rtol"] * expected.abs()
        assert ((value - expected).abs() <= allowed).all(), f"{name} differs by {largest}"


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", ["kl_f4", "kl_f8", "kl_f16", "kl_f32"])
def test_kl_equals_the_original(name: str, grad: bool) -> None:
    autoencoder, values, tolerance = load(name)
    autoencoder.requires_grad_(grad)
    with torch.set_grad_enabled(grad):
        moments = autoencoder.encode(values["input/image"])
        decoded = autoencoder.decode(values["input/z"])
        reconstruction = autoencoder(values["input/image"])
    mean, logvar = split_moments(moments.detach())
    found = {
        "moments": moments.detach(),
        "mean": mean,
        "mode": mean,
        "logvar": logvar,
        "std": torch.exp(logvar / 2),
        "sample": draw_latent(moments.detach(), values["input/noise"], 1.0),
        "kl": posterior_kl(moments.detach()),
        "decoded": decoded.detach(),
        "reconstruction_from_mode": reconstruction.detach(),
    }
    compare(found, values, tolerance)


@pytest.mark.parametrize("name", ["vq_f4", "vq_f8", "vq_f16"])
@torch.no_grad()
def test_vq_equals_the_original(name: str) -> None:
    autoencoder, values, tolerance = load(name)
    z = autoencoder.encode(values["input/image"])
    indices = autoencoder.quantize.indices(z)
    assert torch.equal(indices.flatten(), values["output/indices"])
    found = {
        "prequant": z,
        "quantized": autoencoder.quantize(z),
        "codebook_entry": autoencoder.quantize.entries(indices),
        "codebook_loss": codebook_loss(z, autoencoder.quantize(z), beta=0.25, legacy=True),
        "decoded": autoencoder.decode(z),
        "decoded_without_quantization": autoencoder.decode_quantized(z),
    }
    compare(found, values, tolerance)


@pytest.mark.parametrize("name", ["kl_f8", "vq_f16"])
@torch.no_grad()
def test_channels_last_gives_nearly_the_same(name: str) -> None:
    # Torch's group norm is less exact in this memory format on a processor: mean of squares less square of mean.
    autoencoder, values, tolerance = load(name)
    autoencoder.to(memory_format=torch.channels_last)
    encoded = autoencoder.encode(values["input/image"])
    assert encoded.is_contiguous(memory_format=torch.channels_last)
    z = values.get("input/z", values.get("output/quantized"))
    found = {"moments" if name == "kl_f8" else "prequant": encoded, "decoded": autoencoder.decode_quantized(z)}
    compare(found, values, tolerance, atol=3e-4)


@torch.no_grad()
def test_a_wrong_epsilon_would_be_seen() -> None:
    autoencoder, values, tolerance = load("kl_f8")
    for module in autoencoder.modules():
        if isinstance(module, torch.nn.GroupNorm):
            module.eps = 1e-5
    with pytest.raises(AssertionError, match="decoded"):
        compare({"decoded": autoencoder.decode(values["input/z"])}, values, tolerance)


def test_the_posterior_equals_the_original() -> None:
    values = golden.load("posterior")
    moments, other = values["input/parameters"], values["input/other_parameters"]
    mean, logvar = split_moments(moments)
    between = gaussian_kl(mean, logvar, *split_moments(other))
    found = {
        "mean": mean,
        "logvar": logvar,
        "std": torch.exp(logvar / 2),
        "var": torch.exp(logvar),
        "sample": draw_latent(moments, values["input/noise"], 1.0),
        "kl": posterior_kl(moments),
        "kl_other": posterior_kl(other),
        "kl_to_other": between.flatten(1).sum(1),
        "normal_kl": between,
    }
    for name, value in found.items():
        torch.testing.assert_close(value, values[f"output/{name}"], rtol=1e-5, atol=1e-5)


# ---- gradients --------------------------------------------------------------------------------------------
def test_enlarging_and_convolving_at_once_is_the_same() -> None:
    generator = torch.Generator().manual_seed(SEED)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(2, 5, 6, 7, dtype=torch.float64, generator=generator).to(memory_format=memory_format)
        conv = torch.nn.Conv2d(5, 4, 3, padding=1).double()
        factor = torch.randn(2, 4, 12, 14, dtype=torch.float64, generator=generator)
        inputs = [x.requires_grad_(), conv.weight, conv.bias]
        plain = conv(torch.nn.functional.interpolate(x, scale_factor=2, mode="nearest"))
        ours = enlarged_conv(x, conv.weight, conv.bias)
        torch.testing.assert_close(ours, plain)
        assert ours.is_contiguous(memory_format=memory_format)
        for a, b in zip(*(torch.autograd.grad((y * factor).sum(), inputs) for y in (ours, plain)), strict=True):
            torch.testing.assert_close(a, b)


def test_gradients_are_those_of_the_plain_formulas() -> None:
    torch.manual_seed(SEED)
    block, x = ResBlock(32, 64).double(), torch.randn(1, 32, 4, 4, dtype=torch.float64, requires_grad=True)
    silu = torch.nn.functional.silu
    plain = block.conv2(silu(block.norm2(block.conv1(silu(block.norm1(x)))))) + block.nin_shortcut(x)
    inputs = [x, *block.parameters()]
    for a, b in zip(*(torch.autograd.grad(y.sin().sum(), inputs) for y in (block(x), plain)), strict=True):
        torch.testing.assert_close(a, b)


def test_it_trains_with_winograd_convolutions() -> None:
    autoencoder, values, _ = load("kl_f8")
    autoencoder.requires_grad_(True)
    reconstruction = autoencoder(values["input/image"])
    gradients = torch.autograd.grad(reconstruction.square().mean(), list(autoencoder.parameters()))
    use_winograd(autoencoder)
    again = autoencoder(values["input/image"])
    torch.testing.assert_close(again, reconstruction, rtol=0, atol=2e-3)
    for a, b in zip(torch.autograd.grad(again.square().mean(), list(autoencoder.parameters())), gradients, strict=True):
        assert (a - b).norm() <= 1e-2 * b.norm() + 1e-6


# ---- sizes ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", RELEASED)
def test_parameter_counts(name: str) -> None:
    config = settings.read(AutoencoderSettings, "autoencoder", name)
    with torch.device("meta"):
        autoencoder = make_autoencoder(config.network)
        image = torch.empty(2, 3, 256, 256)
    assert sum(p.numel() for p in autoencoder.parameters()) == RELEASED[name]
    assert f"{RELEASED[name]:,} parameters" in (settings.CONF / "autoencoder" / f"{name}.yaml").read_text()
    side, channels = 256 // config.network.factor, config.network.latent_channels
    stored = autoencoder.encode(image)
    assert stored.shape == (2, channels * (2 if config.network.posterior == "kl" else 1), side, side)
    assert autoencoder.decode_quantized(stored[:, :channels]).shape == image.shape


# ---- draw_latent ------------------------------------------------------------------------------------------
def test_draw_latent_by_hand() -> None:
    moments = torch.tensor([1.0, -2.0, 0.0, 2 * torch.log(torch.tensor(3.0))]).view(1, 4, 1, 1)
    eps = torch.tensor([0.5, 2.0]).view(1, 2, 1, 1)
    assert draw_latent(moments, eps, 0.5).flatten().tolist() == pytest.approx([0.75, 2.0])
    stored = moments.half()
    assert draw_latent(stored, eps, 0.5).dtype == torch.float32


def test_a_latent_is_only_scaled_and_other_shapes_are_refused() -> None:
    latent = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(SEED))
    assert torch.equal(draw_latent(latent, torch.ones_like(latent), 2.0), 2 * latent)
    with pytest.raises(ValueError, match="moments .*8, 4, 4.* noise .*3, 4, 4"):
        draw_latent(torch.zeros(2, 8, 4, 4), latent, 1.0)


# ---- loading ----------------------------------------------------------------------------------------------
@pytest.fixture
def saved(tmp_path: Path) -> tuple[AutoencoderSettings, dict[str, torch.Tensor]]:
    torch.manual_seed(SEED)
    config = replace(from_original(golden.facts("vq_f4")["config"]["params"]), posterior="vq")
    state = make_autoencoder(config).state_dict()
    save_file(state, tmp_path / "weights.safetensors")
    return AutoencoderSettings(network=config, weights=str(tmp_path / "weights.safetensors"), scale_factor=1.0), state


def test_load_gives_the_saved_weights_frozen(saved) -> None:
    config, state = saved
    autoencoder = load_autoencoder(config, "cpu")
    assert not autoencoder.training and not any(p.requires_grad for p in autoencoder.parameters())
    found = autoencoder.state_dict()
    assert found.keys() == state.keys() and all(torch.equal(found[key], state[key]) for key in state)


def test_load_names_every_key_that_does_not_fit(saved) -> None:
    config, state = saved
    del state["quant_conv.bias"]
    state["loss.logvar"] = torch.zeros(())
    state["decoder.conv_out.bias"] = torch.zeros(4)
    save_file(state, config.weights)
    with pytest.raises(ValueError) as error:
        load_autoencoder(config, "cpu")
    for part in ("quant_conv.bias is missing", "loss.logvar is unexpected", "decoder.conv_out.bias is (4,), not (3,)",
                 config.weights, "pipelines.inspect"):  # fmt: skip
        assert part in str(error.value)


def test_load_names_the_path_that_is_missing(saved) -> None:
    with pytest.raises(FileNotFoundError, match="no autoencoder weights at nowhere"):
        load_autoencoder(replace(saved[0], weights="nowhere"), "cpu")


# ---- bad input --------------------------------------------------------------------------------------------
def test_pictures_and_latents_that_do_not_fit_are_refused(saved) -> None:
    autoencoder = make_autoencoder(saved[0].network)
    for shape in ((1, 3, 62, 64), (1, 3, 64, 30), (1, 1, 64, 64)):
        with pytest.raises(ValueError, match=f"{shape[1]} channels, {shape[2]}x{shape[3]}.*multiples of 4"):
            autoencoder.encode(torch.zeros(shape))
    with pytest.raises(ValueError, match="4 channels.*autoencoder of 3"):
        autoencoder.decode(torch.zeros(1, 4, 8, 8))


@pytest.mark.parametrize(
    "change, complaint",
    [
        ({"kind": "vae"}, 'kind is "vae"'),
        ({"posterior": "gauss"}, 'posterior is "gauss"'),
        ({"factor": 8}, "factor is 8; the 3 levels of channel_mult make 4"),
        ({"compvis": None}, "compvis is null"),
        ({"posterior": "kl"}, "codes is 64"),
        ({"attention_factors": [3]}, r"attention_factors has \[3\]"),
        ({"channels": 48}, "channels is 48"),
    ],
)
def test_settings_that_describe_no_network_are_refused(saved, change: dict, complaint: str) -> None:
    config = saved[0].network
    if change.keys() <= {"attention_factors", "channels"}:
        change = {"compvis": replace(config.compvis, **change)}
    with pytest.raises(ValueError, match=complaint):
        make_autoencoder(replace(config, **change))

"""Every key of every released model has its place; weights go to the original's layout and come back to the bit."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ldm.config import (
    AutoencoderSettings,
    ClassEmbedderConfig,
    DiffusionConfig,
    SpatialRescalerConfig,
    TextEncoderConfig,
    UNetConfig,
)
from ldm.diffusion.schedule import make_schedule
from ldm.interop import compvis
from ldm.interop.checkpoint_file import open_file, save
from ldm.interop.entry import load, misfits, require_fit, shapes, to_own
from ldm.models.autoencoder import make_autoencoder
from ldm.models.denoiser import make_denoiser
from ldm.models.text_encoder import make_text_encoder
from ldm.models.unet import UNet
from tests.ldm.interop.small import AUTOENCODERS, BERT, UNETS, clip, conf, key_list, trained
from tests.ldm.models.settings import CONF

# Listing -> our configurations of U-Net, autoencoder and text encoder.
RELEASED = {
    "ldm_txt2img-1p4B": ("txt2img_1p45b", "kl_f8", "bert_1p45b"),
    "ldm_text2img256": ("text2img256", "vq_f4", "bert_text2img256"),
    "ldm_layout2img-openimages256": ("layout2img_openimages256", "vq_f4", "layout"),
    "ldm_cin256-v2": ("cin256_f4", "vq_f4", None),
    "ldm_cin256-vq-f8": ("cin256_f8", "vq_f8", None),
    "ldm_celebahq256": ("uncond_f4", "vq_f4", None),
    "ldm_lsun_churches256": ("lsun_churches256", "kl_f8", None),
    "ldm_bsr_sr": ("bsr_sr", "vq_f4", None),
    "ldm_inpainting_big": ("inpainting_big", "vq_f4_noattn", None),
    "ldm_semantic_synthesis256": ("semantic_synthesis256", "vq_f4", None),
    "stable-diffusion-v1-5": ("sd15", "kl_f8", "clip_vit_l_14"),
    "stable-diffusion-2-1": ("sd21", "kl_f8", "openclip_vit_h_14"),
    "stable-diffusion-xl-base-1-0": ("sdxl_base", "sdxl_f8", "sdxl"),
}
# How many of those keys are not ours: 12 tables, 2 states of the average, 2 of to_logits, ...
DROPPED = {
    "ldm_txt2img-1p4B": 12 + 2 + 2, "ldm_text2img256": 16, "ldm_layout2img-openimages256": 16, "ldm_cin256-v2": 12,
    "ldm_cin256-vq-f8": 14, "ldm_celebahq256": 14, "ldm_lsun_churches256": 15, "ldm_bsr_sr": 14,
    "ldm_inpainting_big": 14, "ldm_semantic_synthesis256": 14, "stable-diffusion-v1-5": 15,
    "stable-diffusion-2-1": 12 + 2 + 2 + 12, "stable-diffusion-xl-base-1-0": 2,
}  # fmt: skip
FIRST_STAGES = ["kl-f4", "kl-f8", "kl-f16", "kl-f32", "vq-f4", "vq-f4-noattn", "vq-f8", "vq-f8-n256", "vq-f16"]


def on_meta(listing: str) -> dict[str, Tensor]:
    return {key: torch.empty(shape, device="meta") for key, shape in key_list(listing).items()}


@functools.cache
def network(kind: type, section: str, name: str) -> nn.Module:
    config = conf(kind, section, name)
    with torch.device("meta"):
        if kind is UNetConfig:
            return UNet(config)
        return make_text_encoder(config) if kind is TextEncoderConfig else make_autoencoder(config.network)


# ---- every key, at real size ------------------------------------------------------------------------------
@pytest.mark.parametrize("listing", RELEASED)
def test_every_key_of_a_released_model_is_ours_or_dropped_for_a_reason(listing: str) -> None:
    theirs = on_meta(listing)
    found = compvis.layout(theirs)
    assert found.unknown == [] and found.missing == []
    assert found.keys() | found.dropped.keys() | found.duplicates.keys() == theirs.keys()
    assert not found.keys() & found.dropped.keys() and not found.keys() & found.duplicates.keys()
    assert len(found.dropped) == DROPPED[listing] and all(found.dropped.values())
    unet, autoencoder, text = RELEASED[listing]
    expected = {"unet": network(UNetConfig, "unet", unet), "unet_ema": network(UNetConfig, "unet", unet),
                "autoencoder": network(AutoencoderSettings, "autoencoder", autoencoder)}  # fmt: skip
    if text is not None:
        expected["text_encoder"] = network(TextEncoderConfig, "text_encoder", text)
    for part, entries in found.parts.items():
        own = shapes(to_own(entries, theirs.__getitem__))
        if part in expected:
            require_fit(own, shapes(expected[part].state_dict()), f"{listing} {part}")
    others = {"class_embedder": {"embedding.weight"}, "spatial_rescaler": {"channel_mapper.weight"}}
    for part in found.parts.keys() - expected.keys():
        assert {entry.own for entry in found.parts[part]} == others[part]
    assert expected.keys() - found.parts.keys() <= {"unet_ema"}


@pytest.mark.parametrize("name", FIRST_STAGES)
def test_every_key_of_a_first_stage(name: str) -> None:
    theirs = on_meta(f"first_stage_{name}")
    found = compvis.layout(theirs)
    assert found.unknown == [] and list(found.parts) == ["autoencoder"]
    assert set(found.dropped) == {key for key in theirs if key.startswith("loss.")} and len(found.dropped) > 40
    ours = network(AutoencoderSettings, "autoencoder", name.replace("-", "_")).state_dict()
    require_fit(shapes(to_own(found.parts["autoencoder"], theirs.__getitem__)), shapes(ours), name)


def test_the_first_stage_that_comes_twice() -> None:
    found = compvis.layout(key_list("ldm_inpainting_big"))
    assert len(found.duplicates) == 185 and "text_encoder" not in found.parts
    for key, other in found.duplicates.items():
        assert key.replace("cond_stage_model.", "first_stage_model.") == other


@pytest.mark.parametrize("listing", RELEASED)
def test_what_we_write_has_every_key_and_shape_of_the_original(listing: str) -> None:
    """There, without to_logits, position_ids and the like, and back."""
    theirs = on_meta(listing)
    found = compvis.layout(theirs)
    parts = {part: to_own(entries, theirs.__getitem__) for part, entries in found.parts.items()}
    averages = parts.pop("unet_ema", None)
    kept = {key: theirs[key] for key in theirs if compvis.COND in key or "conditioner" in key}
    rest = {key: kept[key] for key in kept if key in found.dropped or key in found.duplicates}
    schedule = make_schedule("sqrt_linear", 1000, 0.0015, 0.0195, False) if "betas" in theirs else None
    scale = 0.5 if "scale_factor" in theirs else None
    written = compvis.write(parts, schedule=schedule, scale_factor=scale, averages=averages, rest=rest)
    assert misfits(shapes(written), key_list(listing)) == []


def test_a_layer_that_is_never_run_becomes_zeros() -> None:
    theirs = {key: torch.zeros(shape) for key, shape in small_bert_file().items()}
    part = to_own(compvis.layout(theirs).parts["text_encoder"], theirs.__getitem__)
    written = compvis.write({"text_encoder": part})
    assert shapes(written) == shapes(theirs)
    assert not written["cond_stage_model.transformer.to_logits.weight"].any()


def small_bert_file() -> dict[str, tuple[int, ...]]:
    written = compvis.write({"text_encoder": trained(make_text_encoder(BERT)).state_dict()})
    assert {f"cond_stage_model.transformer.to_logits.{name}" for name in ("weight", "bias")} < set(written)
    return shapes(written)


def test_stable_diffusion_2_cannot_be_written_without_the_layer_that_it_never_runs() -> None:
    state = trained(make_text_encoder(clip("openclip_vit_h_14"))).state_dict()
    with pytest.raises(ValueError, match=r"resblocks\.2\.\*"):
        compvis.write({"text_encoder": state})


# ---- whole files, small -----------------------------------------------------------------------------------
MODELS = {
    "text": dict(unet=UNETS["text"], text_encoder=BERT),
    "sd1": dict(unet=UNETS["text"], text_encoder=clip("clip_vit_l_14")),
    "sdxl": dict(unet=replace(UNETS["sdxl"], context_dim=48), text_encoder=clip("sdxl")),
    "refiner": dict(unet=UNETS["sdxl"], text_encoder=clip("openclip_bigg_14")),
    "class": dict(unet=UNETS["class_token"], text_encoder=None, class_embedder=ClassEmbedderConfig(5, 24)),
    "semantic": dict(unet=UNETS["semantic"], text_encoder=None,
                     spatial_rescaler=SpatialRescalerConfig(2, "bilinear", 0.5, 6, 3, False)),
    "churches": dict(unet=UNETS["churches_like"], text_encoder=None),
}  # fmt: skip
SCHEDULE = make_schedule("sqrt_linear", 1000, 0.0015, 0.0155, False)


def parts_of(kind: str, autoencoder: str = "kl_f8") -> dict[str, dict[str, Tensor]]:
    denoiser = trained(make_denoiser(**MODELS[kind]))
    parts = {name: module.state_dict() for name, module in denoiser.named_children()}
    return parts | {"autoencoder": trained(make_autoencoder(AUTOENCODERS[autoencoder])).state_dict()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) and a[key].dtype == b[key].dtype for key in a)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_ours_to_the_original_and_back_is_bit_equal(tmp_path: Path, kind: str, suffix: str) -> None:
    parts, path = parts_of(kind), tmp_path / f"model{suffix}"
    averages = {key: value + 1 for key, value in parts["unet"].items()}
    save(path, compvis.write(parts, schedule=SCHEDULE, scale_factor=0.25, averages=averages, decay=0.99, updates=7))
    newest = compvis.read(open_file(path), averaged=False)
    assert newest.parts.keys() == parts.keys() and all(equal(newest.parts[part], parts[part]) for part in parts)
    assert newest.scale_factor == 0.25 and not newest.averaged
    assert torch.equal(newest.schedule.signal, SCHEDULE.signal)
    chosen = compvis.read(open_file(path))  # the averages, since there are some
    assert chosen.averaged and equal(chosen.parts["unet"], averages)
    assert all(equal(chosen.parts[part], parts[part]) for part in parts if part != "unet")
    again = compvis.write(chosen.parts, schedule=SCHEDULE, scale_factor=0.25, averages=averages, decay=0.99, updates=7)
    first = open_file(path).state()
    assert again.keys() == first.keys()
    assert all(torch.equal(again[key], first[key]) for key in first if not key.startswith(compvis.UNET))


@pytest.mark.parametrize("kind", MODELS)
def test_what_was_read_loads_into_our_denoiser(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "model.safetensors"
    save(path, compvis.write(parts_of(kind), schedule=SCHEDULE))
    denoiser, weights = make_denoiser(**MODELS[kind]), compvis.read(open_file(path)).denoiser()
    load(denoiser, weights, str(path))
    assert equal(denoiser.state_dict(), weights)


def test_half_loaded_weights_are_refused_by_name_and_change_nothing(tmp_path: Path) -> None:
    path, written = tmp_path / "model.ckpt", compvis.write(parts_of("text"))
    del written["model.diffusion_model.out.2.bias"]
    written["model.diffusion_model.out.2.weight"] = torch.zeros(4, 9, 3, 3)
    save(path, written)
    denoiser = make_denoiser(**MODELS["text"])
    before = {key: value.clone() for key, value in denoiser.state_dict().items()}
    words = r"unet\.out\.2\.bias is missing; unet\.out\.2\.weight is \(4, 9, 3, 3\), expected \(4, 16, 3, 3\)"
    with pytest.raises(ValueError, match=rf"model\.ckpt does not fit.*{words}"):
        load(denoiser, compvis.read(open_file(path)).denoiser(), str(path))
    assert equal(denoiser.state_dict(), before)


@pytest.mark.parametrize("name", AUTOENCODERS)
def test_an_autoencoder_in_a_file_of_its_own(tmp_path: Path, name: str) -> None:
    state, path = trained(make_autoencoder(AUTOENCODERS[name])).state_dict(), tmp_path / "model.ckpt"
    save(path, state | {"loss.logvar": torch.zeros(()), "loss.discriminator.main.0.weight": torch.ones(2)})
    found = compvis.read(open_file(path))
    assert equal(found.parts["autoencoder"], state) and len(found.dropped) == 2
    make_autoencoder(AUTOENCODERS[name]).load_state_dict(found.parts["autoencoder"], strict=True)


def test_stable_diffusion_2_comes_back_with_what_was_left_out(tmp_path: Path) -> None:
    """Its text encoder has a layer that is never run, a projection and a scale; they are passed through as `rest`."""
    config = clip("openclip_vit_h_14", layers=3)
    state = trained(make_text_encoder(config)).state_dict()
    original = {f"cond_stage_model.model.{key.removeprefix('towers.h.')}": value for key, value in state.items()}
    original |= {"cond_stage_model.model.text_projection": torch.ones(24, 24),
                 "cond_stage_model.model.logit_scale": torch.ones(())}  # fmt: skip
    path = tmp_path / "model.safetensors"
    save(path, original)
    file = open_file(path)
    found = compvis.read(file)
    assert {key for key in found.dropped if "resblocks.2." in key} and len(found.dropped) == 14
    shorter = make_text_encoder(clip("openclip_vit_h_14", layers=2))
    shorter.load_state_dict(found.parts["text_encoder"], strict=True)
    assert equal(compvis.write(found.parts, rest=file.state(found.dropped)), file.state())


# ---- averages ---------------------------------------------------------------------------------------------
def test_averages_are_asked_for_and_not_there(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save(path, compvis.write(parts_of("churches"), schedule=SCHEDULE))
    assert not compvis.read(open_file(path)).averaged
    with pytest.raises(ValueError, match="no averaged weights"):
        compvis.read(open_file(path), averaged=True)


def test_one_average_that_is_missing_is_named(tmp_path: Path) -> None:
    parts, path = parts_of("churches"), tmp_path / "model.safetensors"
    written = compvis.write(parts, averages=parts["unet"])
    del written["model_ema.diffusion_modelout2bias"]
    save(path, written)
    with pytest.raises(ValueError, match=r"no average of out\.2\.bias"):
        compvis.read(open_file(path))
    assert equal(compvis.read(open_file(path), averaged=False).parts["unet"], parts["unet"])


def test_names_without_dots() -> None:
    assert compvis.ema_name("model.diffusion_model.time_embed.0.weight") == "model_ema.diffusion_modeltime_embed0weight"
    with pytest.raises(ValueError, match="same name without dots"):
        compvis.layout(["model.diffusion_model.a.11.weight", "model.diffusion_model.a.1.1.weight"])


# ---- what does not fit ------------------------------------------------------------------------------------
def test_a_key_that_nobody_asked_for_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save(path, compvis.write(parts_of("churches")) | {"control_model.zero_convs.0.0.weight": torch.ones(1)})
    with pytest.raises(ValueError, match=r"control_model\.zero_convs\.0\.0\.weight"):
        compvis.read(open_file(path))


@pytest.mark.parametrize("gone", ["transformer.token_emb.weight", "transformer.attn_layers.layers.1.1.net.2.bias"])
def test_a_text_encoder_that_lacks_a_tensor_is_named(tmp_path: Path, gone: str) -> None:
    path = tmp_path / "model.safetensors"
    written = compvis.write(parts_of("text"))
    del written[f"cond_stage_model.{gone}"]
    save(path, written)
    with pytest.raises(ValueError, match=gone):
        compvis.read(open_file(path))


def test_a_duplicate_that_differs_is_refused(tmp_path: Path) -> None:
    path, written = tmp_path / "model.safetensors", compvis.write(parts_of("churches", "vq_f4_noattn"))
    twice = {key.replace("first_stage", "cond_stage"): value for key, value in written.items() if "first_stage" in key}
    save(path, written | twice)
    assert compvis.read(open_file(path)).parts.keys() == {"unet", "autoencoder"}
    save(path, written | twice | {"cond_stage_model.quant_conv.bias": twice["cond_stage_model.quant_conv.bias"] + 1})
    with pytest.raises(ValueError, match=r"cond_stage_model\.quant_conv\.bias"):
        compvis.read(open_file(path))


def test_misfits_are_named_with_both_shapes() -> None:
    found, expected = {"a": (1,), "b": (2,), "d": (3, 3)}, {"a": (1,), "c": (2,), "d": (3, 4)}
    assert misfits(found, expected) == ["b is unexpected", "c is missing", "d is (3, 3), expected (3, 4)"]
    with pytest.raises(ValueError, match="model.ckpt: b is unexpected"):
        require_fit(found, expected, "model.ckpt")
    require_fit(found, found, "model.ckpt")


# ---- schedules --------------------------------------------------------------------------------------------
def originals_schedules() -> list[str]:
    """Files of conf/diffusion whose schedule the original has."""
    configs = {path.stem: conf(DiffusionConfig, "diffusion", path.stem) for path in (CONF / "diffusion").glob("*.yaml")}
    return sorted(name for name, c in configs.items() if c.schedule != "flow" and not c.zero_terminal_snr)


@pytest.mark.parametrize("name", originals_schedules())
def test_every_configured_schedule_is_recognised_from_its_betas(name: str) -> None:
    config = conf(DiffusionConfig, "diffusion", name)
    schedule = make_schedule(config.schedule, config.timesteps, config.beta_start, config.beta_end, False)
    expected = (config.schedule, config.timesteps, config.beta_start, config.beta_end)
    for dtype in (torch.float64, torch.float32, torch.float16):
        assert compvis.recognise(schedule.beta.to(dtype)) == expected, dtype


@pytest.mark.parametrize("name, start, end", [("linear", 0.0001, 0.03), ("sqrt", 0.0001, 0.02), ("cosine", None, None)])
def test_other_schedules_too(name: str, start: float | None, end: float | None) -> None:
    schedule = make_schedule(name, 500, start, end, False)
    assert compvis.recognise(schedule.beta.float()) == (name, 500, start, end)


def test_betas_of_no_known_schedule_are_refused(tmp_path: Path) -> None:
    path, written = tmp_path / "model.safetensors", compvis.write(parts_of("churches"), schedule=SCHEDULE)
    save(path, written | {"betas": torch.rand(1000) * 0.01})
    with pytest.raises(ValueError, match="no schedule"):
        compvis.read(open_file(path))
    save(path, written | {"alphas_cumprod": written["alphas_cumprod"] * 1.01})
    with pytest.raises(ValueError, match="alphas_cumprod differs by up to 0.01"):
        compvis.read(open_file(path))


def test_tables_are_the_originals(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    from tests.ldm.interop.small import GOLDEN

    golden = load_file(GOLDEN / "schedules.safetensors")
    ours = compvis.buffers(make_schedule("sqrt_linear", 1000, 0.00085, 0.012, False))
    for name in compvis.BUFFERS:
        wanted = golden[f"output/float32/linear_0.00085_0.012/{name}"]
        torch.testing.assert_close(ours[name], wanted, rtol=3e-7, atol=0, msg=name)

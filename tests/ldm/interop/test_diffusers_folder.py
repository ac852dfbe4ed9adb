"""Folders that we write are pipelines of diffusers that draw the same pictures, and come back to the bit."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import diffusers

from ldm.config import DiffusionConfig, UNetConfig
from ldm.diffusion.guidance import guided
from ldm.diffusion.sampler import ddim
from ldm.diffusion.schedule import make_schedule
from ldm.interop import diffusers_folder as folders
from ldm.interop.diffusers_folder import Model, read_folder, write_folder
from ldm.models.autoencoder import make_autoencoder
from ldm.models.denoiser import make_denoiser
from ldm.models.tokenizer import make_tokenizer
from tests.ldm.interop.small import AUTOENCODERS, BERT, SEED, UNETS, clip, conf, trained

DIFFUSION = conf(DiffusionConfig, "diffusion", "txt2img_1p45b")
PROMPTS = ["a photograph of a cat", "two red birds"]


def vocabulary(folder: Path) -> Path:
    """A small one of word pieces."""
    words = ["[PAD]", *(f"[unused{i}]" for i in range(99)), "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words += ["a", "photograph", "of", "cat", "two", "red", "bird", "##s"]
    path = folder / "vocab.txt"
    path.write_text("\n".join(words) + "\n")
    return path


def model(kind: str, folder: Path, diffusion: DiffusionConfig = DIFFUSION) -> Model:
    clip_words = {"vocab_size": 49408}
    bert = replace(BERT, vocab_size=112, length=77, vocab_file=str(vocabulary(folder)))  # their pipeline pads to 77
    text = {
        "bert": bert,
        "sd1": replace(clip("clip_vit_l_14"), **clip_words),
        "sd2": replace(clip("openclip_vit_h_14"), **clip_words),
        "sdxl": replace(clip("sdxl", layers=3), **clip_words),
        "unconditional": None,
    }[kind]
    unet = {"sdxl": replace(UNETS["sdxl"], context_dim=48, vector_dim=16 + 6 * 256),
            "unconditional": UNETS["unconditional"]}.get(kind, UNETS["text"])  # fmt: skip
    autoencoder = AUTOENCODERS["vq_f4" if kind == "unconditional" else "kl_f8"]
    unet = replace(unet, out_channels=4)
    denoiser = trained(make_denoiser(unet, text))
    parts = {name: module.state_dict() for name, module in denoiser.named_children()}
    parts["autoencoder"] = trained(make_autoencoder(autoencoder)).state_dict()
    return Model(unet, autoencoder, 0.5, text, diffusion, 8, parts)


def equal(a: dict[str, dict[str, Tensor]], b: dict[str, dict[str, Tensor]]) -> bool:
    return a.keys() == b.keys() and all(
        a[part].keys() == b[part].keys() and all(torch.equal(a[part][key], b[part][key]) for key in a[part])
        for part in a
    )


KINDS = ["bert", "sd1", "sd2", "sdxl", "unconditional"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_comes_back_to_the_bit(kind: str, tmp_path: Path) -> None:
    ours, folder = model(kind, tmp_path), tmp_path / "model"
    write_folder(folder, ours)
    back = read_folder(folder)
    assert equal(back.parts, ours.parts)
    assert back.scale_factor == 0.5 and back.latent_size == 8 and back.autoencoder == ours.autoencoder
    assert asdict(back.diffusion) == asdict(ours.diffusion)
    assert replace(back.unet, attention_resolutions=[]) == replace(ours.unet, attention_resolutions=[])
    if ours.text_encoder is not None:
        told = {"vocab_sha256": ours.text_encoder.vocab_sha256, "vocab_file": ours.text_encoder.vocab_file}
        assert replace(back.text_encoder, **told) == ours.text_encoder


@pytest.mark.parametrize("kind, expected", [
    ("bert", {"bert": 2, "tokenizer": 2, "unet": 2, "vqvae": 2, "scheduler": 1}),
    ("sd1", {"text_encoder": 2, "tokenizer": 3, "unet": 2, "vae": 2, "scheduler": 1}),
    ("sdxl", {"text_encoder": 2, "tokenizer": 3, "text_encoder_2": 2, "tokenizer_2": 3, "unet": 2, "vae": 2,
              "scheduler": 1}),
    ("unconditional", {"unet": 2, "vqvae": 2, "scheduler": 1}),
])  # fmt: skip
def test_the_files_of_a_folder(kind: str, expected: dict[str, int], tmp_path: Path) -> None:
    write_folder(tmp_path / "model", model(kind, tmp_path))
    found = {path.name: len(list(path.iterdir())) for path in (tmp_path / "model").iterdir() if path.is_dir()}
    assert found == expected
    assert [path.name for path in (tmp_path / "model").iterdir() if path.is_file()] == ["model_index.json"]


# ---- the same pictures ------------------------------------------------------------------------------------
def start(count: int) -> Tensor:
    return torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(SEED))


def ours_latents(ours: Model, z_T: Tensor, steps: int, scale: float, spacing: str) -> Tensor:
    """Our way from the same folder's model."""
    denoiser = make_denoiser(ours.unet, ours.text_encoder).eval()
    denoiser.load_state_dict({f"{part}.{key}": value for part in ("unet", "text_encoder")
                              for key, value in ours.parts.get(part, {}).items()})  # fmt: skip
    condition, null = {}, {}
    if ours.text_encoder is not None:
        told = conf(type(ours.text_encoder), "text_encoder", "sdxl").vocab_sha256
        tokenizer = (make_tokenizer(replace(ours.text_encoder, vocab_sha256=told)) if ours.text_encoder.kind == "clip"
                     else word_pieces(ours))  # fmt: skip
        encoded = denoiser.encode_condition({"tokens": tokenizer([*PROMPTS, "", ""])})["context"]
        condition, null = {"context": encoded[:2]}, {"context": encoded[2:]}
    schedule = make_schedule("sqrt_linear", 1000, 0.00085, 0.012, ours.diffusion.zero_terminal_snr)
    predict = guided(denoiser, condition, null, scale)
    return ddim(predict, z_T, schedule, steps, ours.diffusion.prediction, spacing=spacing)


def word_pieces(ours: Model) -> Callable[[list[str]], Tensor]:
    import hashlib

    digest = hashlib.sha256(Path(ours.text_encoder.vocab_file).read_bytes()).hexdigest()
    return make_tokenizer(replace(ours.text_encoder, vocab_sha256=digest))


def their_pipeline(folder: Path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kind = json.loads((folder / "model_index.json").read_text())["_class_name"]
        pipeline = getattr(diffusers, kind).from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("kind", ["bert", "sd1", "sd2"])
@torch.no_grad()
def test_their_pipeline_draws_our_pictures(kind: str, tmp_path: Path) -> None:
    ours, folder = model(kind, tmp_path), tmp_path / "model"
    write_folder(folder, ours)
    pipeline = their_pipeline(folder)
    latents = ours_latents(ours, start(2), 5, 3.0, "leading")
    decoder = make_autoencoder(ours.autoencoder).eval()
    decoder.load_state_dict(ours.parts["autoencoder"])
    expected = (decoder.decode(latents / 0.5) / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    size = {"height": 64, "width": 64, "num_inference_steps": 5, "guidance_scale": 3.0, "output_type": "np"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pictures = pipeline(PROMPTS, latents=start(2), **size).images
    assert expected.std() > 0.05
    assert abs(pictures - expected).max() < 1e-4


@torch.no_grad()
def test_their_pipeline_of_two_towers_draws_our_latents(tmp_path: Path) -> None:
    ours, folder = model("sdxl", tmp_path), tmp_path / "model"
    write_folder(folder, ours)
    pipeline = their_pipeline(folder)
    denoiser = make_denoiser(ours.unet, ours.text_encoder).eval()
    denoiser.load_state_dict({f"{part}.{key}": value for part in ("unet", "text_encoder")
                              for key, value in ours.parts[part].items()})  # fmt: skip
    from ldm.models.conditioning import embed_numbers

    sizes = torch.tensor([[64, 64, 0, 0, 64, 64]]).expand(2, 6)
    context, pooled = denoiser.text_encoder.encode(make_tokenizer(ours.text_encoder)(PROMPTS))
    condition = {"context": context, "vector": torch.cat([pooled, embed_numbers(sizes)], 1)}
    zeros = {"context": torch.zeros_like(context),  # their pipeline's empty caption
             "vector": torch.cat([torch.zeros_like(pooled), embed_numbers(sizes)], 1)}  # fmt: skip
    schedule = make_schedule("sqrt_linear", 1000, 0.00085, 0.012, False)
    expected = ddim(guided(denoiser, condition, zeros, 3.0), start(2), schedule, 4, "eps", spacing="leading")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = pipeline(PROMPTS, latents=start(2), height=64, width=64, num_inference_steps=4, guidance_scale=3.0,
                         output_type="latent").images  # fmt: skip
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@torch.no_grad()
def test_v_prediction_with_zero_terminal_snr_on_their_scheduler(tmp_path: Path) -> None:
    ours, folder = model("sd1", tmp_path, conf(DiffusionConfig, "diffusion", "v_zero_snr")), tmp_path / "model"
    write_folder(folder, ours)
    pipeline = their_pipeline(folder)
    assert read_folder(folder).diffusion == ours.diffusion
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = pipeline(PROMPTS, latents=start(2), height=64, width=64, num_inference_steps=5, guidance_scale=3.0,
                         output_type="latent").images  # fmt: skip
    torch.testing.assert_close(found, ours_latents(ours, start(2), 5, 3.0, "trailing"), rtol=0, atol=2e-4)


# ---- what does not fit ------------------------------------------------------------------------------------
def test_a_tensor_too_many_or_too_few_is_named(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "model"
    write_folder(folder, model("sd1", tmp_path))
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    save_file(state | {"adapter.weight": torch.ones(1)}, path)
    with pytest.raises(ValueError, match="adapter.weight is unexpected"):
        read_folder(folder)
    save_file({key: value for key, value in state.items() if key != "conv_in.bias"}, path)
    with pytest.raises(ValueError, match="conv_in.bias is missing"):
        read_folder(folder)
    save_file(state | {"conv_in.bias": torch.ones(3)}, path)
    with pytest.raises(ValueError, match=r"input_blocks\.0\.0\.bias is \(3,\), expected \(16,\)"):
        read_folder(folder)


def test_a_text_encoder_that_lacks_a_tensor_is_named(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "model"
    write_folder(folder, model("sd1", tmp_path))
    path = folder / "text_encoder" / "model.safetensors"
    state = load_file(path)
    shorter = {key.removeprefix("text_model."): value for key, value in state.items()}  # as transformers 5 has it
    save_file(shorter, path)
    read_folder(folder)
    del shorter["final_layer_norm.bias"]
    save_file(shorter, path)
    with pytest.raises(ValueError, match="final_layer_norm.bias is missing"):
        read_folder(folder)


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="model_index.json"):
        read_folder(tmp_path)
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(ValueError, match="no JSON"):
        read_folder(tmp_path)
    (tmp_path / "model_index.json").write_text("[]")
    with pytest.raises(ValueError, match="list"):
        read_folder(tmp_path)


def test_what_diffusers_cannot_express_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    good = model("sd1", tmp_path)
    flow = conf(DiffusionConfig, "diffusion", "flow")
    wrong = {
        "class_embedder": replace(good, parts=good.parts | {"class_embedder": {}}),
        "resblock_updown": replace(good, unet=replace(good.unet, resblock_updown=True)),
        "1000 s - 1": replace(good, diffusion=flow),
        "schedule is sqrt": replace(good, diffusion=replace(DIFFUSION, schedule="sqrt")),
        "tiny": replace(good, autoencoder=replace(good.autoencoder, kind="tiny")),
        "word pieces": replace(good, text_encoder=replace(BERT, tokenizer="bytes"), parts=good.parts | {
            "text_encoder": model("bert", tmp_path).parts["text_encoder"]}),
        "leaves out 1 layers": replace(good, text_encoder=replace(good.text_encoder, towers={
            "l": replace(good.text_encoder.towers["l"], skip_layers=1)})),
    }  # fmt: skip
    for words, bad in wrong.items():
        with pytest.raises(ValueError, match=words):
            write_folder(tmp_path / "model", bad)
        assert not (tmp_path / "model").exists(), words


def test_older_files_are_found_and_older_names_read(tmp_path: Path) -> None:
    folder, ours = tmp_path / "model", model("sd1", tmp_path)
    write_folder(folder, ours)
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    from safetensors.torch import load_file

    old = {"to_q.": "query.", "to_k.": "key.", "to_v.": "value.", "to_out.0.": "proj_attn."}
    state = {}
    for key, value in load_file(path).items():
        for new, name in old.items():
            key = key.replace(new, name)
        state[key] = value
    path.unlink()
    torch.save(state, folder / "vae" / "diffusion_pytorch_model.bin")
    assert any(".query." in key for key in state)
    assert equal(read_folder(folder).parts, ours.parts)
    (folder / "vae" / "diffusion_pytorch_model.bin").unlink()
    with pytest.raises(FileNotFoundError, match="diffusion_pytorch_model.bin"):
        read_folder(folder)


@pytest.mark.parametrize("settings, word", [
    ({"beta_schedule": "exponential"}, "exponential"), ({"prediction_type": "flow_prediction"}, "flow_prediction"),
    ({"trained_betas": [0.1]}, "beta_schedule"),
])  # fmt: skip
def test_a_scheduler_that_is_not_ours_is_refused(settings: dict, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        folders.scheduler_from_diffusers(settings)


def test_published_schedulers() -> None:
    pndm = {"_class_name": "PNDMScheduler", "beta_end": 0.012, "beta_schedule": "scaled_linear", "beta_start": 0.00085,
            "num_train_timesteps": 1000, "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1,
            "trained_betas": None, "clip_sample": False}  # fmt: skip
    assert folders.scheduler_from_diffusers(pndm) == DIFFUSION
    v = {"prediction_type": "v_prediction", **pndm}
    assert folders.scheduler_from_diffusers(v) == conf(DiffusionConfig, "diffusion", "sd21_768_v")
    assert isinstance(conf(UNetConfig, "unet", "sd15"), UNetConfig)

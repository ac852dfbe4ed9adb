"""Whole folders of diffusers: unet/, vae/ or vqvae/, text encoders, tokenizers, scheduler/, model_index.json.

    pipeline                  text encoder                    folders
    LDMTextToImagePipeline    transformer                     bert tokenizer unet vqvae scheduler
    StableDiffusionPipeline   one CLIP tower                  text_encoder tokenizer unet vae scheduler
    StableDiffusionXLPipeline CLIP towers l and g             and text_encoder_2 tokenizer_2
    LDMPipeline               none                            unet vqvae scheduler

A folder is written with the index last, and read strictly: a tensor too many or too few is an error that names it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.config import AutoencoderConfig, DiffusionConfig, TextEncoderConfig, UNetConfig
from ldm.interop import diffusers_text as text
from ldm.interop.checkpoint_file import WeightFile, open_file, save
from ldm.interop.diffusers import (
    autoencoder_entries,
    autoencoder_from_diffusers,
    autoencoder_to_diffusers,
    current_name,
    unet_entries,
    unet_from_diffusers,
    unet_to_diffusers,
)
from ldm.interop.entry import Entry, require_fit, shapes, some, to_own, to_theirs
from ldm.models.autoencoder import make_autoencoder
from ldm.models.text_encoder import make_text_encoder
from ldm.models.unet import UNet

WEIGHTS = "diffusion_pytorch_model"
BETAS = {"sqrt_linear": "scaled_linear", "linear": "linear", "cosine": "squaredcos_cap_v2"}
PREDICTIONS = {"eps": "epsilon", "v": "v_prediction", "z0": "sample"}


@dataclass(frozen=True)
class Model:
    """A trained model: its settings, and its weights under our names."""

    unet: UNetConfig
    autoencoder: AutoencoderConfig
    scale_factor: float
    text_encoder: TextEncoderConfig | None
    diffusion: DiffusionConfig
    latent_size: int  # side of the latents that it was trained on
    parts: dict[str, dict[str, Tensor]] = field(repr=False)  # unet, autoencoder, text_encoder

    @property
    def pipeline(self) -> str:
        """The class that diffusers has for it."""
        if self.text_encoder is None:
            return "LDMPipeline"
        if self.text_encoder.kind == "transformer":
            return "LDMTextToImagePipeline"
        return "StableDiffusionXLPipeline" if len(self.text_encoder.towers) > 1 else "StableDiffusionPipeline"


# ---- writing ----------------------------------------------------------------------------------------------
def write_folder(folder: str | Path, model: Model) -> None:
    """Writes a model as diffusers has it; what cannot be expressed raises ValueError before anything is written."""
    folder = Path(folder)
    extra = sorted(model.parts.keys() - {"unet", "autoencoder", "text_encoder"})
    if extra:
        raise ValueError(f"diffusers has no class for {', '.join(extra)}")
    image_size = model.latent_size * model.autoencoder.factor
    unet = unet_to_diffusers(model.unet, model.latent_size)
    autoencoder = autoencoder_to_diffusers(model.autoencoder, model.scale_factor, image_size)
    scheduler = scheduler_to_diffusers(model.diffusion)
    latents = "vae" if model.pipeline.startswith("Stable") else "vqvae"
    index = {
        "_class_name": model.pipeline,
        "unet": ["diffusers", unet["_class_name"]],
        latents: ["diffusers", autoencoder["_class_name"]],
        "scheduler": ["diffusers", scheduler["_class_name"]],
    }
    texts = {} if model.text_encoder is None else text.to_diffusers(model.text_encoder, model.parts["text_encoder"])
    write_component(folder / "unet", unet, to_theirs(unet_entries(model.unet), model.parts["unet"]), WEIGHTS)
    entries = autoencoder_entries(model.autoencoder)
    write_component(folder / latents, autoencoder, to_theirs(entries, model.parts["autoencoder"]), WEIGHTS)
    _write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    for name, component in texts.items():
        index[name] = component.classes
        component.write(folder / name)
    if model.pipeline == "StableDiffusionPipeline":
        index |= {"safety_checker": [None, None], "feature_extractor": [None, None], "requires_safety_checker": False}
    _write_json(folder / "model_index.json", index)


def write_component(folder: Path, settings: Mapping[str, Any], state: Mapping[str, Tensor], name: str) -> None:
    """One network: config.json and its weights."""
    folder.mkdir(parents=True, exist_ok=True)
    save(folder / f"{name}.safetensors", state)
    _write_json(folder / "config.json", settings)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def scheduler_to_diffusers(config: DiffusionConfig) -> dict[str, Any]:
    """scheduler_config.json: DDIM as the original has it, or on trailing timesteps with zero terminal SNR."""
    if config.schedule == "flow":
        raise ValueError(
            "diffusion.schedule is flow; diffusers tells a network the time 1000 s, ours are trained with 1000 s - 1"
        )
    if config.schedule not in BETAS:
        raise ValueError(f"diffusion.schedule is {config.schedule}; diffusers has {', '.join(BETAS)}")
    zero = config.zero_terminal_snr
    betas = {} if config.beta_start is None else {"beta_start": config.beta_start, "beta_end": config.beta_end}
    return {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": config.timesteps,
        "beta_schedule": BETAS[config.schedule],
        **betas,
        "prediction_type": PREDICTIONS[config.prediction],
        "clip_sample": False,
        "rescale_betas_zero_snr": zero,
        "timestep_spacing": "trailing" if zero else "leading",
        "set_alpha_to_one": zero,
        "steps_offset": 0 if zero else 1,
    }


# ---- reading ----------------------------------------------------------------------------------------------
def read_folder(folder: str | Path, *, numbers: bool = True) -> Model:
    """A folder of diffusers as a model of ours; without `numbers` its tensors have shapes only."""
    folder = Path(folder)
    index = read_json(folder / "model_index.json")
    latents = "vae" if "vae" in index else "vqvae"
    unet, unet_state = read_unet(folder / "unet", numbers=numbers)
    autoencoder, scale_factor, latent_state = read_autoencoder(folder / latents, numbers=numbers)
    parts = {"unet": unet_state, "autoencoder": latent_state}
    names = [name for name in ("bert", "text_encoder", "text_encoder_2") if index.get(name, [None])[0] is not None]
    text_encoder = None
    if names:
        text_encoder, parts["text_encoder"] = read_text([folder / name for name in names], numbers=numbers)
    settings = read_json(folder / "unet" / "config.json")
    diffusion = scheduler_from_diffusers(read_json(folder / "scheduler" / "scheduler_config.json"))
    size = settings.get("sample_size") or 64
    return Model(unet, autoencoder, scale_factor, text_encoder, diffusion, size, parts)


def read_text(folders: list[Path], *, numbers: bool = True) -> tuple[TextEncoderConfig, dict[str, Tensor]]:
    """Folders bert/, or text_encoder/ and perhaps text_encoder_2/: one configuration and the weights."""
    found = [(read_json(folder / "config.json"), open_component(folder, numbers)) for folder in folders]
    config, state = text.from_diffusers(found, folders[0])
    with torch.device("meta"):
        expected = make_text_encoder(config).state_dict()
    require_fit(shapes(state), shapes(expected), str(folders[0]))
    return config, state


def read_unet(folder: Path, *, numbers: bool = True) -> tuple[UNetConfig, dict[str, Tensor]]:
    """A folder unet/: its configuration and weights."""
    config = unet_from_diffusers(read_json(folder / "config.json"))
    with torch.device("meta"):
        expected = UNet(config).state_dict()
    return config, _read(folder, unet_entries(config), expected, numbers)


def read_autoencoder(folder: Path, *, numbers: bool = True) -> tuple[AutoencoderConfig, float, dict[str, Tensor]]:
    """A folder vae/ or vqvae/: its configuration, scale factor and weights."""
    config, scale_factor = autoencoder_from_diffusers(read_json(folder / "config.json"))
    with torch.device("meta"):
        expected = make_autoencoder(config).state_dict()
    return config, scale_factor, _read(folder, autoencoder_entries(config), expected, numbers)


def _read(folder: Path, entries: list[Entry], expected: Mapping[str, Tensor], numbers: bool) -> dict[str, Tensor]:
    file = open_component(folder, numbers)
    keys = {current_name(key): key for key in file.tensors}
    state = _to_own(entries, keys, file)
    require_fit(shapes(state), shapes(expected), str(file.path))
    return state


def _to_own(entries: list[Entry], keys: Mapping[str, str], file: WeightFile) -> dict[str, Tensor]:
    """Tensors by their names of today; one too many or too few is an error."""
    wanted = {key for entry in entries for key in entry.theirs}
    problems = [f"{key} is missing" for key in sorted(wanted - keys.keys())]
    problems += [f"{keys[key]} is unexpected" for key in sorted(keys.keys() - wanted)]
    if problems:
        raise ValueError(f"{file.path} does not fit its config.json: {some(problems)}")
    return to_own(entries, lambda key: file.read(keys[key]))


def open_component(folder: Path, numbers: bool = True) -> WeightFile:
    """The weights of one network, in whichever of the usual files they are."""
    names = [f"{stem}{kind}" for stem in (WEIGHTS, "model")
             for kind in (".safetensors", ".safetensors.index.json", ".fp16.safetensors")]  # fmt: skip
    names += [f"{WEIGHTS}.bin", "pytorch_model.bin"]
    for name in names:
        if (folder / name).is_file():
            file = open_file(folder / name)
            return file if numbers else file.on_meta()
    raise FileNotFoundError(f"{folder} has none of {', '.join(names)}")


class Settings(dict[str, Any]):
    """A JSON object that names its file when something is asked for that it lacks."""

    def __init__(self, path: Path, value: Mapping[str, Any]) -> None:
        super().__init__(value)
        self.path = path

    def __missing__(self, key: str) -> Any:
        raise ValueError(f"{self.path} has no {key!r}; it has {', '.join(self) or 'nothing'}")


def read_json(path: Path) -> Settings:
    """A JSON object of a folder."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}, which a folder of diffusers has")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, not an object")
    return Settings(path, value)


def scheduler_from_diffusers(settings: Mapping[str, Any]) -> DiffusionConfig:
    """scheduler_config.json of any scheduler over betas; what it does not say of training is as in the paper."""
    names = {theirs: ours for ours, theirs in BETAS.items()}
    predictions = {theirs: ours for ours, theirs in PREDICTIONS.items()}
    betas, prediction = settings.get("beta_schedule", "linear"), settings.get("prediction_type", "epsilon")
    if betas not in names or prediction not in predictions or settings.get("trained_betas") is not None:
        raise ValueError(f"scheduler_config.json has beta_schedule {betas!r}, prediction_type {prediction!r}; "
                         f"known are {', '.join(names)}, and {', '.join(predictions)}")  # fmt: skip
    cosine = names[betas] == "cosine"
    return DiffusionConfig(
        timesteps=settings.get("num_train_timesteps", 1000),
        schedule=names[betas],
        beta_start=None if cosine else settings.get("beta_start", 0.0001),
        beta_end=None if cosine else settings.get("beta_end", 0.02),
        zero_terminal_snr=settings.get("rescale_betas_zero_snr", False),
        prediction=predictions[prediction],
        loss="l2",
        min_snr_gamma=None,
        offset_noise=0.0,
    )

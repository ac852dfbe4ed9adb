"""The layout of the original project, of Stable Diffusion's repositories and of SDXL's: which key is what.

    model.diffusion_model.*            the U-Net, under our names
    model_ema.*                        its average, names without dots
    first_stage_model.*                the autoencoder, under our names; in files of its own without a prefix
    cond_stage_model.*, conditioner.*  text encoder, class embedder, spatial rescaler
    betas, alphas_cumprod, ...         the noise schedule
    loss.*                             what the autoencoder was trained with

Every key is a part of ours, or dropped for a reason that is given, or a duplicate of another, or an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ldm.diffusion.schedule import Schedule, make_schedule
from ldm.diffusion.variational import (
    posterior_log_variance,
    posterior_mean_weights,
    posterior_variance,
    previous_alpha_bar,
)
from ldm.interop.checkpoint_file import WeightFile
from ldm.interop.entry import Entry, some, to_own, to_theirs
from ldm.interop.text import bert_entries, bert_layers, clip_entries, count, towers

UNET, EMA, FIRST, COND = "model.diffusion_model.", "model_ema.", "first_stage_model.", "cond_stage_model."
AUTOENCODER = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.", "quantize.")
BERT, CLIP, OPEN_CLIP = f"{COND}transformer.", f"{COND}transformer.", f"{COND}model."
SDXL = "conditioner.embedders."
BUFFERS = (
    "betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "posterior_variance",
    "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2",
)  # fmt: skip
# First and last beta of the released models.
RELEASED = ((0.00085, 0.012), (0.0015, 0.0195), (0.0015, 0.0155), (0.0015, 0.0205), (0.0015, 0.015), (0.0001, 0.02))
# Pattern of a key -> why it is not needed.
DROPPED = {
    "(" + "|".join(BUFFERS) + r")$": "schedule: follows from its settings, and is compared with them",
    r"scale_factor$": "schedule: the scale of latents, returned as a number",
    r"logvar$|lvlb_weights$": "weights of the training loss",
    r"model_ema\.(decay|num_updates)$": "state of the average, not a weight",
    r"loss\.": "what the autoencoder was trained with",
    r".*\.position_ids$": "0, 1, 2, ...",
    r".*\.logit_scale$": "used by CLIP's own training only",
    r"cond_stage_model\.transformer\.to_logits\.": "a layer that is never run, and has no gradient",
    r"cond_stage_model\.model\.text_projection$": "Stable Diffusion 2 does not read the pooled output",
    r"denoiser\.sigmas$": "schedule: follows from its settings",
}


@dataclass(frozen=True)
class Layout:
    """What every key of a file is."""

    parts: dict[str, list[Entry]]  # unet, unet_ema, autoencoder, autoencoder_ema, text_encoder, class_embedder, ...
    dropped: dict[str, str]  # key -> why
    duplicates: dict[str, str]  # key -> the key that it repeats
    unknown: list[str]
    missing: list[str]  # keys that a text encoder of so many layers should have

    def keys(self) -> set[str]:
        """Keys that parts are made of."""
        return {key for entries in self.parts.values() for entry in entries for key in entry.theirs}


@dataclass(frozen=True)
class Weights:
    """A file's weights under our names, part by part."""

    parts: dict[str, dict[str, Tensor]]
    averaged: bool  # the parts are the averages
    schedule: Schedule | None
    scale_factor: float | None
    dropped: dict[str, str] = field(repr=False)

    def denoiser(self) -> dict[str, Tensor]:
        """The state dict of ldm.models.denoiser.Denoiser."""
        names = ("unet", "text_encoder", "class_embedder", "spatial_rescaler")
        return {f"{part}.{key}": value for part in names for key, value in self.parts.get(part, {}).items()}


# ---- which key is what ------------------------------------------------------------------------------------
def layout(keys: Iterable[str]) -> Layout:
    """Sorts the keys of a file."""
    keys = list(keys)
    present, taken, missing = set(keys), set(), set()
    parts: dict[str, list[Entry]] = {}
    for part, entries in _candidates(keys):
        if part == "text_encoder":
            missing = {key for entry in entries for key in entry.theirs} - present
        here = [entry for entry in entries if present.issuperset(entry.theirs)]
        if here:
            parts[part] = here
            taken.update(key for entry in here for key in entry.theirs)
    duplicates = {key: FIRST + key.removeprefix(COND) for key in keys if FIRST + key.removeprefix(COND) in taken
                  and key.startswith(COND)}  # fmt: skip
    rest = [key for key in keys if key not in taken and key not in duplicates]
    dropped = {key: reason for key in rest if (reason := _reason(key, parts, keys)) is not None}
    return Layout(parts, dropped, duplicates, [key for key in rest if key not in dropped], sorted(missing))


def _candidates(keys: list[str]) -> Iterable[tuple[str, list[Entry]]]:
    """Parts and all entries that they would have."""
    for part, prefix in (("unet", UNET), ("autoencoder", FIRST), ("spatial_rescaler", COND), ("class_embedder", COND)):
        yield part, [Entry(key.removeprefix(prefix), (key,)) for key in keys if key.startswith(prefix)
                     and _belongs(part, key.removeprefix(prefix))]  # fmt: skip
    if not any(key.startswith((UNET, FIRST)) for key in keys):
        yield "autoencoder", [Entry(key, (key,)) for key in keys if key.startswith(AUTOENCODER)]
    yield "unet_ema", _averages([key for key in keys if key.startswith(UNET)], UNET)
    yield "autoencoder_ema", _averages([key for key in keys if key.startswith(AUTOENCODER)], "")
    yield from ((("text_encoder", entries),) if (entries := text_entries(keys)) else ())


def _belongs(part: str, key: str) -> bool:
    if part == "class_embedder":
        return key == "embedding.weight"
    return part != "spatial_rescaler" or key.startswith("channel_mapper.")


def ema_name(key: str) -> str:
    """The original's name of an average: no dots, and without "model." (LitEma)."""
    return EMA + key.removeprefix("model.").replace(".", "")


def _averages(keys: list[str], prefix: str) -> list[Entry]:
    """Averages by the weights that they are averages of; two weights of one dotless name would be an error."""
    names: dict[str, str] = {}
    for key in keys:
        other = names.setdefault(ema_name(key), key)
        if other != key:
            raise ValueError(f"{key} and {other} have the same name without dots: which average is whose is not known")
    return [Entry(key.removeprefix(prefix), (name,)) for name, key in names.items()]


def text_entries(keys: list[str]) -> list[Entry]:
    """The text encoder's entries, of whichever kind the keys are; none where there is none."""
    layers = count(keys, re.escape(BERT) + r"attn_layers\.layers\.(\d+)\.") // 2
    if layers:
        return bert_entries(layers, "original", BERT)
    layers = count(keys, re.escape(CLIP) + r"text_model\.encoder\.layers\.(\d+)\.")
    if layers:
        return clip_entries(layers, "l", "transformers", CLIP, projection=False)
    layers = count(keys, re.escape(OPEN_CLIP) + r"transformer\.resblocks\.(\d+)\.")
    if layers:  # the last layer is never run
        return clip_entries(layers - 1, "h", "open_clip", OPEN_CLIP, projection=False)
    return _sdxl_entries(keys)


def _sdxl_entries(keys: list[str]) -> list[Entry]:
    """Both towers of the base model, or the one of the refiner."""
    entries = []
    for i in range(2):
        start = f"{SDXL}{i}."
        layers = count(keys, re.escape(start) + r"transformer\.text_model\.encoder\.layers\.(\d+)\.")
        if layers:
            entries += clip_entries(layers, "l", "transformers", f"{start}transformer.", projection=False)
        layers = count(keys, re.escape(start) + r"model\.transformer\.resblocks\.(\d+)\.")
        if layers:
            entries += clip_entries(layers, "g", "open_clip", f"{start}model.", projection=True)
    return entries


def _reason(key: str, parts: Mapping[str, list[Entry]], keys: list[str]) -> str | None:
    """Why a key is not needed; None where nothing is known of it."""
    for pattern, reason in DROPPED.items():
        if re.match(pattern, key):
            return reason
    layers = count(keys, re.escape(OPEN_CLIP) + r"transformer\.resblocks\.(\d+)\.")
    if layers and key.startswith(f"{OPEN_CLIP}transformer.resblocks.{layers - 1}."):
        return "the last layer, which Stable Diffusion 2 never runs"
    return None


# ---- reading ----------------------------------------------------------------------------------------------
def read(file: WeightFile, *, averaged: bool | None = None) -> Weights:
    """A file's weights under our names. `averaged`: the averages (None: if the file has them) or the newest weights."""
    found = layout(file.tensors)
    for problem, which in (("it has tensors of which nothing is known", found.unknown), ("it lacks", found.missing)):
        if which:
            raise ValueError(f"{file.path} is not read: {problem}: {some(which)}")
    for key, other in found.duplicates.items():
        if not torch.equal(file.read(key), file.read(other)):
            raise ValueError(f"{file.path}: {key} should repeat {other} and does not")
    has = any(part.endswith("_ema") for part in found.parts)
    if averaged and not has:
        raise ValueError(f"{file.path} has no averaged weights (model_ema.*); it has {', '.join(found.parts)}")
    averaged = has if averaged is None else averaged
    parts = {}
    for part in found.parts:
        if part.endswith("_ema"):
            continue
        entries = found.parts[part]
        if averaged and f"{part}_ema" in found.parts:
            entries = _complete(entries, found.parts[f"{part}_ema"], file)
        parts[part] = to_own(entries, file.read)
    scale = float(file.read("scale_factor")) if "scale_factor" in file.tensors else None
    return Weights(parts, averaged, read_schedule(file), scale, found.dropped)


def _complete(newest: list[Entry], averages: list[Entry], file: WeightFile) -> list[Entry]:
    """The averages; one that is missing is an error that names it."""
    missing = sorted({entry.own for entry in newest} - {entry.own for entry in averages})
    if missing:
        raise ValueError(f"{file.path} has no average of {some(missing)}; averaged=False reads the newest weights")
    return averages


def read_schedule(file: WeightFile) -> Schedule | None:
    """The noise schedule of a file, all its tables compared with those that its betas make; None where it has none."""
    if "betas" not in file.tensors:
        return None
    settings = recognise(file.read("betas"))
    if settings is None:
        raise ValueError(f"{file.path}: its betas are those of no schedule that is known here")
    schedule = make_schedule(*settings, False)
    for name, table in buffers(schedule).items():
        if name in file.tensors:
            value = file.read(name)
            close = max(1e-4, 4 * torch.finfo(value.dtype).eps)
            if not torch.allclose(value.float(), table, rtol=close, atol=close / 1e3):
                worst = float((value.float() - table).abs().max())
                raise ValueError(f"{file.path}: {name} differs by up to {worst:.2g} from what its betas make")
    return schedule


def recognise(betas: Tensor) -> tuple[str, int, float | None, float | None] | None:
    """Name, timesteps, first and last beta of the schedule whose betas these are, to the accuracy of their type.

    Half precision does not tell betas to the digit: there only those of the released models are known.
    """
    eps = torch.finfo(betas.dtype).eps
    pairs = list(RELEASED) if eps > 1e-4 else [(float(f"{float(betas[0]):.6g}"), float(f"{float(betas[-1]):.6g}"))]
    choices = [(name, *pair) for pair in pairs for name in ("sqrt_linear", "linear") if 0 < pair[0] <= pair[1] < 1]
    if eps < 1e-4:
        choices += [("sqrt", *(float(f"{float(beta) ** 2:.6g}") for beta in (betas[0], betas[-1])))]
    for name, start, end in [*choices, ("cosine", None, None)]:
        if name != "cosine" and not 0 < start <= end < 1:
            continue
        schedule = make_schedule(name, len(betas), start, end, False)
        if torch.allclose(betas.double(), schedule.beta, rtol=max(1e-5, 2 * eps), atol=1e-9):
            return name, len(betas), start, end
    return None


def buffers(schedule: Schedule) -> dict[str, Tensor]:
    """The twelve tables that the original keeps of a schedule, float32."""
    of_z0, of_z_t = posterior_mean_weights(schedule)
    tables = (
        schedule.beta, schedule.alpha_bar, previous_alpha_bar(schedule), schedule.signal, schedule.noise,
        schedule.noise.square().log(), 1 / schedule.signal, schedule.sigma, posterior_variance(schedule),
        posterior_log_variance(schedule), of_z0, of_z_t,
    )  # fmt: skip
    return {name: table.float() for name, table in zip(BUFFERS, tables, strict=True)}


# ---- writing ----------------------------------------------------------------------------------------------
def write(
    parts: Mapping[str, Mapping[str, Tensor]],
    *,
    schedule: Schedule | None = None,
    scale_factor: float | None = None,
    averages: Mapping[str, Tensor] | None = None,
    decay: float = 0.9999,
    updates: int = 0,
    rest: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Parts under our names as the original's state dict.

    `averages` are those of the U-Net, if they go along, with their decay and the number of their updates. What reading
    dropped comes back from `rest`: a layer of Stable Diffusion 2's text encoder that is not there is an error, the
    never-run to_logits becomes zeros.
    """
    rest = dict(rest or {})
    state = {} if schedule is None else buffers(schedule)
    if scale_factor is not None:
        state["scale_factor"] = torch.tensor(scale_factor)
    for part, prefix in (("unet", UNET), ("autoencoder", FIRST), ("class_embedder", COND), ("spatial_rescaler", COND)):
        state |= {prefix + key: value for key, value in parts.get(part, {}).items()}
    if averages is not None:
        state |= {ema_name(UNET + key): value for key, value in averages.items()}
        state[f"{EMA}decay"] = torch.tensor(decay)
        state[f"{EMA}num_updates"] = torch.tensor(updates, dtype=torch.int32)
    if "text_encoder" in parts:
        state |= _write_text(parts["text_encoder"], rest)
    return state | rest


def write_autoencoder(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An autoencoder in a file of its own: our names are the original's."""
    return dict(state)


def _write_text(state: Mapping[str, Tensor], rest: Mapping[str, Tensor]) -> dict[str, Tensor]:
    layers = bert_layers(state)
    if layers:
        written = to_theirs(bert_entries(layers, "original", BERT), state)
        tokens, width = state["token_embedding.weight"].shape
        like = state["token_embedding.weight"]
        logits = {f"{BERT}to_logits.weight": (tokens, width), f"{BERT}to_logits.bias": (tokens,)}
        return written | {key: like.new_zeros(shape) for key, shape in logits.items()}
    found = towers(state)
    if set(found) == {"l"}:
        return to_theirs(clip_entries(found["l"], "l", "transformers", CLIP, projection=False), state)
    if set(found) == {"h"}:
        last = f"{OPEN_CLIP}transformer.resblocks.{found['h']}."
        if not any(key.startswith(last) for key in rest):
            raise ValueError(
                f"the original's text encoder has one more layer, {last}*, which is never run but must be there: "
                "pass it in `rest`, as it was read"
            )
        return to_theirs(clip_entries(found["h"], "h", "open_clip", OPEN_CLIP, projection=False), state)
    if "g" in found and set(found) <= {"l", "g"}:
        return _write_sdxl(found, state)
    raise ValueError(f"the original has no layout for a text encoder with the towers {', '.join(found) or 'none'}")


def _write_sdxl(found: Mapping[str, int], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    written = {}
    for i, tower in enumerate(name for name in ("l", "g") if name in found):
        kind, module = ("transformers", "transformer") if tower == "l" else ("open_clip", "model")
        entries = clip_entries(found[tower], tower, kind, f"{SDXL}{i}.{module}.", projection=tower == "g")
        written |= to_theirs(entries, state)
    return written

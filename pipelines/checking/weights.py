"""What files and folders of weights are, for `python -m pipelines.inspect`. torch is imported when it is needed."""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.config import options, read_option

if TYPE_CHECKING:
    from ldm.interop.checkpoint_file import WeightFile
    from ldm.interop.contents import Contents
    from ldm.interop.entry import Shapes

SUFFIXES = (".ckpt", ".safetensors", ".pt", ".pth", ".bin", ".safetensors.index.json")
MOST_FACTS = 8  # that are shown
GROUPS = {"unet": "unet", "autoencoder": "autoencoder", "text_encoder": "text_encoder"}  # part -> folder of conf/


# ---- one file -----------------------------------------------------------------------------------------------------
def is_file(path: Path) -> bool:
    return path.is_file() and path.name.endswith(SUFFIXES)


def describe_file(path: Path) -> list[str]:
    """A file of weights; a network of diffusers is told by the config.json beside it."""
    from ldm.interop.checkpoint_file import open_file
    from ldm.interop.contents import DIFFUSERS, contents

    file = open_file(path)
    found = contents(file)
    if found.layout == DIFFUSERS and is_network(path.parent):
        return describe_network(path.parent)
    return describe_contents(file, found)


def describe_contents(file: WeightFile, found: Contents) -> list[str]:
    """Layout, parts, what fits, and what is not a weight."""
    from ldm.interop.contents import DIFFUSERS, NONE, OURS

    layouts = {
        OURS: "our layout",
        DIFFUSERS: "a network of diffusers, whose config.json is not beside it",
        NONE: "a layout that is not known here",
    }
    lines = [f"{file.path}: {file.format}, {layouts.get(found.layout, 'layout of the original project')}"]
    types = Counter(str(info.dtype).removeprefix("torch.") for info in file.tensors.values())
    lines.append(f"  {len(file.tensors):,} tensors: {', '.join(f'{n:,} {name}' for name, n in types.most_common())}")
    lines += fact_lines(file.facts)
    lines += part_lines(found.parts, found.averages)
    lines += schedule_lines(file)
    lines += [f"  not needed: {n:,} tensors ({reason})" for reason, n in Counter(found.dropped.values()).items()]
    lines += listed("repeats of other tensors", found.duplicates)
    lines += listed("missing", found.missing)
    lines += listed("tensors of which nothing is known", found.unknown)
    return lines + listed("objects that are no tensors, and were not built", file.stubs)


def fact_lines(facts: Mapping[str, Any]) -> list[str]:
    """Plain values beside the weights: epoch, global_step, metadata."""
    lines = [f"  {name}: {value}" for name, value in list(facts.items())[:MOST_FACTS]]
    return lines + ([f"  and {len(facts) - MOST_FACTS} more such values"] if len(facts) > MOST_FACTS else [])


def listed(what: str, names: Any) -> list[str]:
    """How many, and the first of them; nothing where there are none."""
    from ldm.interop.entry import some

    return [f"  {what}: {len(names):,}: {some(sorted(names), 4)}"] if names else []


def part_lines(parts: Mapping[str, Shapes], averages: Mapping[str, Shapes]) -> list[str]:
    """Tensors and parameters of each part, its average's beside it, and what fits."""
    from ldm.interop.contents import parameters

    lines = []
    for part, found in parts.items():
        lines.append(f"  {part}: {len(found):,} tensors, {parameters(found):,} parameters")
        if part in averages:
            average = averages[part]
            lines.append(f"    averaged (EMA): {len(average):,} tensors, {parameters(average):,} parameters")
        lines += [f"    {line}" for line in fit_lines(part, found)]
    return lines


def fit_lines(part: str, found: Shapes) -> list[str]:
    """Which file of conf/ has these shapes, or the nearest that has not."""
    from ldm.interop.contents import fit
    from ldm.interop.entry import some

    if part not in GROUPS:
        return [", ".join(f"{key} {tuple(shape)}" for key, shape in found.items())]
    group = GROUPS[part]
    best = fit(found, choices(group, "clip" if any(key.startswith("towers.") for key in found) else "transformer"))
    if best.exact:
        same = " (of one shape; they differ in settings)" if len(best.exact) > 1 else ""
        return [f"fits {' or '.join(f'{group}={name}' for name in best.exact)}{same}"]
    if best.nearest is None or len(best.problems) > len(found) / 4:
        return [f"fits no file of conf/{group}"]
    return [f"fits no file of conf/{group}; nearest is {group}={best.nearest}: {some(best.problems, 4)}"]


@functools.cache
def choices(group: str, text_kind: str) -> dict[str, Shapes]:
    """The shapes of every network of conf/<group>, of text encoders those of one kind, made on the meta device."""
    import torch

    from ldm.interop.entry import shapes
    from ldm.models.autoencoder import make_autoencoder
    from ldm.models.text_encoder import make_text_encoder
    from ldm.models.unet import UNet

    networks = {}
    with torch.device("meta"):
        for name in options(group):
            settings = read_option(group, name)
            if group == "unet":
                networks[name] = UNet(settings)
            elif group == "autoencoder":
                networks[name] = make_autoencoder(settings.network)
            elif settings.kind == text_kind:
                networks[name] = make_text_encoder(settings)
    return {name: shapes(network.state_dict()) for name, network in networks.items()}


def schedule_lines(file: WeightFile) -> list[str]:
    """The noise schedule that lies in a file, and the scale of its latents."""
    from ldm.interop.compvis import recognise

    lines = []
    if "betas" in file.tensors:
        found = recognise(file.read("betas"))
        lines.append("  schedule: of no kind that is known here" if found is None else "  schedule: {}, {} timesteps"
                     ", betas from {} to {}".format(*found))  # fmt: skip
    if "scale_factor" in file.tensors:
        lines.append(f"  scale_factor: {float(file.read('scale_factor')):.6g}")
    return lines


# ---- folders of diffusers -----------------------------------------------------------------------------------------
def is_pipeline(path: Path) -> bool:
    return (path / "model_index.json").is_file()


def describe_pipeline(path: Path) -> list[str]:
    """A whole folder; what does not fit its own settings is an error that names it."""
    from ldm.interop.diffusers_folder import read_folder, read_json
    from ldm.interop.entry import shapes

    model = read_folder(path, numbers=False)
    name = read_json(path / "model_index.json").get("_class_name")
    diffusion = model.diffusion
    return [
        f"{path}: folder of diffusers, {name}",
        *part_lines({part: shapes(state) for part, state in model.parts.items()}, {}),
        f"  schedule: {diffusion.schedule}, {diffusion.timesteps} timesteps, betas from {diffusion.beta_start} to "
        f"{diffusion.beta_end}, prediction {diffusion.prediction}",
        f"  scale_factor: {model.scale_factor:.6g}",
    ]


def is_network(path: Path) -> bool:
    """A folder with config.json and weights of one network."""
    return (path / "config.json").is_file() and bool({"_class_name", "model_type"} & read_settings(path).keys())


def read_settings(path: Path) -> dict[str, Any]:
    """config.json, or nothing where it holds no object."""
    try:
        value = json.loads((path / "config.json").read_bytes())
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def describe_network(path: Path) -> list[str]:
    """One network of diffusers or transformers."""
    from ldm.interop.diffusers_folder import read_autoencoder, read_text, read_unet
    from ldm.interop.entry import shapes

    settings = read_settings(path)
    kind = settings.get("_class_name", settings.get("model_type"))
    if kind in ("UNet2DModel", "UNet2DConditionModel"):
        part, state = "unet", read_unet(path, numbers=False)[1]
    elif kind in ("AutoencoderKL", "VQModel"):
        part, state = "autoencoder", read_autoencoder(path, numbers=False)[2]
    elif kind in ("ldmbert", "clip_text_model"):
        part, state = "text_encoder", read_text([path], numbers=False)[1]
    else:
        raise ValueError(f"{path / 'config.json'} describes a {kind}; known are UNet2DModel, UNet2DConditionModel, "
                         "AutoencoderKL, VQModel, ldmbert and clip_text_model")  # fmt: skip
    return [f"{path}: {kind} of diffusers", *part_lines({part: shapes(state)}, {})]


# ---- checkpoints of ours ------------------------------------------------------------------------------------------
def is_checkpoint(path: Path) -> bool:
    return path.is_dir() and path.name.startswith("step-") and (path / "manifest.json").is_file()


def describe_checkpoint(path: Path) -> list[str]:
    """Step, samples seen, and its weights, those trained and their averages; one that is not whole is an error."""
    from ldm.interop.checkpoint_file import open_file
    from ldm.interop.contents import contents
    from ldm.training.checkpoint import problems

    wrong = problems(path)
    if wrong:
        raise ValueError(f"{path} is a checkpoint that is not whole: {'; '.join(wrong)}")
    manifest = json.loads((path / "manifest.json").read_bytes())
    facts = ", ".join(f"{name} {value}" for name, value in manifest.items() if isinstance(value, int | float | str))
    averages = contents(open_file(path / "ema.safetensors")).parts
    trained = trained_parameters(path, list(manifest["files"]))
    return [
        f"{path}: checkpoint, whole: every file has the sha256 of its manifest",
        f"  {facts}",
        f"  trained: {', '.join(f'{part} {count:,} parameters' for part, count in trained.items())}",
        "  averaged (EMA):",
        *part_lines(averages, {}),
    ]


def trained_parameters(path: Path, files: list[str]) -> Counter[str]:
    """Parameters of each part that the processes' files hold together."""
    from ldm.interop.checkpoint_file import open_file

    counts: Counter[str] = Counter()
    for name in files:
        if name.startswith("rank-"):
            for key, info in open_file(path / name).tensors.items():
                if key.startswith("weight/"):
                    counts[key.removeprefix("weight/").partition(".")[0]] += info.shape[0]
    return counts

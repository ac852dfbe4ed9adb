"""What a file of weights holds, told by keys and shapes: whose layout, which parts, and which settings they fit.

No numbers are read, so a file of gigabytes takes a second.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch

from ldm.interop import compvis
from ldm.interop.checkpoint_file import WeightFile
from ldm.interop.entry import Entry, Shapes, misfits, shapes, to_own

ORIGINAL, OURS, DIFFUSERS, NONE = "original", "ours", "diffusers", "none"
# Prefixes of a denoiser's state dict; without a prefix the first key of a U-Net, of a text encoder, of CLIP's towers.
DENOISER = ("unet", "text_encoder", "class_embedder", "spatial_rescaler", "canvas")
BARE = {"input_blocks.": "unet", "token_embedding.": "text_encoder", "towers.": "text_encoder"}
THEIRS = re.compile(r"(down_blocks|mid_block|encoder\.down_blocks|encoder\.layers|text_model|model\.layers)\.")


@dataclass(frozen=True)
class Contents:
    """A file's parts, under our names."""

    layout: str  # ORIGINAL, OURS, DIFFUSERS (whose parts only the config.json beside them tells) or NONE
    parts: dict[str, Shapes]  # unet, autoencoder, text_encoder, ...: the newest weights, if there are averages too
    averages: dict[str, Shapes] = field(default_factory=dict)  # of these parts
    dropped: dict[str, str] = field(default_factory=dict)  # key -> why it is not needed
    duplicates: dict[str, str] = field(default_factory=dict)  # key -> the key that it repeats
    unknown: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


def contents(file: WeightFile) -> Contents:
    """Sorts a file's keys."""
    keys = list(file.tensors)
    if any(key.startswith(f"{part}.") for key in keys for part in DENOISER):
        return _of_ours(file)
    found = compvis.layout(keys)
    if found.parts and not any(map(THEIRS.match, keys)):
        parts = {part: own_shapes(entries, file) for part, entries in found.parts.items()}
        averages = {part.removesuffix("_ema"): parts.pop(part) for part in list(parts) if part.endswith("_ema")}
        return Contents(ORIGINAL, parts, averages, found.dropped, found.duplicates, found.unknown, found.missing)
    part = next((part for start, part in BARE.items() if any(key.startswith(start) for key in keys)), None)
    if part is not None:
        return Contents(OURS, {part: file.shapes})
    return Contents(DIFFUSERS if any(map(THEIRS.match, keys)) else NONE, {}, unknown=keys)


def own_shapes(entries: Iterable[Entry], file: WeightFile) -> dict[str, tuple[int, ...]]:
    """Our tensors' shapes, from theirs."""
    return shapes(to_own(entries, lambda key: torch.empty(file.tensors[key].shape, device="meta")))


def _of_ours(file: WeightFile) -> Contents:
    """A denoiser's state dict."""
    parts: dict[str, dict[str, tuple[int, ...]]] = {}
    unknown = []
    for key, shape in file.shapes.items():
        part, _, name = key.partition(".")
        if part in DENOISER:
            parts.setdefault(part, {})[name] = shape
        else:
            unknown.append(key)
    return Contents(OURS, parts, unknown=unknown)


def parameters(found: Shapes) -> int:
    """How many numbers tensors of these shapes hold."""
    return sum(math.prod(shape) for shape in found.values())


@dataclass(frozen=True)
class Fit:
    """Which of several networks has a file's shapes."""

    exact: list[str]  # names; several where they differ in what shapes do not tell (heads, scale factor, ...)
    nearest: str | None  # where none fits: the one that differs least
    problems: list[str]  # in what it differs


def fit(found: Shapes, choices: Mapping[str, Shapes]) -> Fit:
    """Compares a part's shapes with those of networks, by name."""
    problems = {name: misfits(found, expected) for name, expected in choices.items()}
    exact = [name for name, wrong in problems.items() if not wrong]
    if exact or not problems:
        return Fit(exact, None, [])
    nearest = min(problems, key=lambda name: len(problems[name]))
    return Fit([], nearest, problems[nearest])

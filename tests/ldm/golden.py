"""Numbers that the original code computed, as tests/golden keeps them; its README.md says where they come from.

Weights there were drawn from a seeded generator, so most need not be stored: they are drawn again here, with numpy and
in float64, which gives the same numbers on every machine. What the generator's own float32 rounded to another float16
(one in two thousand) is stored and put right, and a digest of all of them is compared.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

FOLDER = Path(__file__).resolve().parents[1] / "golden"


def facts(name: str) -> dict[str, Any]:
    """What is known of a case: configuration, tolerances, where it comes from."""
    return json.loads((FOLDER / f"{name}.json").read_text())


def load(name: str) -> dict[str, Tensor]:
    """A case's tensors: input/NAME, output/NAME, and weights/KEY in float16."""
    tensors = load_file(FOLDER / f"{name}.safetensors")
    drawn = facts(name).get("drawn")
    return tensors if drawn is None else tensors | draw(drawn, tensors.pop("wrong"), tensors.pop("right"))


def draw(drawn: dict[str, Any], wrong: Tensor, right: Tensor) -> dict[str, Tensor]:
    """Weights from a seed: `drawn` lists key, shape, first number used, standard deviation and mean of each.

    Number `wrong[i]` of all of them, one tensor after the other, is `right[i]`.
    """
    rows = drawn["tensors"]
    numbers = uniform(drawn["seed"], max(start + int(np.prod(shape)) + 16 for _, shape, start, _, _ in rows))
    parts = [np.float32(mean) + normal(numbers[start:], int(np.prod(shape))) * np.float32(std)
             for _, shape, start, std, mean in rows]  # fmt: skip
    flat = np.concatenate(parts).astype(np.float16)
    flat[wrong.numpy()] = right.numpy()
    found = hashlib.sha256(flat.tobytes()).hexdigest()
    if found != drawn["sha256"]:
        raise ValueError(f"weights drawn from seed {drawn['seed']} have sha256 {found}, expected {drawn['sha256']}")
    sizes = [part.size for part in parts]
    pieces = torch.from_numpy(flat).split(sizes)
    return {key: piece.view(shape) for (key, shape, *_), piece in zip(rows, pieces, strict=True)}


def uniform(seed: int, count: int) -> np.ndarray:
    """Numbers in [0, 1) of torch's generator on a processor: 24 bits of each word of a Mersenne twister."""
    twister = np.random.RandomState(seed)  # seeded as torch seeds its own
    return (twister.randint(0, 2**32, count, dtype=np.uint32) & (2**24 - 1)) / 2.0**24


def normal(numbers: np.ndarray, count: int) -> np.ndarray:
    """torch.randn of 16 numbers or more: Box and Muller's method on blocks of 16, the last block always fresh."""
    whole = count // 16 * 16
    result = np.empty(count, np.float32)
    result[:whole] = box_muller(numbers[:whole])
    if count > whole:
        result[-16:] = box_muller(numbers[count : count + 16])
    return result


def box_muller(numbers: np.ndarray) -> np.ndarray:
    """Blocks of 16 uniform numbers -> as many normal ones: 8 cosines, then 8 sines."""
    block = numbers.reshape(-1, 16)
    radius, angle = np.sqrt(-2 * np.log(1 - block[:, :8])), 2 * np.pi * block[:, 8:]
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)], axis=1).reshape(-1)

"""Scores of pictures from CLIP: how well one fits its caption, and what small heads say of its embedding.

Loaded once for each worker of filter_images, on the GPU that it was given or on the processor. Batches are padded to
one size and run on one thread, so that a score depends on its picture and caption only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from ldm.config import ClipConfig
from ldm.interop.checkpoint_file import open_file
from ldm.models.clip import Clip
from ldm.models.score_head import ScoreHead
from pipelines.dag import weights_path
from pipelines.manifest import sha256_file
from pipelines.settings import FilterImagesConfig, ScoreHeadConfig


@dataclass(frozen=True)
class Picture:
    """What is scored."""

    rgb: np.ndarray  # (h, w, 3) uint8
    caption: str


class Scorer:
    """Pictures with captions -> {clip_similarity, one score for each head, embedding} for each."""

    def __init__(self, settings: FilterImagesConfig, device: torch.device) -> None:
        if settings.clip is None:
            raise ValueError("dataset.filter_images.clip is null, but dataset.filter_images.heads read its embeddings")
        self.settings, self.device = settings.clip, device
        torch.set_num_threads(1)
        path = checked(settings.clip.weights, settings.clip.sha256, "clip")
        self.clip = Clip(ClipConfig(settings.clip.model, path)).to(self.device)
        self.heads = {name: _read_head(name, head) for name, head in settings.heads.items()}

    def __call__(self, pictures: list[Picture]) -> list[dict[str, Any]]:
        size = self.settings.batch_size
        return [score for at in range(0, len(pictures), size) for score in self._batch(pictures[at : at + size])]

    @torch.inference_mode()
    def _batch(self, pictures: list[Picture]) -> list[dict[str, Any]]:
        padded = pictures + pictures[-1:] * (self.settings.batch_size - len(pictures))
        pixels = torch.stack([self.clip.preprocess(Image.fromarray(picture.rgb)) for picture in padded])
        tokens = self.clip.tokenize([picture.caption for picture in padded])
        images = self.clip.encode_image(pixels.to(self.device)).float()
        texts = self.clip.encode_text(tokens.to(self.device)).float()
        images, similarity = images.cpu(), (images * texts).sum(-1).cpu()
        columns = {"clip_similarity": similarity.numpy()}
        columns |= {name: self._head(name, images).numpy() for name in self.heads}
        if self.settings.keep_embeddings:
            columns["embedding"] = images.half().numpy()
        return [{name: values[i] for name, values in columns.items()} for i in range(len(pictures))]

    def _head(self, name: str, images: torch.Tensor) -> torch.Tensor:
        head = self.heads[name]
        if head.width != images.shape[1]:
            raise ValueError(
                f"dataset.filter_images.heads.{name} reads {head.width} numbers, but {self.settings.model} gives "
                f"{images.shape[1]}; take the head that was trained on this model, or the model that it was trained on"
            )
        return head(images)


def _read_head(name: str, head: ScoreHeadConfig) -> ScoreHead:
    """A head from its file, whatever wrote it: nothing in it is run."""
    path = checked(head.weights, head.sha256, f"heads.{name}")
    return ScoreHead(open_file(path).state(), head.activation, head.output, path)


def checked(weights: str, sha256: str | None, key: str) -> str:
    """The path of a file of weights that is what the settings say."""
    path = weights_path(weights)
    found = sha256_file(path)
    if found != sha256:
        raise ValueError(
            f"{path} has sha256 {found}, expected {sha256} (dataset.filter_images.{key}.sha256): fetch the right file, "
            f"or write down the hash of this one"
        )
    return str(path)

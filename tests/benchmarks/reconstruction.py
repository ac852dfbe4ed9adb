"""What the default job's autoencoder reaches on held-out drawings: the figures of its card.

    python -m tests.benchmarks.reconstruction [weights=PATH]
"""

from __future__ import annotations

import dataclasses
import io
import sys
import time
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ldm.config import AutoencoderSettings
from ldm.images import resize_and_crop
from ldm.models.autoencoder import load_autoencoder
from ldm.training.train_autoencoder import motif_of, reconstruction_psnr, split_pictures, to_tensor
from pipelines.config import compose
from pipelines.dag import weights_path
from pipelines.embedded_web.drawings import Drawing, drawings, render_on

SIDE, BATCH = 128, 32


def served(drawing: Drawing) -> np.ndarray:
    """A drawing as the web serves it: larger, as JPEG, made smaller twice."""
    sink = io.BytesIO()
    Image.fromarray(resize_and_crop(render_on(drawing, 240), 160)).save(sink, "JPEG", quality=95)
    return resize_and_crop(np.asarray(Image.open(sink).convert("RGB")), SIDE)


@torch.no_grad()
def latents(autoencoder: torch.nn.Module, images: np.ndarray) -> tuple[Tensor, Tensor]:
    """Means and standard deviations of the posteriors, (n, c, h, w) each."""
    moments = torch.cat([autoencoder.encode(to_tensor(images[i : i + BATCH])) for i in range(0, len(images), BATCH)])
    mean, logvar = moments.chunk(2, dim=1)
    return mean, (0.5 * logvar.clamp(-30, 20)).exp()


@torch.no_grad()
def disturbed_psnr(autoencoder: torch.nn.Module, images: np.ndarray, share: float) -> float:
    """PSNR of pictures decoded from means with noise of a share of their spread."""
    mean, _ = latents(autoencoder, images)
    torch.manual_seed(0)
    z = mean + share * mean.std() * torch.randn_like(mean)
    decoded = torch.cat([autoencoder.decode(part) for part in z.split(BATCH)]).clamp(-1, 1)
    error = (decoded - to_tensor(images)).square().mean((1, 2, 3))
    return float((10 * torch.log10(4 / error)).mean())


def speed(work: Callable[[], object], pictures: int, repeats: int = 5) -> float:
    """Pictures a second, the median of some runs."""
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return pictures / sorted(seconds)[repeats // 2]


@torch.no_grad()
def main(arguments: list[str]) -> None:
    torch.set_num_threads(1)
    config = compose([])
    path = dict(argument.split("=", 1) for argument in arguments).get("weights", config.autoencoder.weights)
    settings: AutoencoderSettings = dataclasses.replace(config.autoencoder, weights=str(weights_path(path)))
    autoencoder = load_autoencoder(settings, torch.device("cpu"))
    named = drawings()
    captions = [drawing.caption for drawing in named]
    images = np.stack([render_on(drawing, SIDE) for drawing in named])
    split = split_pictures(images, captions, config.autoencoder_training)
    held_out, trained = images[split.held_out], images[split.trained]
    psnr = reconstruction_psnr(autoencoder, held_out)
    motifs: dict[str, list[float]] = {}
    for i, value in zip(split.held_out, psnr.tolist(), strict=True):
        motifs.setdefault(motif_of(captions[i], config.autoencoder_training), []).append(value)
    print(f"held out: {len(held_out)} drawings of {len(motifs)} motifs; trained on {len(trained)}")
    print(f"PSNR held out: mean {psnr.mean():.2f}, std {psnr.std():.2f}, lowest {psnr.min():.2f}")
    print(f"PSNR over motifs: {np.mean([np.mean(values) for values in motifs.values()]):.2f}")
    print(f"PSNR trained on: {reconstruction_psnr(autoencoder, trained).mean():.2f}")
    as_served = np.stack([served(named[i]) for i in split.held_out])
    print(f"PSNR held out as served: {reconstruction_psnr(autoencoder, as_served).mean():.2f}")
    print("PSNR held out, disturbed:", [round(disturbed_psnr(autoencoder, held_out, s), 2) for s in (0.05, 0.1, 0.2)])
    mean, noise = latents(autoencoder, trained)
    print(f"latent std {mean.std():.4f}, of channels {[round(x, 3) for x in mean.std((0, 2, 3)).tolist()]}")
    print(f"latent mean of channels {[round(x, 2) for x in mean.mean((0, 2, 3)).tolist()]}, noise {noise.mean():.3f}")
    batch = to_tensor(held_out[:BATCH])
    z = autoencoder.encode(batch)[:, : autoencoder.latent_channels]
    print(f"one thread: encode {speed(lambda: autoencoder.encode(batch), BATCH):.0f}, "
          f"decode {speed(lambda: autoencoder.decode(z), BATCH):.0f} images/s")


if __name__ == "__main__":
    main(sys.argv[1:])

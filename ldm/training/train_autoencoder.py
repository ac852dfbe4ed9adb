"""Trains a small autoencoder on pictures that fit in memory, in one process: one straight function.

Pictures are held out by the hash of their caption, and what looks like a held-out one is not trained on. The
pictures, crops, mirrorings and noise of a step are pure functions of (seed, step), so a run stopped and resumed
is the run not stopped. Weights move by Muon, with which such a network learns in a third of Adam's steps; what
is kept is their running average.

Written at every checkpoint, whole or not at all: output/weights.safetensors (the averaged weights) and
output/state.safetensors (all that a resumed run needs).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from ldm.config import AutoencoderConfig, AutoencoderTrainingConfig
from ldm.models.tiny_autoencoder import Block, TinyAutoencoder
from ldm.models.winograd import use_winograd
from ldm.training.autoencoder_loss import kl_divergence, psnr, reconstruction, split_moments


@dataclass(frozen=True)
class Split:
    """Which pictures are trained on and which are only looked at; rows of the images."""

    trained: np.ndarray
    held_out: np.ndarray
    near: np.ndarray  # like a held-out picture: used for neither


def train_autoencoder(
    network: AutoencoderConfig,
    training: AutoencoderTrainingConfig,
    images: np.ndarray,
    captions: list[str],
    output: Path,
    *,
    log: Callable[[dict[str, float], int], None],
    should_stop: Callable[[], bool],
) -> dict[str, float] | None:
    """Images (n, H, W, 3) uint8 with their captions -> figures of the finished weights; None when stopped before."""
    torch.set_num_threads(training.threads)
    split = split_pictures(images, captions, training)
    model = make_network(network, training.seed)
    use_winograd(model)  # a step on a processor takes 0.6 of the time
    average = [weight.detach().clone() for weight in model.parameters()]
    optimizer = Muon(model, training)
    identity = _identity(network, training, images, captions)
    step = _resume(output, identity, model, average, optimizer)
    while step < training.max_steps:
        image = _pictures(images, split.trained, training, step)
        noise = torch.Generator().manual_seed(_seed(training.seed, "noise", step))
        moments = model.encode(image)
        mean, logvar = split_moments(moments) if network.posterior == "kl" else (moments, None)
        z = mean if logvar is None else mean + (logvar / 2).exp() * torch.randn(mean.shape, generator=noise)
        loss = reconstruction(model.decode(z), image).mean()
        kl = loss.new_zeros(()) if logvar is None else kl_divergence(mean, logvar).mean()
        total = loss + training.kl_weight * kl
        if not torch.isfinite(total):
            raise RuntimeError(
                f"the loss is {total.item()} at step {step}; expected a finite one: lower "
                f"autoencoder_training.learning_rate ({training.learning_rate}) and start again"
            )
        model.zero_grad()
        total.backward()
        optimizer.step(_decay(step, training))
        step += 1
        # The average forgets its random start: it begins as a plain mean and lengthens to the full decay.
        torch._foreach_lerp_(average, list(model.parameters()), 1 - min(training.ema_decay, step / (20 + step)))
        last = step == training.max_steps
        if step % training.log_every_steps == 0 or last:
            log({"loss": loss.item(), "kl": kl.item(), "learning_rate": optimizer.learning_rate}, step)
        if step % training.checkpoint_every_steps == 0 or last or should_stop():
            _checkpoint(output, identity, model, average, optimizer, step)
            averaged = _averaged(network, model, average)
            log({"held_out_psnr": reconstruction_psnr(averaged, images[split.held_out]).mean().item()}, step)
            if not last and should_stop():
                return None
    return figures(_averaged(network, model, average), images, split)


def split_pictures(images: np.ndarray, captions: list[str], training: AutoencoderTrainingConfig) -> Split:
    """Holds pictures out by the hash of their caption; drops from training all that look like one of them.

    Captions equal but for what `same_picture` matches (skin tones) stand for one motif: it is held out as a whole,
    and a motif of which one picture is within `near_duplicate_bits` of a held-out one is dropped as a whole.
    """
    motifs = [motif_of(caption, training) for caption in captions]
    held_out = np.array([is_held_out(caption, training) for caption in captions], bool)
    if not held_out.any() or held_out.all():
        raise ValueError(
            f"{held_out.sum()} of {len(captions)} pictures are held out; expected some and not all: "
            "change autoencoder_training.held_out_share or read more pictures"
        )
    hashes = perceptual_hash(images)
    distance = np.count_nonzero(hashes[:, None] != hashes[None, held_out], axis=2).min(1)
    near_motifs = {motifs[row] for row in np.flatnonzero(distance <= training.near_duplicate_bits)}
    near = np.array([motif in near_motifs for motif in motifs], bool) & ~held_out
    return Split(np.flatnonzero(~held_out & ~near), np.flatnonzero(held_out), np.flatnonzero(near))


def motif_of(caption: str, training: AutoencoderTrainingConfig) -> str:
    """What a caption names, whatever `same_picture` says may vary."""
    return re.sub(training.same_picture, "", caption)


def is_held_out(caption: str, training: AutoencoderTrainingConfig) -> bool:
    """Whether a picture is held out: its motif's hash decides, whatever other pictures there are."""
    hashed = hashlib.sha256(motif_of(caption, training).encode()).digest()
    return int.from_bytes(hashed[:8], "big") / 2**64 < training.held_out_share


def perceptual_hash(images: np.ndarray) -> np.ndarray:
    """64 bits a picture, the signs of its lowest 8x8 cosine waves about their median: (n, H, W, 3) -> (n, 64)."""
    n, size = len(images), 32
    step = images.shape[1] // size
    if images.shape[1] != images.shape[2] or images.shape[1] % size:
        raise ValueError(f"pictures of {images.shape[1]}x{images.shape[2]} cannot be hashed; expected n*{size} square")
    luma = np.float32([0.299, 0.587, 0.114])
    gray = np.stack([(image @ luma).reshape(size, step, size, step).mean((1, 3)) for image in images])
    waves = np.cos(np.pi * (np.arange(size) + 0.5)[None] * np.arange(8)[:, None] / size).astype(np.float32)
    spectrum = (waves @ gray @ waves.T).reshape(n, 64)
    return spectrum > np.median(spectrum, axis=1, keepdims=True)


def make_network(network: AutoencoderConfig, seed: int) -> TinyAutoencoder:
    """A network at its random start, the same for every machine of one torch version."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = TinyAutoencoder(network)
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, Block):
                module.conv[-1].weight.mul_(0.1)  # without norms, blocks must begin near the identity
        model.encoder[-1].weight.mul_(0.3)
        if network.posterior == "kl":
            model.encoder[-1].bias[network.latent_channels :] = -6.0  # begin with little noise, or nothing is learnt
    return model.to(memory_format=torch.channels_last)


class Muon:
    """Momentum made orthogonal for convolutions (Jordan et al., 2024), Adam for biases; both at one decaying rate."""

    def __init__(self, model: nn.Module, training: AutoencoderTrainingConfig) -> None:
        self.training = training
        self.weights = [weight for weight in model.parameters() if weight.ndim > 1]
        biases = [weight for weight in model.parameters() if weight.ndim == 1]
        self.momentum = [torch.zeros_like(weight) for weight in self.weights]
        self.adam = torch.optim.Adam(biases, lr=training.bias_learning_rate, betas=(0.9, 0.98))
        self.learning_rate = 0.0

    @torch.no_grad()
    def step(self, decay: float) -> None:
        self.learning_rate = self.training.learning_rate * decay
        self.adam.param_groups[0]["lr"] = self.training.bias_learning_rate * decay
        self.adam.step()
        beta = self.training.momentum
        for weight, momentum in zip(self.weights, self.momentum, strict=True):
            momentum.mul_(beta).add_(weight.grad)
            update = orthogonal(weight.grad + beta * momentum)  # Nesterov
            weight.add_(update, alpha=-self.learning_rate)

    def state(self) -> dict[str, Tensor]:
        """All that the optimizer remembers, as named tensors."""
        state = {f"momentum.{index}": momentum for index, momentum in enumerate(self.momentum)}
        for index, entry in self.adam.state_dict()["state"].items():
            state.update({f"adam.{index}.{name}": value for name, value in entry.items()})
        return state

    def load(self, state: dict[str, Tensor]) -> None:
        for index, momentum in enumerate(self.momentum):
            momentum.copy_(state[f"momentum.{index}"])
        entries: dict[int, dict[str, Tensor]] = {}
        for name, value in state.items():
            if name.startswith("adam."):
                _, index, field = name.split(".")
                entries.setdefault(int(index), {})[field] = value
        self.adam.load_state_dict({**self.adam.state_dict(), "state": entries})


def orthogonal(matrix: Tensor) -> Tensor:
    """The nearest orthogonal matrix, roughly, by five Newton-Schulz steps (Jordan et al., 2024); (out, ...) -> same.

    Every step multiplies x by a polynomial of its Gram matrix from the left, so all of them are taken on the small
    square matrices and x is multiplied once: less than half the time.
    """
    x = matrix.flatten(1)
    out, fan_in = x.shape
    x = (x.T if out > fan_in else x) / (x.norm() + 1e-7)
    gram, one = x @ x.T, torch.eye(min(out, fan_in))
    product = one
    for _ in range(5):
        factor = 3.4445 * one - 4.7750 * gram + 2.0315 * gram @ gram
        product = factor @ product
        gram = factor @ gram @ factor
    x = product @ x
    return (x.T if out > fan_in else x).reshape(matrix.shape) * max(1.0, out / fan_in) ** 0.5


@torch.no_grad()
def reconstruction_psnr(model: TinyAutoencoder, images: np.ndarray, batch_size: int = 32) -> Tensor:
    """PSNR in dB of each picture, coded by its mean; images (n, H, W, 3) uint8 -> (n,)."""
    found = []
    for start in range(0, len(images), batch_size):
        image = to_tensor(images[start : start + batch_size])
        found.append(psnr(model(image), image))
    return torch.cat(found)


@torch.no_grad()
def figures(model: TinyAutoencoder, images: np.ndarray, split: Split) -> dict[str, float]:
    """What is known of trained weights: PSNR held out and trained, spread of the latents of trained pictures."""
    channels = model.latent_channels
    parts = [split.trained[start : start + 32] for start in range(0, len(split.trained), 32)]
    moments = torch.cat([model.encode(to_tensor(images[rows])) for rows in parts])
    mean, logvar = moments[:, :channels], moments[:, channels:]
    std = mean.std((0, 2, 3))
    found = {
        "held_out_psnr": reconstruction_psnr(model, images[split.held_out]).mean().item(),
        "train_psnr": reconstruction_psnr(model, images[split.trained]).mean().item(),
        "held_out_pictures": float(len(split.held_out)),
        "trained_pictures": float(len(split.trained)),
        "near_pictures": float(len(split.near)),
        "latent_std": mean.std().item(),
        "scale_factor": 1 / mean.std().item(),
    }
    found |= {f"latent_mean_{index}": value for index, value in enumerate(mean.mean((0, 2, 3)).tolist())}
    found |= {f"latent_std_{index}": value for index, value in enumerate(std.tolist())}
    return found if logvar.numel() == 0 else found | {"noise_std": (logvar / 2).exp().mean().item()}


def to_tensor(images: np.ndarray) -> Tensor:
    """Pictures (n, H, W, 3) uint8 -> (n, 3, H, W) float32 in [-1, 1], channels last."""
    image = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2)
    return (image.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def _pictures(images: np.ndarray, trained: np.ndarray, training: AutoencoderTrainingConfig, step: int) -> Tensor:
    """The pictures of a step: cut out somewhere and perhaps mirrored; whole for the last share of the steps."""
    first = step * training.batch_size
    positions = range(first, first + training.batch_size)
    rows = [trained[_row(training.seed, position, len(trained))] for position in positions]
    random = np.random.default_rng(_seed(training.seed, "crop", step))
    whole = step >= training.max_steps * (1 - training.whole_share)
    height, width = images.shape[1:3]
    crop = (height, width) if whole else (training.crop_size, training.crop_size)
    cut = []
    for row in rows:
        top, left = (random.integers(0, full - part + 1) for full, part in zip((height, width), crop, strict=True))
        picture = images[row, top : top + crop[0], left : left + crop[1]]
        cut.append(picture[:, ::-1] if random.random() < 0.5 else picture)
    return to_tensor(np.stack(cut))


def _row(seed: int, position: int, rows: int) -> int:
    """The picture at a position of the endless sequence: every epoch is another order of all of them."""
    return int(_order(seed, position // rows, rows)[position % rows])


_orders: dict[tuple[int, int, int], np.ndarray] = {}


def _order(seed: int, epoch: int, rows: int) -> np.ndarray:
    if (seed, epoch, rows) not in _orders:
        _orders.clear()
        _orders[seed, epoch, rows] = np.random.default_rng(_seed(seed, "order", epoch)).permutation(rows)
    return _orders[seed, epoch, rows]


def _decay(step: int, training: AutoencoderTrainingConfig) -> float:
    """Linear warm-up, then a cosine to zero."""
    warm = min(1.0, (step + 1) / training.warmup_steps)
    return warm * (0.5 + 0.5 * math.cos(math.pi * step / training.max_steps))


def _seed(*parts: int | str) -> int:
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


def _averaged(network: AutoencoderConfig, model: TinyAutoencoder, average: list[Tensor]) -> TinyAutoencoder:
    copy = TinyAutoencoder(network).to(memory_format=torch.channels_last)
    names = [name for name, _ in model.named_parameters()]
    copy.load_state_dict(dict(zip(names, average, strict=True)))
    return copy.eval()


def _checkpoint(
    output: Path, identity: str, model: TinyAutoencoder, average: list[Tensor], optimizer: Muon, step: int
) -> None:
    names = [name for name, _ in model.named_parameters()]
    averaged = dict(zip(names, average, strict=True))
    state = {f"weight.{name}": weight.detach() for name, weight in model.named_parameters()}
    state |= {f"average.{name}": weight for name, weight in averaged.items()}
    state |= {f"optimizer.{name}": value for name, value in optimizer.state().items()}
    metadata = {"step": str(step), "made_from": identity}
    _write_whole(output / "weights.safetensors", save({name: value.contiguous() for name, value in averaged.items()}))
    _write_whole(output / "state.safetensors", save({k: v.contiguous() for k, v in state.items()}, metadata))


def _resume(output: Path, identity: str, model: TinyAutoencoder, average: list[Tensor], optimizer: Muon) -> int:
    """Loads the newest state, if there is one of these very settings and pictures, and says its step."""
    path = output / "state.safetensors"
    if not path.is_file():
        return 0
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (safe_open is no dict)
    if metadata["made_from"] != identity:
        raise ValueError(
            f"{path} was made from {metadata['made_from'][:12]}, expected {identity[:12]}: other settings or other "
            "pictures; remove it to start again"
        )
    with torch.no_grad():
        for (name, weight), mean in zip(model.named_parameters(), average, strict=True):
            weight.copy_(state[f"weight.{name}"])
            mean.copy_(state[f"average.{name}"])
    prefix = "optimizer."
    optimizer.load({name.removeprefix(prefix): v for name, v in state.items() if name.startswith(prefix)})
    return int(metadata["step"])


def _identity(
    network: AutoencoderConfig, training: AutoencoderTrainingConfig, images: np.ndarray, captions: list[str]
) -> str:
    """A hash of all that decides the weights."""
    settings = json.dumps([asdict(network), asdict(training), captions, images.shape], sort_keys=True)
    return hashlib.sha256(settings.encode() + np.ascontiguousarray(images).data).hexdigest()


def _write_whole(path: Path, data: bytes) -> None:
    """A file that is whole or not there: written aside, synced, renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".tmp")
    with aside.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    aside.rename(path)

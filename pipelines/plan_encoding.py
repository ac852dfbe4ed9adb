"""Which batch precompute_latents should encode on the machine at hand: tried with noise, nothing is written."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from pipelines.config import Config
from pipelines.dag import ROOT
from pipelines.settings import ClusterConfig

GB = 1e9


def find_batch_size(config: Config) -> int:
    """Prints what each batch size costs, and the setting to take. Returns the exit code: 1 where not even one fits."""
    import torch

    from ldm.encode import Encoder
    from ldm.encode_sizes import best, memory_limit, try_sizes
    from pipelines.stages.precompute_latents import shapes_of

    settings = config.dataset.precompute_latents
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    height, width = max((shape for shapes in shapes_of(settings).values() for shape in shapes), key=area)
    with weights_of(config) as weights:
        encoder = Encoder(
            replace(config.autoencoder, weights=weights), device, batch_size=1, precision=settings.precision,
            threads=settings.threads, channels_last=settings.channels_last,
        )  # fmt: skip
    limit = memory_limit(device) // workers_beside(config.cluster, device.type)
    print(f"pictures of {height}x{width} in {settings.precision} on {device}, a worker may take {limit / GB:.1f} GB\n")
    print(f"{'batch':>5}{'pictures/s':>14}{'GB':>8}")
    tried = []
    for each in try_sizes(encoder, height, width, limit):
        print(f"{each.batch_size:>5}{each.pictures_per_second:>14,.1f}{each.bytes / GB:>8.2f}", flush=True)
        tried.append(each)
    if not tried:
        print("\nNot even one fits: lower dataset.precompute_latents.resolution", file=sys.stderr)
        return 1
    print("\nThe smallest that is as fast as any that fits:")
    print(f"dataset.precompute_latents.batch_size={best(tried).batch_size}")
    return 0


def area(shape: tuple[int, int]) -> int:
    return shape[0] * shape[1]


@contextmanager
def weights_of(config: Config) -> Iterator[str]:
    """A file with the autoencoder's weights; where they are not there yet random ones, which cost as much."""
    given = config.autoencoder.weights
    if given is not None and (ROOT / given).is_file():
        yield str(ROOT / given)
        return
    from safetensors.torch import save_file

    from ldm.models.autoencoder import make_autoencoder

    with tempfile.TemporaryDirectory() as folder:
        save_file(make_autoencoder(config.autoencoder.network).state_dict(), f"{folder}/random.safetensors")
        yield f"{folder}/random.safetensors"


def workers_beside(cluster: ClusterConfig, device: str) -> int:
    """How many workers of precompute_latents may share a device."""
    needs = cluster.precompute_latents
    slots, need = (1, needs.num_gpus) if device == "cuda" else (cluster.num_cpus or os.cpu_count() or 1, needs.num_cpus)
    return max(1, min(needs.in_flight, int(slots / need) if need else 1))

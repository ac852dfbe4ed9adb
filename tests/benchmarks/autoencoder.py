"""Encoding and decoding with kl-f8 here and in diffusers, with the same weights, in float32.

    python -m tests.benchmarks.autoencoder --size 128 --repeats 7 --threads 2

Runs are interleaved, so that a busy machine slows all alike; medians, fastest and slowest are printed, and the memory
that a run adds at its peak. Outputs are compared before anything is timed.
"""

from __future__ import annotations

import argparse
import copy
import re
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ldm.config import AutoencoderSettings
from ldm.models.autoencoder import Autoencoder, make_autoencoder
from ldm.models.winograd import use_winograd
from tests.benchmarks.unet_step import peak_megabytes
from tests.ldm.models import settings

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def to_diffusers(key: str, value: Tensor, levels: int) -> tuple[str, Tensor]:
    """Name and shape of a weight in diffusers' AutoencoderKL."""
    key = re.sub(r"up\.(\d+)\.", lambda m: f"up.{levels - 1 - int(m[1])}.", key)
    for ours, theirs in (
        (r"(down|up)\.(\d+)\.block\.", r"\1_blocks.\2.resnets."),
        (r"(down|up)\.(\d+)\.(down|up)sample\.", r"\1_blocks.\2.\3samplers.0."),
        (r"mid\.block_1\.", "mid_block.resnets.0."),
        (r"mid\.block_2\.", "mid_block.resnets.1."),
        (r"mid\.attn_1\.norm\.", "mid_block.attentions.0.group_norm."),
        (r"mid\.attn_1\.([qkv])\.", r"mid_block.attentions.0.to_\1."),
        (r"mid\.attn_1\.proj_out\.", "mid_block.attentions.0.to_out.0."),
        (r"norm_out", "conv_norm_out"),
        (r"nin_shortcut", "conv_shortcut"),
    ):
        key = re.sub(ours, theirs, key)
    return key, value[:, :, 0, 0] if ".attentions." in key and value.dim() == 4 else value


def make_pair() -> tuple[Autoencoder, nn.Module]:
    """Ours and diffusers' with the same random weights."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    network = settings.read(AutoencoderSettings, "autoencoder", "kl_f8").network
    ours = make_autoencoder(network).eval().requires_grad_(False)
    widths = [network.compvis.channels * m for m in network.compvis.channel_mult]
    theirs = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * len(widths),
        up_block_types=["UpDecoderBlock2D"] * len(widths),
        block_out_channels=widths,
        layers_per_block=network.compvis.num_res_blocks,
        latent_channels=network.latent_channels,
    )
    state = dict(to_diffusers(key, value, len(widths)) for key, value in ours.state_dict().items())
    theirs.load_state_dict(state)
    return ours, theirs.eval().requires_grad_(False)


@torch.inference_mode()
def measure(size: int, batch: int, repeats: int, clock: Callable[[], float]) -> None:
    """Prints a table of `repeats` interleaved runs of each network, task and memory format."""
    ours, theirs = make_pair()
    fewer_products = copy.deepcopy(ours)
    use_winograd(fewer_products)
    image, z = torch.randn(batch, 3, size, size).clamp(-1, 1), torch.randn(batch, 4, size // 8, size // 8)
    tasks: dict[str, dict[str, tuple[nn.Module, Callable[[], Tensor]]]] = {
        "encode": {
            "ours": (ours, lambda: ours.encode(image)),
            "ours, use_winograd": (fewer_products, lambda: fewer_products.encode(image)),
            "diffusers": (theirs, lambda: theirs.encode(image).latent_dist.parameters),
        },
        "decode": {
            "ours": (ours, lambda: ours.decode(z)),
            "ours, use_winograd": (fewer_products, lambda: fewer_products.decode(z)),
            "diffusers": (theirs, lambda: theirs.decode(z).sample),
        },
    }
    for task, runs in tasks.items():
        times: dict[tuple[str, str], list[float]] = {}
        memory: dict[tuple[str, str], float] = {}
        for repeat in range(-1, repeats):  # the one before the first warms up, and is compared instead of timed
            for name, memory_format in FORMATS.items():
                outputs = {}
                for who, (network, run) in runs.items():
                    network.to(memory_format=memory_format)
                    start = clock()
                    outputs[who] = run()
                    if repeat >= 0:
                        times.setdefault((who, name), []).append(clock() - start)
                    else:
                        memory[who, name] = peak_megabytes(run)
                if repeat < 0:
                    for output in outputs.values():
                        torch.testing.assert_close(output, outputs["diffusers"], rtol=1e-4, atol=1e-4)
        report(f"{task} {batch} x 3 x {size} x {size}", times, memory)


def report(title: str, times: dict[tuple[str, str], list[float]], memory: dict[tuple[str, str], float]) -> None:
    print(f"{title}, float32, {torch.get_num_threads()} threads: median (fastest to slowest)")
    for (who, name), taken in times.items():
        spread = f"({min(taken):.3f} to {max(taken):.3f})"
        print(f"  {who:18} {name:13} {statistics.median(taken):7.3f} s {spread}  {memory[who, name]:6.0f} MB")
    for figure in (statistics.median, min):
        best = {who: min(figure(taken) for (w, _), taken in times.items() if w == who) for who, _ in times}
        for who in sorted(best.keys() - {"diffusers"}):
            ratio = best["diffusers"] / best[who]
            print(f"  best of diffusers / best of {who}: {ratio:.2f} by {'fastest' if figure is min else 'median'}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=128, help="pixels of a picture's side")
    parser.add_argument("--batch", type=int, default=1, help="pictures at once")
    parser.add_argument("--repeats", type=int, default=7, help="interleaved runs")
    parser.add_argument("--threads", type=int, default=2, help="processor threads")
    parser.add_argument("--processor-time", action="store_true", help="for a busy machine: not the clock on the wall")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    clock = time.process_time if arguments.processor_time else time.perf_counter
    measure(arguments.size, arguments.batch, arguments.repeats, clock)

"""A U-Net's train step and forward pass here and in diffusers, with the same weights and batch.

    python -m tests.benchmarks.unet_step --size demo --batch 32 --repeats 7 --threads 2
    python -m tests.benchmarks.unet_step --size wide --batch 8 --compile contiguous --bfloat16

Every contender runs once in each round, so that a busy machine slows all alike; medians, fastest and slowest are
printed, and the memory that a train step adds at its peak. Predictions are compared before anything is timed.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import re
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ldm.config import UNetConfig
from ldm.models.unet import UNet
from ldm.models.winograd import use_winograd
from tests.ldm.models import settings

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}
RES_BLOCK = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}


def sizes(name: str) -> UNetConfig:
    """The default job's network, or one with the 1.45B model's levels at 128 channels."""
    if name == "demo":
        return settings.read(UNetConfig, "unet", "openmoji")
    return replace(settings.read(UNetConfig, "unet", "txt2img_1p45b"), model_channels=128, context_dim=192)


def to_diffusers(key: str, n: int) -> str:
    """The name of a weight in diffusers' UNet2DConditionModel; n residual blocks in each level."""
    for ours, theirs in (("time_embed.0", "time_embedding.linear_1"), ("time_embed.2", "time_embedding.linear_2")):
        key = key.replace(ours, theirs)
    for ours, theirs in (("out.0", "conv_norm_out"), ("out.2", "conv_out"), ("input_blocks.0.0", "conv_in")):
        key = re.sub(rf"^{re.escape(ours)}\b", theirs, key)
    for ours, theirs in (("0", "resnets.0"), ("1", "attentions.0"), ("2", "resnets.1")):
        key = key.replace(f"middle_block.{ours}.", f"mid_block.{theirs}.")
    if match := re.match(r"(input|output)_blocks\.(\d+)\.(\d)\.(.*)", key):
        way, layer, rest = match[1], int(match[3]), match[4]
        level, i = divmod(int(match[2]) - (way == "input"), n + 1)
        kind = "resnets" if layer == 0 else "attentions"
        if rest.startswith(("op.", "conv.")):
            kind, i, rest = ("downsamplers" if way == "input" else "upsamplers"), 0, re.sub("^op", "conv", rest)
        key = f"{'down' if way == 'input' else 'up'}_blocks.{level}.{kind}.{i}.{rest}"
    for ours, theirs in RES_BLOCK.items():
        key = key.replace(f".{ours}.", f".{theirs}.")
    return key


def make_theirs(config: UNetConfig, ours: UNet) -> nn.Module:
    """diffusers' network with our weights; strict loading proves that every key was found."""
    from diffusers import UNet2DConditionModel

    widths = [config.model_channels * mult for mult in config.channel_mult]
    attends = [2**level in config.attention_resolutions for level in range(len(widths))]
    theirs = UNet2DConditionModel(
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        layers_per_block=config.num_res_blocks,
        block_out_channels=widths,
        down_block_types=["CrossAttnDownBlock2D" if attend else "DownBlock2D" for attend in attends],
        up_block_types=["CrossAttnUpBlock2D" if attend else "UpBlock2D" for attend in reversed(attends)],
        cross_attention_dim=config.context_dim,
        attention_head_dim=config.num_heads or [width // config.num_head_channels for width in widths],
        use_linear_projection=config.linear_projections,
        norm_num_groups=config.norm_groups,
    )
    theirs.load_state_dict({to_diffusers(k, config.num_res_blocks): v for k, v in ours.state_dict().items()})
    return theirs


def make_pair(config: UNetConfig) -> tuple[UNet, nn.Module]:
    """Ours and theirs with the same random weights, none of them zero."""
    torch.manual_seed(0)
    ours = UNet(config)
    for parameter in ours.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    return ours, make_theirs(config, ours)


@dataclass
class Contender:
    """One network in one form."""

    name: str
    network: nn.Module
    memory_format: torch.memory_format
    bfloat16: bool

    def predict(self, z_t: Tensor, t: Tensor, context: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16) if self.bfloat16 else nullcontext():
            prediction = self.network(z_t.contiguous(memory_format=self.memory_format), t, context)
        return (prediction if isinstance(prediction, Tensor) else prediction.sample).float()

    @torch.no_grad()
    def forward(self, *batch: Tensor) -> None:
        self.predict(*batch)

    def train_step(self, *batch: Tensor) -> None:
        """Forward and backward; the optimizer's share is the same for all and left out."""
        self.network.zero_grad()
        self.predict(*batch).square().mean().backward()


def make_contenders(config: UNetConfig, compiled: list[str], bfloat16: bool) -> list[Contender]:
    """Both networks in every memory format, ours with Winograd's convolutions too; in bfloat16 too if asked, and
    compiled in the memory formats named."""
    ours, theirs = make_pair(config)
    contenders = []
    for low in [False, True] if bfloat16 else [False]:
        precision = "bfloat16" if low else "float32"
        for layout, memory_format in FORMATS.items():
            forms = {"ours": ours, "diffusers": theirs}
            if layout == "channels_last" and not low:
                forms["ours, winograd"] = ours
            for name, network in forms.items():
                network = copy.deepcopy(network).to(memory_format=memory_format)
                if "winograd" in name:
                    use_winograd(network)
                name = f"{name}, {precision}, {layout}"
                contenders.append(Contender(name, network, memory_format, low))
                if layout in compiled and "winograd" not in name:
                    network = torch.compile(copy.deepcopy(network))
                    contenders.append(Contender(f"{name}, compiled", network, memory_format, low))
    return contenders


def check_equal(contenders: list[Contender], batch: tuple[Tensor, ...]) -> None:
    """Every prediction is that of the first: to 1e-4, in bfloat16 to what its 8 bits allow."""
    with torch.no_grad():
        expected = contenders[0].predict(*batch)
        for contender in contenders:
            bound = 0.1 if contender.bfloat16 else 1e-4
            torch.testing.assert_close(contender.predict(*batch), expected, rtol=bound, atol=bound)


def seconds(run: Callable[..., None], batch: tuple[Tensor, ...], clock: Callable[[], float]) -> float:
    start = clock()
    run(*batch)
    return clock() - start


def peak_megabytes(run: Callable[..., object], *batch: Tensor) -> float:
    """What a run adds to the process's memory at its peak (Linux)."""
    status = Path("/proc/self/status")
    ctypes.CDLL(None).malloc_trim(0)  # what earlier runs freed and the allocator kept would hide what this one takes
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak until now
    before = int(re.search(r"VmRSS:\s+(\d+)", status.read_text())[1])
    run(*batch)
    return (int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1]) - before) / 1024


def measure(
    config: UNetConfig,
    contenders: list[Contender],
    batch_size: int,
    side: int,
    repeats: int,
    clock: Callable[[], float],
) -> None:
    """Print a table of the contenders, and the ratio of the best of each kind at the same precision."""
    parameters = sum(parameter.numel() for parameter in contenders[0].network.parameters())
    batch = (
        torch.randn(batch_size, config.in_channels, side, side),
        torch.randint(0, 1000, (batch_size,)),
        torch.randn(batch_size, 77, config.context_dim),
    )
    print(f"{parameters:,} parameters, {batch_size} x {side} x {side} latents, {torch.get_num_threads()} threads")
    check_equal(contenders, batch)
    for task in ("train_step", "forward"):
        times: dict[str, list[float]] = {contender.name: [] for contender in contenders}
        for contender in contenders:
            getattr(contender, task)(*batch)
        for _ in range(repeats):
            for contender in contenders:
                times[contender.name].append(seconds(getattr(contender, task), batch, clock))
        print(f"{task}: median (fastest to slowest) of {repeats}")
        for contender in contenders:
            taken = times[contender.name]
            memory = f"  {peak_megabytes(contender.train_step, *batch):6.0f} MB" if task == "train_step" else ""
            spread = f"({min(taken):.3f} to {max(taken):.3f})"
            print(f"  {contender.name:48} {statistics.median(taken):7.3f} s {spread}{memory}")
        report_ratio(times)


def report_ratio(times: dict[str, list[float]]) -> None:
    """Best of diffusers over best of ours, by median and by fastest, at each precision."""
    for precision in ("float32", "bfloat16"):
        named = {name: taken for name, taken in times.items() if precision in name}
        if named:
            ratios = []
            for figure in (statistics.median, min):
                best = {who: min(figure(v) for k, v in named.items() if k.startswith(who)) for who in ("ours", "diff")}
                ratios.append(best["diff"] / best["ours"])
            print(
                f"  {precision}: best of diffusers / best of ours {ratios[0]:.2f} by median, {ratios[1]:.2f} by fastest"
            )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=["demo", "wide"], default="demo", help="the default job's network, or wider")
    parser.add_argument("--channels", type=int, default=None, help="unet.model_channels in place of the size's own")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--side", type=int, default=16, help="of the latents")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--compile", nargs="*", choices=FORMATS, default=[], help="compiled contenders of these too: minutes more"
    )
    parser.add_argument("--bfloat16", action="store_true", help="bfloat16 autocast too: slow without hardware for it")
    parser.add_argument(
        "--clock", choices=CLOCKS, default="wall", help="processor: for a busy machine, with --threads 1"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    chosen = sizes(arguments.size)
    if arguments.channels is not None:
        chosen = replace(chosen, model_channels=arguments.channels)
    rivals = make_contenders(chosen, arguments.compile, arguments.bfloat16)
    measure(chosen, rivals, arguments.batch, arguments.side, arguments.repeats, CLOCKS[arguments.clock])

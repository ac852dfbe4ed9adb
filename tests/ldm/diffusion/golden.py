"""Numbers of the original implementation, and the small U-Net that some of them were computed with."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from ldm.config import UNetConfig
from ldm.diffusion.guidance import guided
from ldm.diffusion.schedule import Schedule, make_schedule
from ldm.models.unet import UNet
from tests.ldm import golden

UNET_TEXT = UNetConfig(
    in_channels=4, out_channels=4, model_channels=32, channel_mult=[1, 1, 1, 2], num_res_blocks=1,
    attention_resolutions=[4, 2, 1], num_heads=8, num_head_channels=None, transformer_depth=[1, 1, 1, 1],
    context_dim=48, cross_only_resolutions=[], linear_projections=False, qkv_order="head_first",
    scale_shift_norm=False, resblock_updown=False, num_classes=None, vector_dim=None, norm_groups=32, dropout=0.0,
)  # fmt: skip


class Case:
    """One case: its inputs and outputs by name, and how far from an output is still right."""

    def __init__(self, name: str) -> None:
        self.tensors, self.about = golden.load(name), golden.facts(name)

    def input(self, name: str) -> Tensor:
        return self.tensors[f"input/{name}"]

    def output(self, name: str) -> Tensor:
        return self.tensors[f"output/{name}"]

    def check(self, name: str, value: Tensor) -> None:
        """Raises if `value` is further from the output than the case's own tolerance."""
        tolerance = self.about["tolerance"][name]
        if tolerance.get("exact"):
            assert torch.equal(value, self.output(name)), name
            return
        torch.testing.assert_close(
            value, self.output(name), atol=tolerance["suggested_atol"], rtol=tolerance["suggested_rtol"],
            msg=lambda text: f"{name}: {text}",
        )  # fmt: skip


def released_schedule(timesteps: int = 1000) -> Schedule:
    """That of every sampler case."""
    return make_schedule("sqrt_linear", timesteps, 0.00085, 0.012, False)


@functools.cache
def unet() -> UNet:
    """The U-Net of the case unet_text, its weights frozen."""
    weights = golden.load("unet_text")
    net = UNet(UNET_TEXT)
    net.load_state_dict({key.removeprefix("weights/"): value.float() for key, value in weights.items()
                         if key.startswith("weights/")})  # fmt: skip
    return net.eval().requires_grad_(False)


def predictor(case: Case, guidance_scale: float = 1.0) -> Callable[[Tensor, Tensor], Tensor]:
    """The U-Net on a case's context."""

    def denoiser(z_t: Tensor, t: Tensor, condition: dict[str, Tensor]) -> Tensor:
        return unet()(z_t, t, **condition)

    condition = {"context": case.input("context")}
    null = {"context": case.input("unconditional_context")} if guidance_scale != 1 else {}
    return guided(denoiser, condition, null, guidance_scale)

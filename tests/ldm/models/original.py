"""The original's words for a U-Net -> UNetConfig, and its numbers, for tests."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ldm.config import UNetConfig
from tests.ldm import golden


def unet_config(params: dict[str, Any]) -> UNetConfig:
    """The configuration that an original YAML's `unet_config.params` describes."""
    levels = len(params["channel_mult"])
    depth = params.get("transformer_depth", 1)
    depths = depth if isinstance(depth, list) else [depth] * levels
    classes = params.get("num_classes")
    return UNetConfig(
        in_channels=params["in_channels"],
        out_channels=params["out_channels"],
        model_channels=params["model_channels"],
        channel_mult=params["channel_mult"],
        num_res_blocks=params["num_res_blocks"],
        attention_resolutions=params["attention_resolutions"],
        num_heads=None if "num_head_channels" in params else params["num_heads"],
        num_head_channels=params.get("num_head_channels"),
        transformer_depth=depths if "context_dim" in params else None,
        context_dim=params.get("context_dim"),
        cross_only_resolutions=[],
        linear_projections=params.get("use_linear_in_transformer", False),
        qkv_order="qkv_first" if params.get("use_new_attention_order") else "head_first",
        scale_shift_norm=params.get("use_scale_shift_norm", False),
        resblock_updown=params.get("resblock_updown", False),
        num_classes=classes if isinstance(classes, int) else None,
        vector_dim=params.get("adm_in_channels"),
        norm_groups=32,
        dropout=0.0,
    )


class Golden:
    """One case: numbers that the original code computed, and how near one should come."""

    def __init__(self, name: str) -> None:
        self.values = golden.load(name)
        facts = golden.facts(name)
        self.params = facts["config"].get("params")
        self.settings = facts["config"].get("params_by_setting")
        self.tolerance = facts["tolerance"]

    def weights(self, prefix: str = "") -> dict[str, Tensor]:
        """The state dict, in float32; with a prefix, only what stands below it."""
        start = "weights/" + prefix
        return {k.removeprefix(start): v.float() for k, v in self.values.items() if k.startswith(start)}

    def input(self, name: str) -> Tensor | None:
        return self.values.get("input/" + name)

    def bounds(self, name: str) -> dict[str, float]:
        """Tolerances of an output, in the words of assert_close."""
        return {kind: self.tolerance[name][f"suggested_{kind}"] for kind in ("rtol", "atol")}

    def output(self, name: str) -> Tensor:
        return self.values["output/" + name]

"""Conditioners that read no text, against numbers of the original code."""

import pytest
import torch

from ldm.config import ClassEmbedderConfig, SpatialRescalerConfig
from ldm.models.blocks import embed_timestep
from ldm.models.conditioning import ClassEmbedder, SpatialRescaler, embed_numbers
from tests.ldm.models.original import Golden


def rescaler_config(params: dict) -> SpatialRescalerConfig:
    """Our settings for an original's, whose defaults are filled in."""
    return SpatialRescalerConfig(
        stages=params["n_stages"],
        method=params.get("method", "bilinear"),
        multiplier=params.get("multiplier", 0.5),
        in_channels=params.get("in_channels", 12),
        out_channels=params.get("out_channels"),
        bias=params.get("bias", False),
    )


def test_class_embeddings_equal_the_original() -> None:
    case = Golden("class_embedder")
    embedder = ClassEmbedder(ClassEmbedderConfig(case.params["n_classes"], case.params["embed_dim"]))
    embedder.load_state_dict(case.weights())
    context = embedder(case.input("class_label"))
    torch.testing.assert_close(context, case.output("embeddings"), **case.bounds("embeddings"))


@pytest.mark.parametrize("name", ["segmentation", "bicubic", "nearest_x2", "area"])
def test_rescaled_conditions_equal_the_original(name: str) -> None:
    case = Golden("spatial_rescaler")
    rescaler = SpatialRescaler(rescaler_config(case.settings[name]))
    rescaler.load_state_dict(case.weights(name + "."))
    torch.testing.assert_close(rescaler(case.input("image")), case.output(name), **case.bounds(name))


def test_released_sizes() -> None:
    def count(module: torch.nn.Module) -> int:
        return sum(parameter.numel() for parameter in module.parameters())

    assert count(ClassEmbedder(ClassEmbedderConfig(classes=1001, width=512))) == 512_512
    assert count(SpatialRescaler(rescaler_config({"n_stages": 2, "in_channels": 182, "out_channels": 3}))) == 546


def test_wrong_number_of_channels_is_refused() -> None:
    rescaler = SpatialRescaler(rescaler_config({"n_stages": 2, "in_channels": 182, "out_channels": 3}))
    with pytest.raises(ValueError, match=r"171 channels; spatial_rescaler\.in_channels is 182"):
        rescaler(torch.zeros(1, 171, 16, 16))


def test_numbers_are_embedded_one_after_the_other() -> None:
    sizes = torch.tensor([[512, 768, 0], [64, 1, 999]])
    embedded = embed_numbers(sizes)
    assert embedded.shape == (2, 3 * 256)
    torch.testing.assert_close(embedded[1, 512:], embed_timestep(sizes[1, 2:], 256)[0])

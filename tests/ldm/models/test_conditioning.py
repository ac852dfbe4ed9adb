"""Conditioners that read no text, against numbers of the original code."""

import pytest
import torch

from ldm.config import ClassEmbedderConfig, SpatialRescalerConfig
from ldm.models.blocks import embed_timestep
from ldm.models.conditioning import ClassEmbedder, SpatialRescaler, embed_numbers, layout_tokens
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


def test_layout_tokens() -> None:
    tokens = layout_tokens([(3, (0.0, 0.0, 0.5, 1.0)), (7, (0.5, 0.5, 0.5, 0.5))], (0, 0, 1, 1), 101, length=11)
    # a grid of 10 x 10: the corner (0.5, 1) is column round(4.5) = 4 of row 9; empty objects are 100
    assert tokens.tolist() == [3, 0, 94, 7, 44, 99, 100, 100, 100, 0, 99]


@pytest.mark.parametrize(
    ("objects", "message"),
    [
        ([(1, (0, 0, 1, 1))] * 31, r"31 objects; text_encoder\.length, 92, has room for 30"),
        ([(8191, (0, 0, 1, 1))], "from 0 to 8190"),
        ([(1, (0.5, 0, 0.6, 1))], r"\(0\.5, 0, 0\.6, 1\) leaves the picture"),
    ],
)
def test_layouts_that_have_no_tokens_are_refused(objects: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layout_tokens(objects, (0, 0, 1, 1), vocab_size=8192, length=92)

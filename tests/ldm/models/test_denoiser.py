"""The denoiser's contract: what a condition may hold, and what the U-Net is handed of it."""

import os
from dataclasses import replace

import pytest
import torch

from ldm.config import ClassEmbedderConfig, ClipTowerConfig, SpatialRescalerConfig, TextEncoderConfig
from ldm.models.denoiser import Denoiser, make_denoiser
from tests.ldm.models import settings
from tests.ldm.models.test_unet import tiny, trained

SEED = int(os.environ.get("LDM_TEST_SEED", 0))
Z_T, T = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(SEED)), torch.tensor([7, 900])


def text(**changes: object) -> TextEncoderConfig:
    small = settings.read(TextEncoderConfig, "text_encoder", "bytes_tiny")
    return replace(small, **{"length": 6, "width": 24, "layers": 1, "heads": 2, "head_width": 8, **changes})


def denoiser(*arguments: object, **more: object) -> Denoiser:
    return trained(make_denoiser(*arguments, **more)).requires_grad_(False)


@pytest.mark.parametrize("name", ["tokens", "layout"])
def test_tokens_become_context(name: str) -> None:
    model = denoiser(tiny(), text())
    tokens = torch.randint(0, 259, (2, 6))
    encoded = model.encode_condition({name: tokens})
    torch.testing.assert_close(encoded, {"context": model.text_encoder(tokens)})
    torch.testing.assert_close(model(Z_T, T, {name: tokens}), model(Z_T, T, encoded), rtol=0, atol=0)
    torch.testing.assert_close(model(Z_T, T, encoded), model.unet(Z_T, T, encoded["context"]), rtol=0, atol=0)
    assert not torch.equal(model(Z_T, T, encoded), model(Z_T, T, {name: (tokens + 1) % 259}))


def test_what_is_encoded_already_stays() -> None:
    model = denoiser(tiny(), text())
    context = torch.randn(2, 5, 24)
    model.text_encoder.register_forward_hook(lambda *_: pytest.fail("the text encoder ran"))
    encoded = model.encode_condition({"tokens": torch.zeros(2, 6, dtype=torch.int64), "context": context})
    assert list(encoded) == ["context"] and encoded["context"] is context


def test_class_label_becomes_context_or_goes_to_the_unet() -> None:
    label = torch.tensor([3, 10])
    model = denoiser(tiny(), None, ClassEmbedderConfig(classes=11, width=24))
    encoded = model.encode_condition({"class_label": label})
    assert encoded["context"].shape == (2, 1, 24) and list(model.encode_condition(encoded)) == ["context"]
    assert model(Z_T, T, {"class_label": label}).shape == Z_T.shape
    direct = denoiser(tiny(transformer_depth=None, context_dim=None, num_classes=11), None)
    assert not torch.equal(direct(Z_T, T, {"class_label": label}), direct(Z_T, T, {"class_label": label.flip(0)}))


def test_segmentation_becomes_concat() -> None:
    rescaler = SpatialRescalerConfig(
        stages=2, method="bilinear", multiplier=0.5, in_channels=12, out_channels=3, bias=False
    )
    unet = tiny(in_channels=7, transformer_depth=None, context_dim=None)
    model = denoiser(unet, None, spatial_rescaler=rescaler)
    segmentation = torch.randn(2, 12, 32, 32)
    encoded = model.encode_condition({"segmentation": segmentation})
    assert encoded["concat"].shape == (2, 3, 8, 8)
    torch.testing.assert_close(model(Z_T, T, encoded), model(Z_T, T, {"segmentation": segmentation}), rtol=0, atol=0)


def test_sizes_and_the_pooled_output_become_the_vector() -> None:
    tower = ClipTowerConfig(
        width=24, layers=2, heads=2, activation="gelu", skip_layers=1, final_norm=False, projection=16, pad=0
    )
    clip = text(kind="clip", vocab_size=100, length=7, towers={"g": tower}, layers=None, heads=None, head_width=None)
    model = denoiser(tiny(vector_dim=16 + 6 * 256), clip)
    condition = {"tokens": torch.randint(1, 99, (2, 7)), "sizes": torch.tensor([[512, 512, 0, 0, 512, 512]] * 2)}
    encoded = model.encode_condition(condition)
    assert encoded["context"].shape == (2, 7, 24) and encoded["vector"].shape == (2, 16 + 6 * 256)
    torch.testing.assert_close(encoded["vector"][:, :16], model.text_encoder.encode(condition["tokens"])[1])
    assert model(Z_T, T, condition).shape == Z_T.shape


def test_nothing_at_all_is_a_condition_too() -> None:
    model = denoiser(tiny(transformer_depth=None, context_dim=None), None)
    assert model(Z_T, T, {}).shape == Z_T.shape


def test_a_condition_that_nothing_reads_is_refused() -> None:
    model = denoiser(tiny(transformer_depth=None, context_dim=None), None)
    with pytest.raises(ValueError, match=r"holds \['tokens'\]; this model reads \['context'"):
        model(Z_T, T, {"tokens": torch.zeros(2, 6, dtype=torch.int64)})


def test_an_encoder_of_another_width_is_refused() -> None:
    with pytest.raises(ValueError, match=r"text_encoder\.width is 32.*unet\.context_dim is 24"):
        make_denoiser(tiny(), text(width=32))
    with pytest.raises(ValueError, match=r"class_embedder\.width is 32.*unet\.context_dim is 24"):
        make_denoiser(tiny(), None, ClassEmbedderConfig(classes=2, width=32))


def test_gradients_reach_the_text_encoder() -> None:
    model = trained(make_denoiser(tiny(), text()))
    model(Z_T, T, {"tokens": torch.randint(0, 259, (2, 6))}).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())

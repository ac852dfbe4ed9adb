"""torch.compile takes the whole denoiser as one graph: a break in it would cost a GPU its wait at every step."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ldm.models.attention import AttentionBlock, SpatialTransformer
from ldm.models.blocks import ResBlock, checkpoint_activations
from ldm.models.denoiser import make_denoiser
from tests.ldm.training.tiny import TEXT_ENCODER, UNET


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_denoiser_is_one_graph(checkpointing: bool) -> None:
    torch.manual_seed(0)
    denoiser = make_denoiser(replace(UNET, dropout=0.0), TEXT_ENCODER)
    inputs = torch.randn(2, 2, 4, 4), torch.tensor([3, 500]), {"tokens": torch.randint(0, 259, (2, 12))}
    with torch.no_grad():
        expected = denoiser(*inputs)
    if checkpointing:
        checkpoint_activations(denoiser, (ResBlock, SpatialTransformer, AttentionBlock))
    denoiser.compile(fullgraph=True, backend="eager")  # refuses what is not one graph
    found = denoiser(*inputs)
    found.sum().backward()
    torch.testing.assert_close(found, expected)

"""The codebook: nearest codes, in any precision, and where the gradients go."""

import os

import torch

from ldm.models import quantize
from ldm.models.quantize import Codebook, codebook_loss, straight_through

SEED = int(os.environ.get("LDM_TEST_SEED", 0))


def make(codes: int = 50, channels: int = 3) -> tuple[Codebook, torch.Tensor]:
    generator = torch.Generator().manual_seed(SEED)
    codebook = Codebook(codes, channels)
    torch.nn.init.normal_(codebook.embedding.weight, generator=generator)
    return codebook, torch.randn(2, channels, 5, 7, generator=generator)


def test_indices_are_those_of_the_nearest_codes() -> None:
    codebook, z = make()
    rows = z.double().permute(0, 2, 3, 1).reshape(-1, 3)
    distances = torch.cdist(rows, codebook.embedding.weight.double())
    assert torch.equal(codebook.indices(z), distances.argmin(1).view(2, 5, 7))


def test_codes_are_their_own_nearest_and_keep_their_places() -> None:
    codebook, _ = make(35)
    indices = torch.randperm(35, generator=torch.Generator().manual_seed(SEED)).view(1, 5, 7)
    z = codebook.entries(indices)
    assert torch.equal(codebook.indices(z), indices)
    assert torch.equal(z[0, :, 2, 3], codebook.embedding.weight[indices[0, 2, 3]])
    assert torch.equal(codebook(z), z)


def test_large_codebooks_are_searched_in_chunks(monkeypatch) -> None:
    codebook, z = make()
    whole = codebook.indices(z)
    for pairs in (1, 50 * 8):
        monkeypatch.setattr(quantize, "PAIRS", pairs)
        assert torch.equal(codebook.indices(z), whole)


def test_half_precision_elsewhere_does_not_change_the_codes() -> None:
    codebook, z = make(4096)
    exact = codebook.indices(z)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(codebook.indices(z), exact)
        rows = z.permute(0, 2, 3, 1).reshape(-1, 3)
        weight = codebook.embedding.weight
        careless = (weight.square().sum(1) - 2 * rows @ weight.T).argmin(1).view(2, 5, 7)
    assert not torch.equal(careless, exact)


def test_gradients_go_straight_through() -> None:
    codebook, z = make()
    z.requires_grad_()
    rounded = straight_through(z, codebook(z))
    torch.testing.assert_close(rounded, codebook(z))
    factor = torch.randn_like(z)
    (rounded * factor).sum().backward()
    assert torch.equal(z.grad, factor)
    assert codebook.embedding.weight.grad is None


def test_beta_weighs_the_encoder_and_in_the_released_models_the_codes() -> None:
    z, codes = torch.tensor([1.0], requires_grad=True), torch.tensor([3.0], requires_grad=True)
    for legacy, expected in ((False, (-0.25 * 4, 4.0)), (True, (-4.0, 0.25 * 4))):
        loss = codebook_loss(z, codes, beta=0.25, legacy=legacy)
        assert loss.item() == 5.0
        assert tuple(g.item() for g in torch.autograd.grad(loss, (z, codes))) == expected

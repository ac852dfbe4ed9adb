"""What training draws its sample grids with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ldm.models import autoencoder as models
from pipelines.stages.train import decoder
from tests.pipelines.stages.small_run import autoencoder, latents, make_job


def test_the_autoencoder_is_loaded_once_by_who_draws_and_by_nobody_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[Any] = []

    def load(*what: Any, load: Any = models.load_autoencoder) -> Any:
        loaded.append(what)
        return load(*what)

    monkeypatch.setattr(models, "load_autoencoder", load)
    decode = decoder(make_job(tmp_path, "train", {"autoencoder": autoencoder(tmp_path)}, {}))
    assert not loaded
    first, second = (decode(latents()[:2]) for _ in range(2))
    assert len(loaded) == 1 and torch.equal(first, second) and first.shape == (2, 3, 64, 64)

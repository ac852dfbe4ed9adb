"""The stage precompute_latents on a device that has no memory for more than two pictures at once."""

from __future__ import annotations

import torch
from torch import Tensor

from ldm.encode import Encoder
from pipelines.dag import Job
from pipelines.stages import precompute_latents


class SmallEncoder(Encoder):
    job: Job

    def _forward(self, image: Tensor) -> Tensor:
        if len(image) > 2:
            (self.job.output / "refused").touch()
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return super()._forward(image)


class Worker(precompute_latents.Worker):
    def __init__(self, job: Job) -> None:
        super().__init__(job)
        SmallEncoder.job = job
        self.encoder.__class__ = SmallEncoder

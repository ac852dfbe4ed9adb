"""What a GPU may do for speed, and what equal bits cost. Nothing that is set here changes a processor's arithmetic."""

from __future__ import annotations

import os

import torch

from ldm.config import TrainingConfig


def choose_arithmetic(training: TrainingConfig) -> None:
    """Sets this process up as a training wants it, before anything is computed.

    float32 is float32: torch would round what convolutions multiply to TF32's ten bits. At other precisions so is what
    stays float32, matrices too. Unless equal runs must give equal bits, cuDNN tries its convolutions for each shape.
    """
    products = "ieee" if training.precision == "float32" else "tf32"
    torch.backends.cuda.matmul.fp32_precision = products
    torch.backends.cudnn.conv.fp32_precision = products
    torch.backends.cudnn.benchmark = not training.deterministic
    if training.deterministic and torch.cuda.is_available():  # on a processor equal runs are equal anyway
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)

"""What the server of processes.py imports before it forks: also what torch and DeepSpeed import when first used."""

import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: E402, F401
import deepspeed.runtime.zero.stage3  # noqa: E402, F401
import open_clip.tokenizer  # noqa: E402, F401
import torch._dynamo  # noqa: E402, F401

import ldm.training.engine  # noqa: E402, F401

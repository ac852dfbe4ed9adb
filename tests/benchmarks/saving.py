"""How long a step waits for a checkpoint, and how long writing it takes beside the next ones.

    python -m tests.benchmarks.saving [MILLIONS_OF_PARAMETERS]

One process; weights and optimizer states in float32, and the averaged weights: 16 bytes a parameter.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import torch

from ldm.training.checkpoint import KINDS, Stretch
from ldm.training.saving import Saving


def main() -> None:
    millions = int(sys.argv[1]) if len(sys.argv) > 1 else 100
    pieces = [torch.randn(1_000_000) for _ in range(millions)]
    stretches = [Stretch(f"w{i}", 0, {kind: x for kind in KINDS}) for i, x in enumerate(pieces)]
    ema = {f"w{i}": x for i, x in enumerate(pieces)}
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as home:
        for n in range(1, 4):
            began = time.perf_counter()
            saving = Saving(Path(home), n, stretches=stretches, ema=ema, config={}, facts={})
            held = time.perf_counter() - began
            while not saving.is_written():
                time.sleep(0.001)
            written = time.perf_counter() - began
            saving.commit()
            committed = time.perf_counter() - began
            print(
                f"{millions} M parameters, {millions * 16e-3:.1f} GB: a step waits {held:.2f} s to copy them and "
                f"{1000 * (committed - written):.0f} ms to commit; they are written after {written:.2f} s"
            )


if __name__ == "__main__":
    main()

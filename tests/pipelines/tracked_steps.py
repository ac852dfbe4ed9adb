"""Steps that tell of themselves, and a driver beside them that sends, as under Ray.

Fifty of them are real ones, of the default job's model: what telling takes is held against these.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from pipelines.journal import Journal, journal_path

MIB = 1 << 20
GRIDS = 50
MICRO_BATCH = 2  # of the default job's 16: a step as short as they get

DRIVER = """
import json, sys, time
from pathlib import Path
from pipelines.settings import TrackingConfig
from pipelines.shipping.shipper import unsent_bytes
from pipelines.tracking import Tracker

def resident():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024

folder = Path(sys.argv[1])
output = folder / "demo"
tracker = Tracker.open(TrackingConfig(True, f"sqlite:///{folder}/mlflow.db", "many", 1.0, 600.0), output)
with tracker.stage("warm") as warm:  # what MLflow loads, it loads now
    for step in range(100):
        warm.metrics({f"m{i}": float(step) for i in range(30)}, step)
    warm.image("grid", folder / "grid-0.png", 0)
    while unsent_bytes(output):
        time.sleep(0.2)
with tracker.stage("train"):
    before = resident()
    (folder / "ready").touch()
    while not (folder / "over").exists():
        time.sleep(0.2)
began = time.monotonic()
left = tracker.close()
print(json.dumps({"left": left, "seconds": time.monotonic() - began, "grew": resident() - before}))
"""


@dataclass(frozen=True)
class Figures:
    step_seconds: float  # median, without what telling takes
    tell_seconds: float  # mean
    tell_p99_seconds: float
    share: float  # of a step
    waiting_bytes: int  # on disk, at most
    flush_seconds: float  # that the end waited for what was not sent yet
    driver_grew_bytes: int  # of memory, at most
    left_bytes: int

    def __str__(self) -> str:
        return (
            f"a step {1e3 * self.step_seconds:.1f} ms, telling of it {1e3 * self.tell_seconds:.3f} ms (p99 "
            f"{1e3 * self.tell_p99_seconds:.2f} ms), {self.share:.3%} of it; on disk {self.waiting_bytes / MIB:.2f} MiB"
            f" waited at most, the driver grew by {self.driver_grew_bytes / MIB:.1f} MiB; all sent "
            f"{self.flush_seconds:.0f} s after the last step, {self.left_bytes} bytes left"
        )


def tracked_steps(folder: Path, steps: int) -> Figures:
    """30 metrics of each step, and of some a grid, into a database in `folder`."""
    from pipelines.shipping.shipper import unsent_bytes

    noise = np.random.default_rng(0).integers(0, 255, (256, 256, 3), np.uint8)
    Image.fromarray(noise).save(folder / "grid-0.png")
    driver = subprocess.Popen([sys.executable, "-c", DRIVER, str(folder)], stdout=subprocess.PIPE, text=True)
    try:
        train = training_step()
        while not (folder / "ready").exists():
            assert driver.poll() is None, "the driver ended"
            time.sleep(0.1)
        journal, spent, told, waiting = Journal(journal_path(folder / "demo", "train", "rank0")), [], [], 0
        for step in range(1, steps + 1):
            real = step % (steps // GRIDS) == 0
            begin = time.perf_counter()
            if real:
                train()
                spent.append(time.perf_counter() - begin)
            else:
                time.sleep(0.01)
            begin = time.perf_counter()
            journal.metrics({f"m{i}": float(step) for i in range(30)}, step)
            if real:
                journal.image("grid", folder / "grid-0.png", step)
            told.append(time.perf_counter() - begin)
            if step % 100 == 0:
                waiting = max(waiting, unsent_bytes(folder / "demo"))
        (folder / "over").touch()
        end = json.loads(driver.communicate(timeout=700)[0])
    finally:
        driver.kill()
    return Figures(
        float(np.median(spent)), float(np.mean(told)), float(np.quantile(told, 0.99)),
        float(np.mean(told) / np.median(spent)), waiting, end["seconds"], end["grew"], end["left"],
    )  # fmt: skip


def training_step() -> Callable[[], None]:
    """One optimizer step of the default job's denoiser on a few latents."""
    import torch

    from ldm.models.denoiser import make_denoiser
    from pipelines.config import compose

    torch.set_num_threads(1)
    config = compose([])
    denoiser, c = make_denoiser(config.unet, config.text_encoder), config.unet.out_channels
    optimizer = torch.optim.AdamW(denoiser.parameters())
    z_t, t = torch.randn(MICRO_BATCH, c, 16, 16), torch.randint(0, 1000, (MICRO_BATCH,))
    tokens = torch.randint(0, 100, (MICRO_BATCH, config.text_encoder.length))

    def step() -> None:
        denoiser(z_t, t, {"tokens": tokens}).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(5):
        step()
    return step

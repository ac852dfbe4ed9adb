"""What tracking costs a training step, and that nothing is lost: M1 to M3, on the real MLflow.

    python -m tests.benchmarks.tracking

M1: 500 steps while the server refuses, hangs or answers 500 (goal: 99 of 100 steps wait less than 50 ms).
M2: 2,000 steps of 30 metrics and 50 grids of pictures into a database (goal: under 2% of a step of 100 ms).
M3: eight runs at once into one database, then into one server over one (goal: every point there once).
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from pipelines.settings import TrackingConfig
from pipelines.shipping.shipper import unsent_bytes
from pipelines.tracking import Tracker
from tests.pipelines.mlflow_server import MlflowServer, points, run_together, runs_of, unhelpful_server

STEP_SECONDS = 0.1


def settings(uri: str, flush: float) -> TrackingConfig:
    return TrackingConfig(True, uri, "benchmark", interval_seconds=1.0, flush_seconds=flush)


def away(folder: Path) -> None:
    for kind in ("refuses", "hangs", "answers 500"):
        with unhelpful_server(kind) as (uri, _):
            tracker, seconds = Tracker.open(settings(uri, 1.0), folder / kind), []
            with tracker.stage("train") as run:
                for step in range(500):
                    begin = time.perf_counter()
                    run.metrics({f"m{i}": 1.0 for i in range(30)}, step)
                    seconds.append(time.perf_counter() - begin)
                    time.sleep(0.01)
            tracker.close()
        print(f"M1  a server that {kind:<12} p99 {1e3 * np.quantile(seconds, 0.99):.2f} ms, "
              f"longest {1e3 * max(seconds):.2f} ms")  # fmt: skip


def many(folder: Path) -> None:
    output, uri = folder / "many", f"sqlite:///{folder}/many.db"
    picture = output / "grid.png"
    output.mkdir()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (256, 256, 3), np.uint8)).save(picture)
    tracker, seconds, waiting = Tracker.open(settings(uri, 300.0), output), [], 0
    with tracker.stage("train") as run:
        for step in range(2000):
            begin = time.perf_counter()
            run.metrics({f"m{i}": float(step) for i in range(30)}, step)
            if step % 40 == 0:
                run.image("grid", picture, step)
            seconds.append(time.perf_counter() - begin)
            waiting = max(waiting, unsent_bytes(output)) if step % 100 == 0 else waiting
            time.sleep(0.01)
    began = time.perf_counter()
    left = tracker.close()
    print(f"M2  {1e3 * np.mean(seconds):.3f} ms a step, {np.mean(seconds) / STEP_SECONDS:.2%} of {STEP_SECONDS} s; p99 "
          f"{1e3 * np.quantile(seconds, 0.99):.2f} ms; {waiting / 1e6:.1f} MB waited at most, on disk; sent "
          f"{time.perf_counter() - began:.0f} s after the last step, {left} bytes left")  # fmt: skip


def together(folder: Path) -> None:
    steps, place = 500, folder / "together"
    place.mkdir()
    with MlflowServer(place, workers=2) as server:
        server.start()
        server.wait()
        for name, uri in (("file", f"sqlite:///{place}/together.db"), ("server", server.uri)):
            began, runs = time.monotonic(), [place / name / f"run{i}" for i in range(8)]
            left = run_together(uri, runs, steps)
            seconds = time.monotonic() - began
            found = [points(uri, runs_of(uri, output)["train"], "loss") for output in runs]
            whole = sum(each == [(step, float(step)) for step in range(steps)] for each in found)
            print(f"M3  {whole} of 8 runs at once, on one {name}, have all {steps} points once, in order; {left} left; "
                  f"{seconds:.0f} s")  # fmt: skip
        print(f"    answers of the server by status: {dict(server.answers())}")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        away(Path(place))
        many(Path(place))
        together(Path(place))

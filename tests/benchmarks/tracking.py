"""What tracking costs a training step, and that nothing is lost: M1 to M3, on the real MLflow.

    python -m tests.benchmarks.tracking

M1: 500 steps while the server refuses, hangs or answers 500 (goal: 99 of 100 steps wait less than 50 ms).
M2: 2,000 steps of 30 metrics and 50 grids into a database (goal: under 2% of a step, under 64 MB for what waits).
M3: eight runs at once into one database, then into one server over one (goal: every point there once, no 5xx).
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import numpy as np

from pipelines.settings import TrackingConfig
from pipelines.tracking import Tracker
from tests.pipelines.mlflow_server import MlflowServer, points, run_together, runs_of, unhelpful_server
from tests.pipelines.tracked_steps import tracked_steps


def away(folder: Path) -> None:
    for kind in ("refuses", "hangs", "answers 500"):
        with unhelpful_server(kind) as (uri, _):
            tracker = Tracker.open(TrackingConfig(True, uri, "benchmark", 1.0, 1.0), folder / kind)
            seconds = []
            with tracker.stage("train") as run:
                for step in range(500):
                    begin = time.perf_counter()
                    run.metrics({f"m{i}": 1.0 for i in range(30)}, step)
                    seconds.append(time.perf_counter() - begin)
                    time.sleep(0.01)
            tracker.close()
        print(f"M1  a server that {kind:<12} p99 {1e3 * np.quantile(seconds, 0.99):.2f} ms, "
              f"longest {1e3 * max(seconds):.2f} ms")  # fmt: skip


def together(folder: Path) -> None:
    steps = 500
    with MlflowServer(folder, workers=2) as server:
        server.start()
        server.wait()
        for name, uri in (("file", f"sqlite:///{folder}/together.db"), ("server", server.uri)):
            began, runs = time.monotonic(), [folder / name / f"run{i}" for i in range(8)]
            left = run_together(uri, runs, steps)
            seconds = time.monotonic() - began
            found = [points(uri, runs_of(uri, output)["train"], "loss") for output in runs]
            whole = sum(each == [(step, float(step)) for step in range(steps)] for each in found)
            print(f"M3  {whole} of 8 runs at once, on one {name}, have all {steps} points once, in order; {left} left; "
                  f"{seconds:.0f} s")  # fmt: skip
        print(f"    answers of the server by status: {dict(server.answers())}")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        folders = {name: Path(place) / name for name in ("away", "many", "together")}
        for folder in folders.values():
            folder.mkdir()
        away(folders["away"])
        print(f"M2  {tracked_steps(folders['many'], steps=2000)}")
        together(folders["together"])

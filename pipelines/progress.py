"""What the terminal shows while stages run: a line for each now and then, read from the run's journals.

    08:24:31  download             4 of 6 shards, 123 samples of 228 rows
    08:26:05  train                step 340 of 1600, loss 0.472, 66 samples/s
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipelines.journal import journal_paths, read_entries

EVERY_SECONDS = 10.0


@contextmanager
def following(run_folder: Path, goals: Mapping[str, int]) -> Iterator[None]:
    """Prints how far the stages are, while the block runs and once at its end.

    `goals`: of each stage the shards that it has to make, or the training steps to reach; else 0.
    """
    lines = [Line(run_folder, stage, goal) for stage, goal in goals.items()]
    over = threading.Event()

    def follow() -> None:
        while not over.wait(EVERY_SECONDS):
            show(lines)

    thread = threading.Thread(target=follow, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        show(lines)


def show(lines: list[Line]) -> None:
    for line in lines:
        if text := line.news():
            print(f"{time.strftime('%H:%M:%S')}  {line.stage:<20} {text}", flush=True)


class Line:
    """How far one stage is, from what its journals say after this moment."""

    def __init__(self, run_folder: Path, stage: str, goal: int) -> None:
        self.run_folder, self.stage, self.goal = run_folder, stage, goal
        self.offsets = {path: path.stat().st_size for path in journal_paths(run_folder, stage)}
        self.shards = self.samples = self.rows = 0

    def news(self) -> str:
        """What came since the last call, in words; empty when nothing did."""
        text = ""
        for path in journal_paths(self.run_folder, self.stage):
            entries, self.offsets[path] = read_entries(path, self.offsets.get(path, 0))
            for entry in entries:
                if entry["kind"] == "metrics":
                    text = self._in_words(entry["step"], entry["values"]) or text
        return text

    def _in_words(self, step: int | None, values: dict[str, Any]) -> str:
        if "data/rows" in values:
            self.shards += 1
            self.samples += int(values["data/samples"])
            self.rows += int(values["data/rows"])
            return f"{self.shards} of {self.goal} shards, {self.samples} samples of {self.rows} rows"
        if "loss" in values:
            speed = f", {values['samples_per_second']:.0f} samples/s" if "samples_per_second" in values else ""
            return f"step {step} of {self.goal}, loss {values['loss']:.3f}{speed}"
        return ""

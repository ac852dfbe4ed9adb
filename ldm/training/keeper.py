"""The checkpoints of a run: at most one is under way, written while training goes on, until all processes commit it."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ldm.config import TrainingRunConfig
from ldm.training.checkpoint import Tell
from ldm.training.copies import Copier
from ldm.training.keeping import retain
from ldm.training.saving import Saving
from ldm.training.together import by_first

LogCheckpoints = Callable[[], None]  # those in the folder may be others than before


class Keeper:
    """Begins checkpoints, commits them and removes those whose place they take; all processes call it alike."""

    def __init__(
        self, output: Path, run: TrainingRunConfig, copier: Copier, tell: Tell | None, log_checkpoints: LogCheckpoints
    ) -> None:
        self.output, self.run, self.copier, self.tell, self.log_checkpoints = output, run, copier, tell, log_checkpoints
        self._saving: Saving | None = None
        self._began = time.monotonic()

    def is_late(self) -> bool:
        """Whether it is long ago, by this process's clock, that a checkpoint was begun."""
        seconds = self.run.checkpoint_every_seconds
        return seconds is not None and time.monotonic() - self._began >= seconds

    def is_written(self) -> bool:
        """Whether this process has done its part of the one under way."""
        return self._saving is not None and self._saving.is_written()

    def begin(self, step: int, **held: Any) -> None:
        self._saving, self._began = Saving(self.output, step, **held), time.monotonic()

    def settle(self, tidy: bool = True) -> None:
        """Commits the one under way, if any; not `tidy`: what has to go for it stays until the next."""
        if self._saving is None:
            return
        self._saving.commit()
        self._saving = None
        by_first(lambda: self._keep(tidy))

    def _keep(self, tidy: bool) -> None:
        """It is told of before others go for it, which takes as long as they are large."""
        self.log_checkpoints()
        if tidy:
            run = self.run
            with self.copier.standing_still() as under_way:
                retain(self.output, run.keep_checkpoints, run.keep_every_steps, run.keep_best, self.tell, under_way)
            self.log_checkpoints()
        self.copier.look()

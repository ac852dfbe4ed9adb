"""How many files training may open: all that the system allows, and a refusal where that is too few."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

from ldm.training.loader import OTHER_FILES
from tests.ldm.training import processes
from tests.ldm.training.test_train import work
from tests.ldm.training.tiny import RUN, settings, write_data

FILES = resource.RLIMIT_NOFILE


def limited(most: int, *given: Any) -> tuple[Any, tuple[int, int]]:
    """(what training said, the limits after it) where a shell gave 128 of `most` files."""
    resource.setrlimit(FILES, (128, most))
    try:
        said = work(*given)["step"]
    except ValueError as error:
        said = str(error)
    return said, resource.getrlimit(FILES)


def test_training_takes_all_the_files_it_may_open_and_says_so_where_they_are_too_few(tmp_path: Path) -> None:
    data = write_data(tmp_path, [4] * 6)
    given = (
        settings(max_steps=1, warmup_steps=0, held_out_shards=1, validation_samples=8),
        data,
        tmp_path / "train",
        RUN,
    )
    needed = OTHER_FILES + 6  # two lanes could open more shards than there are
    ((said, limits),) = processes.run(limited, needed - 1, *given)
    assert said == (
        f"training may have {needed} files open at once, {OTHER_FILES} of them no shards, and this system allows a "
        f"process {needed - 1} (ulimit -Hn); raise that, or start a new run with lower training.lanes or window_shards"
    )
    assert processes.run(limited, needed, *given) == [(1, (needed, needed))]

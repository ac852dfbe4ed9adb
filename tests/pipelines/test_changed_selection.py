"""A selection that changes downloads and encodes nothing: requests, calls and files are counted."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ldm.images import encode_png
from pipelines.config import Config
from pipelines.dag import Dag, StaleError
from pipelines.run import _close
from pipelines.stages import download, filter_images, precompute_latents, train
from tests.pipelines.test_extend import address, config_of, finish, write
from tests.pipelines.unkind_server import Unkind

__all__ = ["address"]  # a fixture
SMALL = ["resolution=32", "batch_size=4", "check_samples=2", "min_psnr=3.0"]
ROWS = 12


def make(config: Config, address: str) -> Dag:
    """What the command does for the data half: whatever is missing, and nothing else."""
    dag = finish(config, address)
    for stage, module in (("filter_images", filter_images), ("precompute_latents", precompute_latents)):
        status = dag.refresh(stage)
        if status.job.output.read_plan() is None:
            status.job.output.write_plan(dag.plan(stage))
        worker = module.Worker(status.job) if status.todo else None
        for shard in status.todo:
            worker.run_shard(shard)
        assert _close(dag, stage)
    return dag


def files(folder: Path) -> dict[str, tuple[int, int]]:
    """Which file every name stands for, and when it was written last."""
    return {str(path): (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.rglob("*")
            if path.is_file() and "train" not in path.parts}  # fmt: skip


@pytest.fixture
def pictures(monkeypatch: pytest.MonkeyPatch, address: str) -> str:
    """An address whose every picture is another one; the last two are drawn alike."""

    def on_good(self: Unkind) -> None:
        number = min(int(self.path.partition("?")[2]), ROWS - 2)
        y, x = np.mgrid[0:120, 0:130] / 20.0
        waves = [np.sin(x * (1 + number % 4) + channel) + np.cos(y * (1 + number // 4)) for channel in range(3)]
        self.answer(200, encode_png(np.uint8(127.5 + 60 * np.stack(waves, -1))))

    monkeypatch.setattr(Unkind, "on_good", on_good)
    return address


def test_a_changed_selection_downloads_and_encodes_nothing(
    tmp_path: Path, pictures: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = Counter[str]()

    def counted(owner: Any, name: str, what: str) -> None:
        work = getattr(owner, name)

        def counting(*given: Any) -> Any:
            calls[what] += 1
            return work(*given)

        monkeypatch.setattr(owner, name, counting)

    counted(download, "run_shard", "download")
    counted(filter_images.Worker, "run_shard", "filter_images")
    counted(precompute_latents.Worker, "run_shard", "precompute_latents")
    write(tmp_path, "part-0", [f"good?{i}" for i in range(ROWS)])

    def config(*rules: str) -> Config:
        given = [f"dataset.precompute_latents.{setting}" for setting in SMALL]
        return config_of(tmp_path, *given, *(f"dataset.selection.{rule}" for rule in rules))

    def used(name: str, *rules: str) -> int:
        """What train's preparation lets through; in a run of its own that reads the data half of the first one."""
        reused = ", ".join(f"{stage}: openmoji" for stage in
                           ("filter_metadata", "download", "filter_images", "precompute_latents"))  # fmt: skip
        given = [f"dataset.precompute_latents.{setting}" for setting in SMALL]
        dag = make(config_of(tmp_path, *given, f"name={name}", f"paths.reuse={{{reused}}}",
                             *(f"dataset.selection.{rule}" for rule in rules)), pictures)  # fmt: skip
        job = dag.refresh("train").job
        job.output.write_plan(dag.plan("train"))
        return train.prepare(job).used

    make(config(), pictures)
    before, requests, made = files(tmp_path / "outputs"), Unkind.hits.total(), calls.copy()
    assert requests >= ROWS and made == dict.fromkeys(("download", "filter_images", "precompute_latents"), 3)

    everything = ("exact_duplicates=false", "near_duplicate_bits=null")
    assert used("a", *everything) == ROWS
    assert used("b", "near_duplicate_bits=null") == ROWS - 1
    assert used("c", *everything, "thresholds={original_width: [null, 99]}") == 0
    assert used("d", *everything, "top_score=phash", "top_percent=50") == ROWS // 2
    make(config("near_duplicate_bits=null"), pictures)
    assert files(tmp_path / "outputs") == before and Unkind.hits.total() == requests and calls == made

    # The sabotage twin: what does decide a picture is not taken as it lies.
    with pytest.raises(StaleError, match="dataset.download.encode_quality: 95 there, 90 now"):
        make(config_of(tmp_path, "dataset.download.encode_quality=90"), pictures)
    make(config_of(tmp_path, f"paths.outputs={tmp_path}/other", *(f"dataset.precompute_latents.{s}" for s in SMALL)),
         pictures)  # fmt: skip
    assert Unkind.hits.total() >= requests + ROWS and calls == {stage: 6 for stage in made}

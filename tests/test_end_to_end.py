"""The whole DAG in miniature on its real parts: URLs go in, pictures come out; twice, and killed in every stage."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipelines.config import CONF
from pipelines.dag import STAGES
from pipelines.lock import lock

ROOT = CONF.parent
DAG = [stage for stage in STAGES if stage != "train_autoencoder"]


def start(outputs: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "pipelines.run", "+experiment=smoke", f"paths.outputs={outputs}", *arguments]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def run(outputs: Path, *arguments: str) -> str:
    process = start(outputs, *arguments)
    text, _ = process.communicate(timeout=280)
    assert process.returncode == 0, text
    return text


def processor_seconds() -> float:
    """What the commands that have ended took, and they alone, however busy the machine is."""
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    return spent.ru_utime + spent.ru_stime


def records(outputs: Path) -> dict[str, object]:
    """Every plan and record below a folder of runs: what inputs decide, and nothing else."""
    files = [p for p in outputs.glob("smoke/**/*.json") if p.name in ("plan.json", "record.json") or p.stem.isdigit()]
    return {str(path.relative_to(outputs)): json.loads(path.read_text()) for path in files}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    outputs = tmp_path_factory.mktemp("whole")
    print(run(outputs))
    return outputs


def test_the_whole_dag_makes_pictures_and_figures(finished: Path) -> None:
    run_folder = finished / "smoke"
    assert (run_folder / "generate/grid.png").read_bytes().startswith(b"\x89PNG")
    figures = json.loads((run_folder / "evaluate/metrics.json").read_text())
    assert 0 <= figures["prompt_recall@1"] <= 1 and figures["prompt_recall_candidates"] >= 4
    assert "filter_metadata" in (run_folder / "report.html").read_text()
    assert list((run_folder / "train").glob("step-*/COMMITTED"))


def test_every_row_of_the_funnel_is_accounted_for_and_is_what_the_web_was_made_to_hold(finished: Path) -> None:
    from pipelines.config import compose
    from pipelines.dag import Dag
    from pipelines.sample_web import expected_funnel

    dag = Dag(compose(["+experiment=smoke", f"paths.outputs={finished}"]))
    expected = expected_funnel(dag.config.dataset)
    rows = None
    for stage in ("filter_metadata", "download", "filter_images", "precompute_latents"):
        funnel = dag.refresh(stage).funnel
        assert funnel is not None and funnel["rows"] == funnel["samples"] + sum(funnel["dropped"].values())
        assert rows is None or funnel["rows"] == rows, f"{stage} does not take in what the stage before gave out"
        rows = funnel["samples"]
        if stage in expected:
            assert funnel["dropped"] == expected[stage], stage


def test_mlflow_has_the_funnel_as_metrics_as_table_and_as_plot(finished: Path) -> None:
    from mlflow.tracking import MlflowClient

    from pipelines.config import compose
    from pipelines.dag import Dag

    dag = Dag(compose(["+experiment=smoke", f"paths.outputs={finished}"]))
    client = MlflowClient(f"sqlite:///{finished / 'mlflow.db'}")
    runs = json.loads((finished / "smoke/tracking.json").read_text())["runs"]
    whole = client.get_run(runs["run"])
    assert whole.info.status == "FINISHED"
    lines = whole.data.tags["mlflow.note.content"].splitlines()[2:]
    for stage, line in zip(DAG, lines, strict=True):
        funnel, metrics = dag.refresh(stage).funnel, client.get_run(runs[stage]).data.metrics
        assert funnel is not None
        told = {name.removeprefix("funnel/"): value for name, value in metrics.items() if name.startswith("funnel/")}
        dropped = {f"dropped/{reason}": count for reason, count in funnel["dropped"].items()}
        assert told == {"rows": funnel["rows"], "samples": funnel["samples"], **dropped}, stage
        lost = sum(funnel["dropped"].values())
        assert line.startswith(f"| {stage} | {funnel['rows']} | {funnel['samples']} | {lost} |"), line
        assert "funnel.csv" in {artifact.path for artifact in client.list_artifacts(runs[stage])}
    names = {artifact.path for artifact in client.list_artifacts(runs["run"])}
    assert {"funnel.csv", "funnel.png", "report.html"} <= names
    plot = Path(client.download_artifacts(runs["run"], "funnel.png")).read_bytes()
    assert plot == (finished / "smoke/funnel.png").read_bytes()


def test_a_second_run_does_nothing(finished: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()}
    assert "Everything is up to date" in run(finished)
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()} == before


# The command, which says at its end what it had to load.
LOADS = """
import sys
from pipelines import run
code = run.main(sys.argv[1:])
print({"torch", "ray"} & sys.modules.keys(), code)
"""


def test_a_second_runner_is_refused_and_told_by_whom_before_it_loads_anything(tmp_path: Path) -> None:
    command = [sys.executable, "-c", LOADS, "+experiment=smoke", f"paths.outputs={tmp_path}"]
    with lock(tmp_path / "smoke/filter_metadata/lock", "filter_metadata of smoke"):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "set() 2\n" and f'"pid": {os.getpid()}' in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.rglob("plan.json")) and not list(tmp_path.rglob("lock"))


@pytest.mark.slow
def test_what_is_refused_or_has_nothing_to_do_ends_quickly(finished: Path, tmp_path: Path) -> None:
    """In seconds of processor time, the least of three: how busy the machine is decides the others."""

    def least(outputs: Path, code: int) -> float:
        spent = []
        for _ in range(3):
            before, process = processor_seconds(), start(outputs)
            said, _ = process.communicate(timeout=200)
            assert process.returncode == code and "Traceback" not in said, said
            spent.append(processor_seconds() - before)
        return min(spent)

    idle = least(finished, 0)
    with lock(tmp_path / "smoke/filter_metadata/lock", "filter_metadata of smoke"):
        refused = least(tmp_path, 2)
    print(f"nothing to do: {idle:.1f} s, expected less than 5; refused: {refused:.1f} s, expected less than 2")
    assert idle < 5 and refused < 2


def test_nothing_is_left_behind(finished: Path) -> None:
    left = [path for path in finished.rglob("*") if path.name.endswith(".tmp") or path.name == "lock"]
    left += [path for folder in finished.rglob(".attempts") for path in folder.iterdir()]
    assert left == []


@pytest.mark.parametrize("override, words", [
    ("dataset.download.image_size=48", ["download", "image_size", "name=OTHER"]),
    ("training.learning_rate=0.5", ["train", "learning_rate", "0.5 now"]),
])  # fmt: skip
def test_other_settings_are_refused_with_the_difference_and_the_ways_out(
    finished: Path, override: str, words: list[str]
) -> None:
    process = start(finished, override)
    text, _ = process.communicate(timeout=60)
    assert process.returncode == 2 and "Traceback" not in text, text
    assert all(word in text for word in words), text


def test_a_stage_without_its_input_is_refused_with_the_command_that_mends_it(tmp_path: Path) -> None:
    process = start(tmp_path, "+stage=train")
    text, _ = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "python -m pipelines.run +stage=filter_metadata" in text


def test_another_run_reads_the_data_half_of_a_finished_one(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "o")
    reuse = "{filter_metadata: smoke, download: smoke, filter_images: smoke, precompute_latents: smoke}"
    process = start(tmp_path / "o", "name=other", "+stage=precompute_latents", f"paths.reuse={reuse}")
    text, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "Everything is up to date" in text


def begun(outputs: Path, stage: str) -> bool:
    """Whether a stage is in the middle: a first record where there are shards, a first sign elsewhere."""
    folder = outputs / "smoke" / stage
    if STAGES[stage].kind == "shards":
        return any(folder.glob("[0-9]*.json"))
    if stage == "train":
        return any(folder.glob("step-*/COMMITTED"))
    return any(folder.rglob("plan.json"))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_in_every_stage_and_continued_gives_the_same_records(finished: Path, tmp_path: Path) -> None:
    for stage in DAG:
        process = start(tmp_path)
        deadline = time.monotonic() + 200
        while not begun(tmp_path, stage) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        assert process.poll() is None, f"ended before it was killed in {stage}:\n{process.communicate()[0]}"
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    run(tmp_path)
    assert records(tmp_path) == records(finished)

"""Runs one stage, or whatever of the whole DAG is missing.

    python -m pipelines.run                              what is missing or half done, and nothing else
    python -m pipelines.run +stage=precompute_latents    that stage alone
    python -m pipelines.run +experiment=smoke            a named configuration
    python -m pipelines.run training.max_steps=5000      another value
    python -m pipelines.run --show                       the composed configuration, without running anything

`+` chooses what to run, `=` overrides a value. Everything is checked before the first stage starts.
"""

from __future__ import annotations

import importlib
import json
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from ldm.storage import StorageError
from pipelines import quarantine, rewind
from pipelines.cluster import FULL
from pipelines.config import Config, ConfigError, compose, compose_plain, options, plain
from pipelines.dag import (
    ROOT,
    STAGES,
    Dag,
    Status,
    check_places,
    check_stage_name,
    connected,
    reads,
    weights_path,
    what_of,
)
from pipelines.journal import begin_from_nothing
from pipelines.lock import LockedError, lock
from pipelines.manifest import Record, StaleError, read_json, sum_funnel, write_json, write_whole
from pipelines.stopping import Stopped
from pipelines.summary import funnel_of, funnel_rows, pointers, summary

NO_SUCH_INPUT = 2  # exit code of everything that the caller can mend


def main(arguments: list[str] | None = None) -> int:
    """The command. Returns the exit code: 0 done, 1 a stage failed, 2 the request does not fit, 130 or 143 a signal."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if {"-h", "--help"} & set(arguments):
        print(usage())
        return 0
    try:
        overrides = normalise([argument for argument in arguments if argument != "--show"])
        if "--show" in arguments:
            print(json.dumps(compose_plain(overrides), indent=2, ensure_ascii=False))
            return 0
        return run(compose(overrides), shlex.join(arguments))
    except (ConfigError, StaleError, LockedError, FileNotFoundError) as error:
        print(f"\n{error}\n", file=sys.stderr)
        return NO_SUCH_INPUT
    # What stages raise; the journal and MLflow keep where it came from.
    except (RuntimeError, ValueError, StorageError) as error:
        print(f"\n{error}\n", file=sys.stderr)
        return 1
    except Stopped as stopped:
        print(f"\n{stopped}\n", file=sys.stderr)
        return stopped.exit_code
    except OSError as error:  # of what is written beside the stages: the report, the journal of the run
        if error.errno not in FULL:
            raise
        print(f"\ndisk full: {error}. Make room there; the same command goes on\n", file=sys.stderr)
        return 1


def usage() -> str:
    lines = [__doc__ or "", "stages, in order:"]
    lines += [f"  {name:<20} {_first_comment('stage', name)}" for name in STAGES]
    lines += ["", "experiments:"]
    lines += [f"  {name:<20} {_first_comment('experiment', name)}" for name in options("experiment")]
    return "\n".join(lines)


def _first_comment(group: str, name: str) -> str:
    first = (ROOT / "conf" / group / f"{name}.yaml").read_text().splitlines()
    return next((line.lstrip("# ") for line in first if line.startswith("#") and "@package" not in line), "")


def normalise(arguments: list[str]) -> list[str]:
    """Lets `stage=x` and `experiment=x` do without their plus sign; checks the stage's name at once."""
    overrides = []
    for argument in arguments:
        key, _, value = argument.lstrip("+").partition("=")
        if key == "stage":
            check_stage_name(value)
        overrides.append(f"+{key}={value}" if key in ("stage", "experiment") else argument)
    # The experiment first: what is said beside it has the last word.
    return sorted(overrides, key=lambda override: not override.startswith("+experiment="))


def run(config: Config, command: str) -> int:
    """Brings every wanted stage up to date."""
    check_places(config)
    dag = Dag(config)
    wanted = dag.wanted()
    with ExitStack() as stack:
        statuses = _statuses(dag, wanted, stack)
        if config.overwrite and _forget_quarantined(dag, wanted, stack):
            statuses = {stage: dag.refresh(stage) for stage in wanted}
        if all(status.done for status in statuses.values()):
            print(summary(dag, wanted))
            print("Everything is up to date.")
            return 0
        _check_inputs_present(dag, wanted)
        if "filter_images" in wanted and not statuses["filter_images"].done:
            check_scores(config)
        for stage in wanted:
            if not statuses[stage].done:
                _hold(dag, stage, stack)
        if any(stage in ("train", "generate") and not statuses[stage].done for stage in wanted):
            _check_model(config)
        if "train" in wanted and not statuses["train"].done:
            _check_begin(dag)
        _run_stages(dag, wanted, command, stack)
    print(summary(dag, wanted))
    print(pointers(dag))
    return 0


def _statuses(dag: Dag, wanted: list[str], stack: ExitStack) -> dict[str, Status]:
    """The status of every wanted stage; with overwrite=true what is stale of them is deleted first, under its lock."""
    statuses: dict[str, Status] = {}
    for stage in wanted:
        while stage not in statuses:
            try:
                statuses[stage] = dag.refresh(stage)
            except StaleError as error:
                if not dag.config.overwrite or error.folder.stage not in wanted:
                    raise
                _hold(dag, error.folder.stage, stack)
                if error.folder.stage == "train":
                    rewind.leave_copies(dag.config.cluster.train.run, error.folder.path)
                print(f"overwrite=true: deleting what is stale in {error.folder.path}")
                error.folder.clear(error.shards)
    return statuses


def _forget_quarantined(dag: Dag, wanted: list[str], stack: ExitStack) -> set[int]:
    """Deletes the records of quarantined shards, and in later stages of what was made of their emptiness."""
    again: set[int] = set()
    for stage in wanted:
        if STAGES[stage].kind == "shards":
            status = dag.statuses[stage]
            again |= quarantine.quarantined(status.records.values()).keys()
            if shards := sorted(again & status.records.keys()):
                _hold(dag, stage, stack)
                print(f"overwrite=true: {stage} tries again what was quarantined: {', '.join(map(str, shards))}")
                status.job.output.clear(shards)
    return again


_held: set[Path] = set()


def _hold(dag: Dag, stage: str, stack: ExitStack) -> None:
    """Takes the lock of a stage's folder until the run ends."""
    folder = dag.home(stage)
    if folder not in _held:
        stack.enter_context(lock(folder / "lock", f"{stage} of {dag.config.name}"))
        _held.add(folder)
        stack.callback(_held.discard, folder)


def _check_inputs_present(dag: Dag, wanted: list[str]) -> None:
    """A stage that runs alone needs its input: at least a shard of it, or all of it where it makes one result."""
    for stage in wanted:
        for read in reads(dag.config, stage):
            status = dag.statuses[read]
            if read in wanted or status.done or (STAGES[stage].kind == "shards" and status.records):
                continue
            raise ConfigError(
                f"{stage} reads {read}, which is not there yet in {dag.home(read)}; "
                f"make it with: python -m pipelines.run +stage={read} name={dag.config.name}"
            )


def check_scores(config: Config) -> None:
    """Refuses weights of which nobody has said which are meant; says so where GPUs are left out of scoring."""
    settings, cluster = config.dataset.filter_images, config.cluster
    given = {f"heads.{name}": head for name, head in settings.heads.items()}
    for key, network in (given if settings.clip is None else {"clip": settings.clip, **given}).items():
        if network.sha256 is None:
            raise ConfigError(
                f"dataset.filter_images.{key}.sha256 is null, so nobody has said which weights are meant; "
                f"`sha256sum {weights_path(network.weights)}` computes what to write there"
            )
    if settings.clip is not None and cluster.precompute_latents.num_gpus and not cluster.filter_images.num_gpus:
        print("scores are computed on processors: cluster.filter_images.num_gpus is 0; cluster=h100_scores has a share")


def _check_model(config: Config) -> None:
    from pipelines.model_check import check_model

    try:
        check_model(config)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _check_begin(dag: Dag) -> None:
    """Refuses a training that could not keep or copy its checkpoints, or lacks the weights that it begins with."""
    from ldm.training.checks import check_best
    from ldm.training.copies import check_place

    run, start, home = dag.config.cluster.train.run, dag.config.training.start_from, dag.home("train")
    try:
        check_best(dag.config.training, run)
        check_place(run, home)
        if start is not None and run.copy_to is None and not any(home.glob("step-*")):
            weights_path(start)
    except ConfigError as error:
        raise ConfigError(f"training.start_from: {error}; it is the ema.safetensors of a run of this model") from error
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _run_stages(dag: Dag, wanted: list[str], command: str, stack: ExitStack) -> None:
    from pipelines import cluster, stopping
    from pipelines.tracking import Tracker

    tracker = stack.enter_context(Tracker.open(dag.config.tracking, dag.run_folder))
    tracker.run.params(plain(dag.config))
    tracker.run.tags({"code_version": code_version(), "command": command, "host": socket.gethostname()})
    stack.enter_context(cluster.connect(dag.config.cluster))
    stack.enter_context(stopping.ending())
    with accounted(dag, wanted, tracker.run):
        for group in groups(wanted):
            open_stages = [stage for stage in group if not dag.refresh(stage).done]
            if not open_stages:
                continue
            for stage in open_stages:
                begin(dag, stage)
                print(f"{time.strftime('%H:%M:%S')}  {stage:<20} begins", flush=True)
            if STAGES[group[0]].kind == "shards":
                _run_stream(dag, open_stages, tracker, command)
            else:
                _run_one(dag, open_stages[0], tracker, command)
        if "evaluate" in wanted:
            figures = read_json(dag.run_folder / "evaluate/metrics.json")
            tracker.run.metrics({name: x for name, x in figures.items() if name.startswith("prompt_recall")})
            generated = dag.statuses["generate"].job.output  # MLflow keeps the first picture of a name and step
            tracker.run.image(f"grid {generated.path.name}", generated / "grid.png", dag.config.training.max_steps)


@contextmanager
def _at_the_end(write: Callable[[BaseException | None], None], failed: str) -> Iterator[None]:
    """However the block ends, `write` is called with what ended it, and never hides that by an error of its own."""
    try:
        yield
    except BaseException as error:
        try:
            write(error)
        except Exception as other:  # whatever it is, it must not stand in for what ended the run
            print(f"{failed}: {type(other).__name__}: {other}", file=sys.stderr)
        raise
    write(None)


@contextmanager
def accounted(dag: Dag, wanted: list[str], journal: Any) -> Iterator[None]:
    """However the block ends, an account is given of what its stages made."""

    def give(error: BaseException | None) -> None:
        if error is not None:
            for stage in wanted:
                with suppress(StaleError):  # as it was known before
                    dag.refresh(stage)
        give_account(dag, wanted, journal, "" if error is None else f"{type(error).__name__}: {error}")

    with _at_the_end(give, "no report of the stopped run"):
        yield


def give_account(dag: Dag, wanted: list[str], journal: Any, stopped: str = "") -> None:
    """The funnel as table and plot, then the report, which says so where the run was `stopped`, and by what."""
    from pipelines import report
    from pipelines.reporting import plot

    journal.table("funnel", funnel_rows(dag, wanted))
    funnels = [(stage, funnel) for stage in wanted if (funnel := funnel_of(dag.statuses[stage]))]
    write_whole(dag.run_folder / "funnel.png", plot.funnel_png(funnels))
    # No image of a step: MLflow would keep the first of them, and a run that goes on gives another account.
    journal.artifact(dag.run_folder / "funnel.png")
    journal.artifact(report.write_report(dag.run_folder, stopped))


def groups(wanted: list[str]) -> Iterator[list[str]]:
    """Stages that run together: neighbours of kind "shards" stream, all others run alone."""
    group: list[str] = []
    for stage in wanted:
        if group and not STAGES[stage].kind == STAGES[group[-1]].kind == "shards":
            yield group
            group = []
        group.append(stage)
    if group:
        yield group


def begin(dag: Dag, stage: str) -> None:
    """Sweeps what crashed attempts left, and writes the plan of a stage that begins."""
    folder = dag.statuses[stage].job.output
    folder.sweep()
    plan = folder.read_plan()
    if plan is None and not STAGES[stage].many:
        begin_from_nothing(dag.run_folder, stage)
    if plan is not None and plan["fingerprint"] != dag.fingerprints[stage]:  # training.accept allows it
        rewind.set_aside(folder.path, [name for name in ("plan.json", "record.json") if (folder / name).exists()])
        plan = None
    if plan is None:
        folder.write_plan(dag.plan(stage))


def _run_stream(dag: Dag, stages: list[str], tracker: Any, command: str) -> None:
    """Streams shards through neighbouring stages and closes those whose input is closed."""
    from pipelines import progress, sample_web

    first_input = reads(dag.config, stages[0])[0]
    shards = sorted(dag.statuses[first_input].records) if first_input in dag.statuses else []
    with ExitStack() as stack:
        journals = {stage: stack.enter_context(tracked(dag, stage, tracker)) for stage in stages}
        notes = {stage: stack.enter_context(_noted(dag, stage, command)) for stage in stages}
        address = dag.config.dataset.connect
        if "download" in stages:
            address = stack.enter_context(sample_web.serving(dag.config.dataset))

        def committed(stage: str, record: Record) -> None:
            notes[stage]["shards"] += 1
            notes[stage]["finished"] = time.time()
            journals[stage].metrics({"data/samples": record.samples, "data/rows": record.rows}, step=record.shard)

        todo = {stage: len(set(shards) - dag.statuses[stage].records.keys()) for stage in stages}
        with progress.following(dag.run_folder, todo):
            _stream(dag, stages, shards, address, committed)
        for stage in stages:
            if _close(dag, stage):
                _journal_funnel(dag, stage, journals[stage])


def _stream(
    dag: Dag, stages: list[str], shards: list[int], address: str | None, committed: Callable[[str, Record], None]
) -> None:
    """Streams what is left; a shard that fails twice is quarantined, where as many may be."""
    from pipelines import cluster

    failed: set[tuple[str, int]] = set()
    most = dag.config.cluster.max_quarantined_shards
    while True:
        jobs = {stage: connected(dag.statuses[stage].job, address) for stage in stages}
        records = {stage: dag.statuses[stage].records for stage in stages}
        steps = [
            cluster.Step(jobs[stage], getattr(dag.config.cluster, stage), set(shards) - records[stage].keys(),
                         f"pipelines.stages.{stage}")
            for stage in stages
        ]  # fmt: skip
        try:
            return cluster.stream(steps, shards, committed)
        except cluster.ShardsFailed as failure:
            known = {stage: records[stage].values() for stage in stages}
            if not quarantine.has_room(most, known, failure.own):
                if most and failure.own:
                    more = f"{failure}; these are more than cluster.max_quarantined_shards={most} of a stage"
                    raise cluster.ShardsFailed(more, failure.own) from failure
                raise
            for (stage, shard), reason in failure.own.items():
                if jobs[stage].output.record(shard) is not None:
                    continue  # its worker died after all was done
                again = (stage, shard) not in failed
                print(f"{stage}: shard {shard} {'failed and is tried again' if again else 'is quarantined'}: {reason}")
                if not again:
                    committed(stage, quarantine.give_up(jobs[stage], shard, reason))
            failed |= failure.own.keys()
        for stage in stages:
            dag.refresh(stage)


def _close(dag: Dag, stage: str) -> bool:
    """Writes the manifest once nothing is left to do and the input is closed. Returns whether it is closed now."""
    status = dag.refresh(stage)
    if status.done:
        return True
    inputs_closed = all(dag.statuses[read].done for read in reads(dag.config, stage))
    if status.todo or not inputs_closed:
        left = f"{len(status.todo)} shards are left" if status.todo else "its input is not closed"
        print(f"{stage}: {len(status.records)} shards are committed; {left}, so it stays open")
        return False
    records = list(status.records.values())
    status.job.output.sweep()  # after workers that died; none is at work here any more
    rows = dag.job("filter_metadata").output.manifest()
    editions = {row["shard"]: row["edition"] for row in rows["shards"]} if rows else None
    status.job.output.close(status.job.fingerprint, records, sum_funnel(records), editions=editions)
    dag.refresh(stage)
    return True


def _run_one(dag: Dag, stage: str, tracker: Any, command: str) -> None:
    """Runs a stage that is not streamed: on the driver where it launches others, else on a worker of the cluster."""
    from pipelines import cluster, progress

    job = dag.statuses[stage].job
    for read in reads(dag.config, stage):
        if not dag.refresh(read).done:
            raise RuntimeError(f"{stage} reads {read}, which is not finished in {dag.home(read)}: run it again first")
    module = importlib.import_module(f"pipelines.stages.{stage}")
    goals = {"train": dag.config.training.max_steps, "train_autoencoder": dag.config.autoencoder_training.max_steps}
    showing = progress.following(dag.run_folder, {stage: goals.get(stage, 0)})
    with cluster.on_the_driver(job), tracked(dag, stage, tracker) as journal, _noted(dag, stage, command), showing:
        if STAGES[stage].kind == "table":
            files = module.source_files(job)
            funnel = module.run(job, files)
            records = list(job.output.committed().values())
            job.output.close(job.fingerprint, records, funnel, sources=module.sources(job, files))
        elif stage == "train":
            module.run(job)
        else:
            cluster.run_once(module.__name__, job, dag.config.cluster.whole)
        dag.refresh(stage)
        _journal_funnel(dag, stage, journal)


@contextmanager
def tracked(dag: Dag, stage: str, tracker: Any) -> Iterator[Any]:
    """The journal of a stage for the time that it runs, opened with its settings and with what it reads."""
    params = what_of(dag.config, stage)
    tags = {"fingerprint": dag.fingerprints[stage], "code_version": code_version()}
    with tracker.stage(stage, params, tags) as journal:
        folders = dag.statuses[stage].job.inputs
        for name, digest in dag.digests_read(stage).items():
            if digest:  # what is still being made has none
                manifest = "record.json" if STAGES[folders[name].stage].kind == "whole" else "manifest.parquet"
                journal.dataset(name, digest, folders[name] / manifest)
        yield journal


def _journal_funnel(dag: Dag, stage: str, journal: Any) -> None:
    funnel = dag.statuses[stage].funnel
    if funnel:
        journal.metrics({"funnel/rows": funnel["rows"], "funnel/samples": funnel["samples"],
                         **{f"funnel/dropped/{reason}": count for reason, count in funnel["dropped"].items()}})
        journal.table("funnel", [{"reason": reason, "count": count} for reason, count in
                                 [("in", funnel["rows"]), *funnel["dropped"].items(), ("out", funnel["samples"])]])


@contextmanager
def _noted(dag: Dag, stage: str, command: str) -> Iterator[dict[str, Any]]:
    """Appends when, where and by what code a stage ran to its run.json: everything that inputs do not decide."""
    folder = dag.statuses[stage].job.output
    note = {"started": time.time(), "finished": None, "shards": 0, "host": socket.gethostname(),
            "code_version": code_version(), "command": command}

    def write(error: BaseException | None) -> None:
        note["finished"] = note["finished"] or time.time()
        note["seconds"] = round(note["finished"] - note["started"], 1)
        path = folder / "run.json"
        runs = read_json(path)["runs"] if path.exists() else []
        write_json(path, {"format": 1, "runs": [*runs, note]})

    with _at_the_end(write, "no note of it in run.json"):
        yield note


def code_version() -> str:
    """The commit of the checkout, with "+" when files differ from it; "unknown" outside a checkout or without git."""
    git = ["git", "-C", str(ROOT)]
    try:
        commit = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=False)
        if commit.returncode:
            return "unknown"
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=False)
    except OSError:  # it is not installed, or could not be started: no reason not to run
        return "unknown"
    return commit.stdout.strip() + ("+" if changed.stdout else "")


if __name__ == "__main__":
    sys.exit(main())

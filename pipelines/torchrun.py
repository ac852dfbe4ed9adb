"""Training without Ray: the same function, in processes that torchrun or DeepSpeed's launcher started.

    torchrun --nproc-per-node 8 -m pipelines.torchrun +experiment=laion400m_1p45b
    deepspeed --num_accelerators 8 --module pipelines.torchrun +experiment=laion400m_1p45b

What training reads must be finished. What a run under Ray tells MLflow goes to the journal, and `python -m
pipelines.sync` sends it. After SIGTERM or SIGINT to one of these processes, or to their launcher, all save and leave
with exit code 143 or 130; the same command goes on from there. A launcher kills what is left after 30 seconds; torchrun
waits longer with --shutdown-timeout 300.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from types import FrameType
from typing import Any

from pipelines.cluster import StageFailed, on_the_driver
from pipelines.config import Config, ConfigError, compose, plain
from pipelines.dag import Dag, Job, reads
from pipelines.lock import LockedError, lock
from pipelines.manifest import StaleError
from pipelines.run import begin, code_version, normalise, tracked
from pipelines.stopping import SIGNALS, Stopped, ending


def main(arguments: list[str] | None = None) -> int:
    """One process. Returns the exit code: 0 done, 1 it failed, 2 the request does not fit, 130 or 143 a signal."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        # DeepSpeed's launcher adds --local_rank=N to what it was given; its environment says the same.
        dag = Dag(compose(normalise([argument for argument in given if not argument.startswith("--local_rank")])))
        if dag.refresh("train").done:
            if os.environ.get("RANK", "0") == "0":
                print("train is up to date")
            return 0
        _check_inputs(dag)
        _check_settings(dag.config)
        train_here(dag)
    except (ConfigError, StaleError, LockedError) as error:
        print(f"\n{error}\n", file=sys.stderr)
        return 2
    except (RuntimeError, ValueError) as error:
        if not (isinstance(error, StageFailed | ValueError) or getattr(error, "stops_the_run", False)):
            traceback.print_exc()  # not a word of ours: whoever mends it wants to know where it came from
        print(f"\n{error}\n", file=sys.stderr)
        return 1
    except Stopped as stopped:
        if os.environ.get("RANK", "0") == "0":
            print(f"\n{stopped}\n", file=sys.stderr)
        return stopped.exit_code
    return 0


def _check_inputs(dag: Dag) -> None:
    for read in reads(dag.config, "train"):
        if not dag.statuses[read].done:
            raise ConfigError(
                f"train reads {read}, which is not finished in {dag.home(read)}; "
                f"make it with: python -m pipelines.run +stage={read} name={dag.config.name}"
            )


def _check_settings(config: Config) -> None:
    """That training takes these settings, in as many processes as the launcher started."""
    from pipelines.model_check import check_training

    started, train = int(os.environ.get("WORLD_SIZE", "1")), config.cluster.train
    try:
        check_training(replace(config, cluster=replace(config.cluster, train=replace(train, workers=started))))
    except ValueError as error:
        raise ConfigError(f"{error}\n(the launcher started {started}; cluster.train.workers is for Ray)") from error


def train_here(dag: Dag) -> None:
    """What the driver does under Ray falls to the first process; all of them train."""
    import torch.distributed as dist

    from ldm.training.engine import join
    from pipelines.stages import train

    job = dag.statuses["train"].job
    with ending(), ExitStack() as stack:  # signals are ours until all is closed
        first = join(cuda=job.how.cluster.train.num_gpus > 0).rank == 0
        prepared = _from_the_first(lambda: _prepare(dag, stack), first)
        caught = _ask_on_signals(job)
        with on_the_driver(job):
            train.work({"job": job, "selections": prepared.selections})
        numbers = _of_all(max(caught, default=0))
        dist.destroy_process_group()  # what follows is done alone
        if any(numbers):
            raise Stopped(max(numbers))
        if first:
            train.commit(job, prepared)


def _prepare(dag: Dag, stack: ExitStack) -> Any:
    from pipelines.stages import train
    from pipelines.tracking import Tracker

    stack.enter_context(lock(dag.home("train") / "lock", f"train of {dag.config.name}"))
    begin(dag, "train")
    # The journal alone: a thread that sends would take time from the steps of this process.
    tracker = stack.enter_context(Tracker.open(replace(dag.config.tracking, enabled=False), dag.run_folder))
    tracker.run.params(plain(dag.config))
    tracker.run.tags({"code_version": code_version(), "host": socket.gethostname()})
    stack.enter_context(tracked(dag, "train", tracker))
    return train.prepare(dag.statuses["train"].job)


def _from_the_first(make: Callable[[], Any], first: bool) -> Any:
    """What the first process makes, in all of them; where it fails all of them do, and say why."""
    import torch.distributed as dist

    answer: list[Any] = [None, None]
    try:
        if first:
            answer = [make(), None]
    except BaseException as error:
        answer = [None, str(error) or type(error).__name__]
        raise
    finally:
        dist.broadcast_object_list(answer)
    made, failure = answer
    if failure is not None:
        raise StageFailed(f"the first process could not prepare training: {failure}")
    return made


def _ask_on_signals(job: Job) -> list[int]:
    """Every signal asks to save and leave. Terminals and launchers send several, so none of them ends it at once.

    Returns the list of those that come.
    """
    from pipelines.stages.train import STOP

    caught: list[int] = []

    def ask(number: int, frame: FrameType | None) -> None:
        caught.append(number)
        (job.output / STOP).touch()

    for number in SIGNALS:
        signal.signal(number, ask)
    return caught


def _of_all(mine: int) -> list[int]:
    """A number of each process, in order of rank."""
    import torch.distributed as dist

    numbers = [0] * dist.get_world_size()
    dist.all_gather_object(numbers, mine)
    return numbers


if __name__ == "__main__":
    sys.exit(main())

"""Training without Ray: the same function, in processes that torchrun or DeepSpeed's launcher started.

    torchrun --nproc-per-node 8 -m pipelines.torchrun +experiment=laion400m_1p45b
    deepspeed --num_accelerators 8 --module pipelines.torchrun +experiment=laion400m_1p45b

What training reads must be finished. What a run under Ray tells MLflow goes to the journal, and `python -m
pipelines.sync` sends it. SIGTERM and SIGINT to these processes save and leave; the same command goes on from there.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from pipelines.config import ConfigError, compose, plain
from pipelines.dag import Dag, Job, reads
from pipelines.lock import LockedError, lock
from pipelines.manifest import StaleError
from pipelines.run import begin, code_version, normalise, tracked
from pipelines.stopping import SIGNALS


def main(arguments: list[str] | None = None) -> int:
    """One process. Returns the exit code: 0 done, 1 stopped before the last step, 2 the request does not fit."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        # DeepSpeed's launcher adds --local_rank=N to what it was given; its environment says the same.
        dag = Dag(compose(normalise([argument for argument in given if not argument.startswith("--local_rank")])))
        if dag.refresh("train").done:
            if os.environ.get("RANK", "0") == "0":
                print("train is up to date")
            return 0
        _check_inputs(dag)
        train_here(dag)
    except (ConfigError, StaleError, LockedError) as error:
        print(f"\n{error}\n", file=sys.stderr)
        return 2
    except (RuntimeError, ValueError) as error:
        print(f"\n{error}\n", file=sys.stderr)
        return 1
    return 0


def _check_inputs(dag: Dag) -> None:
    for read in reads(dag.config, "train"):
        if not dag.statuses[read].done:
            raise ConfigError(
                f"train reads {read}, which is not finished in {dag.home(read)}; "
                f"make it with: python -m pipelines.run +stage={read} name={dag.config.name}"
            )


def train_here(dag: Dag) -> None:
    """What the driver does under Ray falls to the first process; all of them train."""
    import torch.distributed as dist

    from ldm.training.engine import join
    from pipelines.stages import train

    job = dag.statuses["train"].job
    first = join(cuda=job.how.cluster.train.num_gpus > 0).rank == 0
    with ExitStack() as stack:
        prepared = _from_the_first(lambda: _prepare(dag, stack), first)
        _ask_on_signals(job)
        train.work({"job": job, "selections": prepared.selections})
        dist.destroy_process_group()  # what follows is done alone
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
        raise RuntimeError(f"the first process could not prepare training: {failure}")
    return made


def _ask_on_signals(job: Job) -> None:
    """Every signal asks to save and leave. Terminals and launchers send several, so none of them ends it at once."""
    from pipelines.stages.train import STOP

    for number in SIGNALS:
        signal.signal(number, lambda *_: (job.output / STOP).touch())


if __name__ == "__main__":
    sys.exit(main())

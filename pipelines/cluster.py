"""Where the work happens: Ray. It executes and remembers nothing that matters; the disk is the truth.

`stream` sends shards through a chain of stages: shard 7 is encoded while shard 9 is still being downloaded, each
stage on its own kind of resource, a bounded number in flight. `run_once` runs a stage that makes one result.
`train_once` runs a group of training processes. Tasks are handed names and paths, never pixels.
"""

from __future__ import annotations

import errno
import importlib
import math
import os
import shutil
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from pipelines import stopping
from pipelines.dag import Job
from pipelines.manifest import Record
from pipelines.settings import ClusterConfig, Resources

# Ray reads these when it is imported or started. No statistics are sent, no environment is rebuilt by uv, and Ray
# leaves the visible GPUs alone for tasks that ask for none.
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "180",
    "RAY_DEDUP_LOGS": "0",
}
STARTS = 3  # of a local Ray, which gives itself 30 seconds, on a busy machine not always enough
SYSTEM_RETRIES = 3  # of a shard, after a crash of its worker or node, not after an error
RESTARTS = 20  # of one worker that holds a model: it may be killed while it loads, where no shard is tried
STOP_SECONDS = 5  # that shards under way are given to end once one said that all would fail
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NAMESPACE = "latent diffusion"  # of what all runs on a cluster share
IDLE_SECONDS = 60.0  # after which what nobody asks any more ends


class ClusterAway(RuntimeError):
    """There is no cluster to run on."""


class StageFailed(RuntimeError):
    """A stage failed in a worker; the message says of what."""


class ShardsFailed(StageFailed):
    """Some shards failed; the others are committed.

    `own` has what went wrong by (stage, shard) where all of them failed by errors of their own, and nothing otherwise.
    """

    def __init__(self, message: str, own: dict[tuple[str, int], str]) -> None:
        super().__init__(message)
        self.own = own


@contextmanager
def connect(config: ClusterConfig) -> Iterator[None]:
    """A connection to the cluster, or a Ray of our own that ends with the block."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import ray

    if config.address == "local":
        _start_here(config)
    else:
        _join(config.address)
    try:
        yield
    finally:
        ray.shutdown()


def _join(address: str) -> None:
    try:
        _init(address)
    except ConnectionError as error:
        raise ClusterAway(
            f"cluster.address is {address}, where no Ray is found: {error} cluster.address=local starts one here"
        ) from error


def _start_here(config: ClusterConfig) -> None:
    """A Ray of our own. One that is not up in time is ended and started anew."""
    import psutil

    before = set(psutil.Process().children(recursive=True))
    for start in range(1, STARTS + 1):
        try:
            return _init("local", num_cpus=config.num_cpus, object_store_memory=config.object_store_bytes,
                         include_dashboard=False)  # fmt: skip
        except Exception as error:  # Ray has no narrower one for this
            if "timed out" not in str(error).lower():
                raise
            began = set(psutil.Process().children(recursive=True)) - before
            for process in began:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(began, timeout=10)
            print(f"Ray was not up within its 30 seconds, at start {start} of {STARTS}", flush=True)
    raise ClusterAway(
        f"Ray, started here {STARTS} times, was never up within its 30 seconds: the load is {os.getloadavg()[0]:.0f} "
        f"on {os.cpu_count()} processors. Try again when less runs here, or let cluster.address name a cluster"
    )


def _init(address: str, **sizes: Any) -> None:
    import ray

    ray.init(address=address, log_to_driver=False, logging_level="error", configure_logging=True, **sizes)


@dataclass
class Step:
    """One stage of a stream: its job, the shards that it still has to make, and what one worker takes."""

    job: Job
    resources: Resources
    todo: set[int]
    module: str  # has run_shard(job, shard), or a class Worker(job) with run_shard(shard); maybe shared and sizes
    waiting: deque[int] = field(default_factory=deque)
    running: int = 0
    actors: list[Any] = field(default_factory=list)
    task: Any = None  # made once: Ray exports every function that it is handed, and forgets none


def _run_shard(module: str, job: Job, shard: int) -> Record:
    stage = importlib.import_module(module)
    kind = getattr(stage, "shared", lambda job: None)(job)
    return stage.run_shard(job, shard) if kind is None else stage.run_shard(job, shard, _asking(kind))


def _run_whole(module: str, job: Job) -> Record:
    return importlib.import_module(module).run(job)


def stream(steps: list[Step], shards: list[int], on_record: Callable[[str, Record], None]) -> None:
    """Sends shards through the steps in order and calls `on_record` for each shard that a step has committed.

    Later steps go first, so that work drains. An error in a shard lets all other shards finish and then raises
    ShardsFailed with the count and the first cause. After one that `stops_the_run` only later steps go on; what this
    step and those before it have begun is given up after a few seconds. A crashed worker or node is retried.
    """
    import ray

    running: dict[Any, tuple[int, int, Any]] = {}
    failed: list[tuple[Step, int, Exception]] = []
    first, give_up_at = 0, math.inf  # steps before the first one begin nothing any more
    for shard in shards:
        _hand_on(steps, shard)
    while True:
        for i in reversed(range(first, len(steps))):
            _submit(steps[i], i, running)
        if not running:
            break
        left = None if give_up_at == math.inf else max(0.0, give_up_at - time.monotonic())
        done, _ = ray.wait(list(running), num_returns=1, timeout=left)
        if not done:
            _give_up(running, first)
            give_up_at = math.inf
            continue
        i, shard, actor = running.pop(done[0])
        step = steps[i]
        step.running -= 1
        if actor is not None:
            step.actors.append(actor)
        try:
            on_record(step.job.stage, ray.get(done[0]))
        except (ray.exceptions.RayTaskError, ray.exceptions.RaySystemError, ray.exceptions.RayActorError,
                ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError) as error:
            failed.append((step, shard, error))
            if isinstance(error, ray.exceptions.RayActorError):  # no other shard waits for it
                step.actors.pop()
            if _stops_the_run(error) and i >= first:
                first, give_up_at = i + 1, time.monotonic() + STOP_SECONDS
            continue
        _hand_on(steps[i + 1 :], shard)
    if failed:
        own = {(step.job.stage, shard): cause_of(error) for step, shard, error in failed if _is_own(error)}
        raise ShardsFailed(_failure(failed), own if len(own) == len(failed) else {})


def _give_up(running: dict[Any, tuple[int, int, Any]], first: int) -> None:
    """Ends what steps before the first one have under way; nothing half-written is ever taken for whole."""
    import ray

    for reference, (i, _, actor) in list(running.items()):
        if i < first:
            ray.cancel(reference, force=True) if actor is None else ray.kill(actor)
            del running[reference]


def _stops_the_run(error: Exception) -> bool:
    return getattr(getattr(error, "cause", None), "stops_the_run", False)


def _is_own(error: Exception) -> bool:
    """Whether an error lies in its shard: not in what the machine lacks, and not in the run as a whole."""
    import ray

    cause = getattr(error, "cause", None) or error
    machine = (OSError, MemoryError, ImportError, ray.exceptions.OutOfMemoryError, ray.exceptions.RaySystemError)
    elsewhere = getattr(cause, "of_the_machine", False) or getattr(error, "actor_init_failed", False)
    return not (_stops_the_run(error) or elsewhere or isinstance(cause, machine))


def _hand_on(steps: list[Step], shard: int) -> None:
    """Gives a shard to the first of the steps that has not made it yet."""
    for step in steps:
        if shard in step.todo:
            step.waiting.append(shard)
            return


def _submit(step: Step, i: int, running: dict[Any, tuple[int, int, Any]]) -> None:
    """Starts what a step may start."""
    while step.waiting and step.running < step.resources.in_flight:
        shard = step.waiting.popleft()
        reference, actor = _start(step, shard)
        running[reference] = (i, shard, actor)
        step.running += 1


def _start(step: Step, shard: int) -> tuple[Any, Any]:
    """One shard on a task, or on an idle actor where the stage has a Worker that holds a model."""
    import ray

    needs = {"num_cpus": step.resources.num_cpus, "num_gpus": step.resources.num_gpus}
    module = importlib.import_module(step.module)
    worker = getattr(module, "Worker", None)
    if worker is None:
        if step.task is None:
            step.task = ray.remote(_run_shard).options(max_retries=SYSTEM_RETRIES, **needs)
        return step.task.remote(step.module, step.job, shard), None
    if not step.actors:
        step.actors.append(
            ray.remote(worker).options(max_restarts=RESTARTS, max_task_retries=SYSTEM_RETRIES, **needs).remote(step.job)
        )
    actor = step.actors.pop()
    return actor.run_shard.remote(shard), actor


class Shared:
    """One instance of a class for all workers of all runs on a cluster, in an actor that ends when nobody asks it.

    It belongs to no run, so that none that ends takes it from another, and nothing stays of those that are killed. The
    next question begins it anew; so it stays for `busy_seconds`, while what it knows matters.
    """

    def __init__(self, kind: type, idle_seconds: float) -> None:
        self.instance, self.idle_seconds = kind(), idle_seconds
        self.asked_at, self.lock = time.monotonic(), threading.Lock()
        threading.Thread(target=self._end_when_idle, daemon=True).start()

    def ask(self, *question: Any) -> Any:
        with self.lock:
            self.asked_at = time.monotonic()
            return self.instance.ask(*question)

    def _end_when_idle(self) -> None:
        import ray

        while (left := self._seconds_left()) > 0:
            time.sleep(left)
        ray.kill(ray.get_runtime_context().current_actor)

    def _seconds_left(self) -> float:
        with self.lock:
            return max(self.asked_at + self.idle_seconds - time.monotonic(), self.instance.busy_seconds())


def _asking(kind: type) -> Callable[..., Any]:
    """Asks the one instance that this cluster has, and waits for what it answers; one that has ended begins anew."""
    import ray

    def find() -> Any:
        shared = ray.remote(Shared).options(
            name=kind.__name__, namespace=NAMESPACE, get_if_exists=True, lifetime="detached", num_cpus=0
        )
        return shared.remote(kind, IDLE_SECONDS)

    actor = find()

    def ask(*question: Any) -> Any:
        nonlocal actor
        while True:
            try:
                return ray.get(actor.ask.remote(*question))
            except ray.exceptions.RayActorError as error:
                if getattr(error, "actor_init_failed", False):
                    raise
                actor = find()

    return ask


def _failure(failed: list[tuple[Step, int, Exception]]) -> str:
    step, shard, error = next((each for each in failed if _stops_the_run(each[2])), failed[0])
    stage = step.job.stage
    if _stops_the_run(error):
        return f"{stage} stopped at shard {shard}: {cause_of(error, step.job)}"
    others = f" and {len(failed) - 1} more" if len(failed) > 1 else ""
    return (
        f"{stage}: shard {shard}{others} failed; what else had begun is committed, and the same command goes on from "
        f"there. First cause: {_smaller(step, error) if _was_killed(error) else cause_of(error, step.job)}"
    )


def _was_killed(error: Exception) -> bool:
    """Whether a worker's process ended without a word, which is how the kernel and Ray end it when memory is short."""
    import ray

    killed = (ray.exceptions.WorkerCrashedError, ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError)
    return isinstance(error, killed) and not getattr(error, "actor_init_failed", False)


def _smaller(step: Step, error: Exception) -> str:
    """What to set where workers are killed: their sizes, as the stage's sizes(job) has them, and their number."""
    stage, needs = step.job.stage, step.resources
    sizes = getattr(importlib.import_module(step.module), "sizes", lambda job: {})(step.job)
    smaller = "".join(f"a lower {name} (now {value}) makes it smaller, " for name, value in sizes.items())
    return (
        f"{type(error).__name__}: its worker was killed again and again, as happens where memory runs out; "
        f"{smaller}a lower cluster.{stage}.in_flight (now {needs.in_flight}) or a higher "
        f"cluster.{stage}.num_cpus (now {needs.num_cpus:g}) lets fewer work at once"
    )


def cause_of(error: Exception, job: Job | None = None) -> str:
    """What went wrong in a worker, without Ray's account of how it heard of it."""
    cause = getattr(error, "cause", None) or error
    said = f"{type(cause).__name__}: {cause}"
    if job is None or getattr(cause, "errno", None) not in FULL:
        return said
    return (
        f"disk full: {said}; {job.output.path} is where {job.stage} writes. Free space there, or raise the quota or "
        f"the limit on file sizes (ulimit -f) that is met; nothing half-written counts, and the same command goes on"
    )


@contextmanager
def on_the_driver(job: Job) -> Iterator[None]:
    """A full disk that a stage meets in this process ends it as one that a worker meets."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise StageFailed(f"{job.stage} failed: {cause_of(error, job)}") from error


def run_once(module: str, job: Job, resources: Resources) -> Record:
    """Runs a stage that makes one result, on one worker of the cluster."""
    import ray

    needs = {"num_cpus": resources.num_cpus, "num_gpus": resources.num_gpus}
    try:
        return ray.get(ray.remote(max_calls=1, max_retries=0, **needs)(_run_whole).remote(module, job))
    except (ray.exceptions.RayTaskError, ray.exceptions.RaySystemError, ray.exceptions.WorkerCrashedError,
            ray.exceptions.OutOfMemoryError) as error:
        raise StageFailed(f"{job.stage} failed: {cause_of(error, job)}") from error


def _beside(work: Callable[[], object]) -> None:
    """Runs `work` in a thread of its own, so that signals stay ours: Ray Train would answer SIGINT by an abort."""
    outcome: Future[object] = Future()

    def run() -> None:
        try:
            outcome.set_result(work())
        except BaseException as error:  # it is raised again by whoever waits
            outcome.set_exception(error)

    threading.Thread(target=run, name="train", daemon=True).start()
    outcome.result()


class GroupFailed(RuntimeError):
    """A group of training processes ended too early: what each rank that failed met, and whether one of them had to
    leave, which is no fault of any."""

    def __init__(self, failures: dict[int, Exception], left: bool) -> None:
        super().__init__(f"{len(failures)} training processes failed")
        self.failures, self.left = failures, left


class Left(RuntimeError):
    """A training process was asked to leave, and did so when all had saved."""


TrainingWorker = Callable[[dict[str, Any], Callable[[], bool]], None]


def train_once(worker: TrainingWorker, arguments: dict[str, Any], job: Job) -> None:
    """Runs `worker(arguments, should_leave)` in processes that share a torch.distributed group, one for each GPU.

    Raises GroupFailed as soon as one of them fails. `should_leave()` is true once SIGTERM came to this process; a
    worker that returns after that has Left. Ray Train keeps notes of its own in a folder of the stage while the group
    runs.
    """
    from ray.train import FailureConfig, PreemptionError, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchConfig, TorchTrainer

    resources, scratch, name = job.how.cluster.train, job.output.path / ".ray", uuid.uuid4().hex[:12]
    trainer = TorchTrainer(
        _in_group,
        train_loop_config={"worker": worker, "arguments": arguments},
        torch_config=TorchConfig(backend="nccl" if resources.num_gpus else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=resources.workers,
            use_gpu=resources.num_gpus > 0,
            resources_per_worker={"CPU": resources.num_cpus, "GPU": resources.num_gpus},
        ),
        run_config=RunConfig(
            name=name,
            storage_path=str(scratch),
            failure_config=FailureConfig(max_failures=0, max_preemption_failures=0),
        ),
    )
    try:
        _beside(trainer.fit)
    except TrainingFailedError as error:
        failures = getattr(error, "worker_failures", None) or {0: getattr(error, "controller_failure", error)}
        failures = {rank: getattr(each, "health_check_failure", each) for rank, each in failures.items()}
        left = isinstance(error, PreemptionError) or any(map(_has_left, failures.values()))
        raise GroupFailed(failures, left) from error
    finally:
        shutil.rmtree(scratch / name, ignore_errors=True)


def check_room(config: ClusterConfig) -> None:
    """Says where the cluster has less than training asks for: Ray would wait for more without a word.

    Raises StageFailed on a Ray of our own, which never has more.
    """
    import ray

    train, there = config.train, ray.cluster_resources()
    asked = {"CPU": train.workers * train.num_cpus, "GPU": train.workers * train.num_gpus}
    short = [f"{need:g} {name}s where there are {there.get(name, 0):g}"
             for name, need in asked.items() if need > there.get(name, 0)]  # fmt: skip
    if short:
        what = f"training asks for {' and '.join(short)}: cluster.train.workers is {train.workers}"
        if config.address == "local":
            raise StageFailed(f"{what}; a lower number fits, or cluster.address of a larger cluster")
        print(f"{what}; it begins once the cluster has them", flush=True)


def _has_left(error: Exception) -> bool:
    """Whether a process left as it was asked to, or was taken away with its node before it could."""
    return isinstance(error, Left) or getattr(error, "preempted", False)


def _in_group(handed: dict[str, Any]) -> None:
    """Runs in every training process."""
    import torch.distributed as dist

    with stopping.sigterm_noted() as noted:
        handed["worker"](handed["arguments"], noted)
        dist.barrier()  # an error ends the others at once: first each of them has come to its end
        if noted():
            raise Left("SIGTERM asked this process to leave")

"""Process groups for tests: a server that has imported torch and DeepSpeed once forks the processes of each group.

Importing both takes ten seconds on a busy machine, a fork a few milliseconds.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import sys
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.ldm.training.preload"])


def run(
    function: Callable[..., Any],
    *args: Any,
    world_size: int = 1,
    env: dict[str, str] | None = None,
    seconds: float = 240,
    backend: str = "gloo",
) -> list[Any]:
    """function(*args) in each process of a group; returns the results in order of rank.

    A result is an exception where the function raised one, and the exit code where the process died.
    """
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        for rank in range(world_size):
            ours, theirs = _context.Pipe(duplex=False)
            process = _context.Process(
                target=_child, args=(theirs, function, args, rank, world_size, f"{folder}/store", env or {}, backend)
            )
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        results = [_result(pipe, process, seconds) for pipe, process in zip(pipes, processes, strict=True)]
    return results


def _result(pipe: Connection, process: Any, seconds: float) -> Any:
    wait([pipe, process.sentinel], timeout=seconds)
    try:
        result = pickle.loads(pipe.recv_bytes()) if pipe.poll() else None
    except EOFError:
        result = None
    process.join(30)
    if process.is_alive():
        process.kill()
        process.join()
    return process.exitcode if process.exitcode else result


def _child(
    pipe: Connection,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    rank: int,
    world_size: int,
    store: str,
    env: dict[str, str],
    backend: str,
) -> None:
    os.environ.update(env, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=world_size)
    try:
        # Plain bytes: torch would send its tensors as handles that die with this process.
        pipe.send_bytes(pickle.dumps(function(*args)))
    except Exception as error:  # what a test's function raises is a result
        traceback.print_exc(file=sys.stderr)
        pipe.send_bytes(pickle.dumps(error))
    pipe.close()
    sys.stdout.flush()
    os._exit(0)

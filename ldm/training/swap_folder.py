"""A folder on a local disk for what does not fit into memory: of one process alone, and gone when it ends.

DeepSpeed names its files by rank, and two runs on one machine that were told the same folder would write into each
other's: each process makes a folder of its own below it. Its lock ends with the process however that dies, so the next
run on the machine knows what nobody uses any more, and removes it.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from pathlib import Path

import torch
from torch import Tensor

PREFIX = "swap-"
SMALL_BYTES = 2**20  # what is smaller stays in memory


class SwapFolder:
    """A new folder below `parent`."""

    def __init__(self, parent: Path) -> None:
        parent.mkdir(parents=True, exist_ok=True)
        begun = _locked(parent, wait=True)  # nobody takes a folder for abandoned that is not locked yet
        for left in parent.glob(f"{PREFIX}*"):
            if (lock := _locked(left)) is not None:
                shutil.rmtree(left)
                os.close(lock)
        self.path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
        self._lock = _locked(self.path)
        os.close(begun)

    def tensor(self, numel: int) -> Tensor:
        """Float32 numbers (n,) that the system writes out when memory runs short; nothing of them stays behind."""
        if numel * 4 < SMALL_BYTES:
            return torch.empty(numel)
        with tempfile.NamedTemporaryFile(dir=self.path) as file:  # without a name it goes with the last who uses it
            claim(file.name, numel * 4)
            return torch.from_file(file.name, shared=True, size=numel, dtype=torch.float32)

    def close(self) -> None:
        """Removes what is in it."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


def claim(path: str, size: int) -> None:
    """Takes the room that a file needs, so that no write to it can fail for want of room."""
    with open(path, "ab") as file:
        if os.fstat(file.fileno()).st_size >= size:
            return
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            raise OSError(
                error.errno,
                f"{error.strerror}, for {size:,} bytes of what does not fit into memory. Make room there, or name a "
                f"larger disk in cluster.train.run.deepspeed.zero_optimization.offload_optimizer.nvme_path",
                path,
            ) from error


def _locked(folder: Path, wait: bool = False) -> int | None:
    """The handle that holds the lock of a folder; None where another process holds it, or the folder is not ours."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except (FileNotFoundError, PermissionError):
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        os.close(handle)
        return None
    return handle

"""The default job from an empty folder to its pictures: seconds, memory, figures; and what running it again costs.

    python -m tests.benchmarks.demo

Memory is the largest sum, over two-second intervals, of the proportional set sizes of all processes of the run, so that
what they share counts once.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from pipelines.config import CONF

INTERVAL_SECONDS = 2.0


def family(ancestor: int) -> Iterator[int]:
    """A process and all that it started, and all that those started."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue
        children.setdefault(parent, []).append(int(stat.parent.name))
    left = [ancestor]
    while left:
        yield (pid := left.pop())
        left += children.get(pid, [])


def memory_bytes(ancestor: int) -> int:
    total = 0
    for pid in family(ancestor):
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
        total += sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total


def run(outputs: Path) -> tuple[float, int, str]:
    """Seconds, peak memory in bytes and the last lines of one run of the default job."""
    command = [sys.executable, "-m", "pipelines.run", f"paths.outputs={outputs}"]
    started, peak = time.monotonic(), 0
    with subprocess.Popen(command, cwd=CONF.parent, stdout=subprocess.PIPE, text=True) as process:
        while process.poll() is None:
            peak = max(peak, memory_bytes(process.pid))
            time.sleep(min(INTERVAL_SECONDS, 0.1 + time.monotonic() - started))
        text = process.stdout.read() if process.stdout else ""
    if process.returncode:
        raise RuntimeError(f"the run ended with {process.returncode}:\n{text}")
    return time.monotonic() - started, peak, text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--outputs", type=Path, help="an empty folder to keep; otherwise one that goes away")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        outputs = arguments.outputs or Path(temporary)
        seconds, peak, text = run(outputs)
        again, _, _ = run(outputs)
        figures = json.loads((outputs / "openmoji/evaluate/metrics.json").read_text())
    print(text)
    print(f"from nothing to pictures: {seconds:.0f} s; peak memory {peak / 1e9:.1f} GB; again: {again:.1f} s")
    print(json.dumps(figures, indent=1))
    print(f"load average at the end: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")


if __name__ == "__main__":
    main()

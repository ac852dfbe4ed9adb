"""Near-duplicates among many hashes: seconds, and memory at the peak, under a budget that makes them spill.

    python -m tests.benchmarks.near_duplicates hashes=1000000,10000000 bits=3 memory_bytes=1000000000 folder=FOLDER

Hashes by chance; every tenth of them is near another one. Each number of hashes is tried in a process of its own, and
the time by which it grows from one to the next is told as a power of their number.
"""

from __future__ import annotations

import json
import math
import resource
import subprocess
import sys
import time
from pathlib import Path


def main() -> None:
    given = dict(argument.split("=", 1) for argument in sys.argv[1:])
    settings = {"bits": int(given.get("bits", 3)), "memory_bytes": int(given.get("memory_bytes", 10**9)),
                "threads": int(given.get("threads", 2)), "folder": given["folder"]}  # fmt: skip
    counts = [int(count) for count in given.get("hashes", "1000000,10000000").split(",")]
    if "part" in given:
        print(json.dumps(measure(counts[0], **settings)))
        return
    before = None
    for count in counts:
        arguments = [f"{name}={value}" for name, value in {**settings, "hashes": count, "part": 1}.items()]
        command = [sys.executable, "-m", "tests.benchmarks.near_duplicates", *arguments]
        figures = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
        growth = ""
        if before is not None:
            power = math.log(figures["seconds"] / before[1]) / math.log(count / before[0])
            growth = f", which grows with the power {power:.2f}"
        print(f"{count:,} hashes, {settings['bits']} bits: {figures['seconds']:.1f} s ({figures['orders']} sorts, "
              f"{1e6 * figures['seconds'] / count:.1f} us a hash{growth}); {figures['falls']:,} fall; at the peak "
              f"{figures['memory']:,.0f} MB more memory, of a budget of {settings['memory_bytes'] / 1e6:,.0f} MB "
              f"and three bytes for each, {figures['spilled']:,.0f} MB of files", flush=True)  # fmt: skip
        before = count, figures["seconds"]


def measure(count: int, bits: int, memory_bytes: int, threads: int, folder: str) -> dict[str, float]:
    from pipelines.selecting import near_duplicates
    from pipelines.settings import TableResources
    from pipelines.spilling import database

    scratch = Path(folder)
    scratch.mkdir(parents=True, exist_ok=True)
    spilled, batches = [0], near_duplicates._batches

    def looking(*given: object):
        for batch in batches(*given):
            spilled[0] = max(spilled[0], sum(path.stat().st_size for path in scratch.iterdir()))
            yield batch

    near_duplicates._batches = looking
    with database(scratch, TableResources(threads, memory_bytes)) as tables:
        each = count - count // 10
        one = "(1::UBIGINT << (hash(i + 7) % 64)::INT)"
        tables.execute(f"""CREATE TABLE samples AS SELECT i AS place, CASE WHEN i < {each} THEN hash(i)
            ELSE xor(hash(hash(i) % {each}), {one}) END::UBIGINT AS phash FROM range({count}) t(i)""")
        before, begun = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
        falls = near_duplicates.near_duplicates(tables, count, bits)
        seconds = time.monotonic() - begun
    memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return {"seconds": seconds, "memory": memory, "falls": int(falls.sum()), "spilled": spilled[0] / 1e6,
            "orders": len(near_duplicates.sortings(count, bits))}  # fmt: skip


if __name__ == "__main__":
    main()

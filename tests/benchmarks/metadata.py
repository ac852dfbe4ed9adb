"""filter_metadata against a hand-written query over the same rows: rows a second and memory.

    python -m tests.benchmarks.metadata rows=10000000 rounds=5 folder=FOLDER     each in a process of its own, in turn

The rows look like LAION's: 70 characters of URL, 60 of caption, one row in twenty a duplicate of another. The query by
hand applies the same filters, keeps one row for each URL and writes one parquet file; filter_metadata also gives every
dropped row its reason, keeps the order and writes committed shards of 10,000 rows. The number of rows that stay must be
the same for all of them.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import resource
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

FILES = 8
RULES = """trim(URL) <> '' AND length(trim(TEXT)) >= 3 AND least(WIDTH, HEIGHT) >= 96
    AND greatest(WIDTH, HEIGHT) <= 3 * least(WIDTH, HEIGHT)
    AND similarity BETWEEN 0.28 AND 1.0 AND punsafe <= 0.5 AND pwatermark <= 0.8"""
ENGINES = {"make": "duckdb", "duckdb": "duckdb", "arrow": "pyarrow.dataset", "polars": "polars",
           "stage": "pipelines.stages.filter_metadata"}  # fmt: skip
COLUMNS = "URL, TEXT, WIDTH, HEIGHT, similarity, punsafe, pwatermark"


def main() -> None:
    given = dict(argument.split("=", 1) for argument in sys.argv[1:])
    folder, rows = Path(given["folder"]), int(given.get("rows", 10_000_000))
    if "part" in given:
        print(json.dumps(measure(given["part"], folder, rows)), flush=True)
        return
    folder.mkdir(parents=True, exist_ok=True)
    in_process("make", folder, rows)
    figures: dict[str, list[dict[str, float]]] = {}
    for _ in range(int(given.get("rounds", 5))):
        for part in ("duckdb", "arrow", "polars", "stage"):
            if importlib.util.find_spec(ENGINES[part].partition(".")[0]):
                figures.setdefault(part, []).append(in_process(part, folder, rows))
    if len({figure["stay"] for each in figures.values() for figure in each}) > 1:
        raise RuntimeError(f"the number of rows that stay differs: {figures}")
    for part, each in figures.items():
        wall, core = (_spread([rows / figure[clock] for figure in each]) for clock in ("seconds", "cpu"))
        memory = max(figure["memory"] for figure in each)
        print(f"{part:<8}{wall} rows/s   {core} rows a core second   {memory:,.0f} MB at most")
    ratios = [hand["seconds"] / ours["seconds"] for hand, ours in zip(figures["duckdb"], figures["stage"], strict=True)]
    print(f"stage over duckdb by wall clock, round by round: {statistics.median(ratios):.2f} "
          f"({min(ratios):.2f} to {max(ratios):.2f}); goal 0.5")  # fmt: skip


def in_process(part: str, folder: Path, rows: int) -> dict[str, float]:
    command = [sys.executable, "-m", "tests.benchmarks.metadata", f"folder={folder}", f"rows={rows}", f"part={part}"]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


def _spread(figures: list[float]) -> str:
    return f"{statistics.median(figures):>10,.0f} ({min(figures):,.0f} to {max(figures):,.0f})"


def measure(part: str, folder: Path, rows: int) -> dict[str, float]:
    """Runs one part: the rows that stay, seconds by both clocks, megabytes at the peak."""
    work = {"make": make, "duckdb": by_duckdb, "arrow": by_arrow, "polars": by_polars, "stage": by_stage}[part]
    importlib.import_module(ENGINES[part])  # which a job of any length does once
    begun, cpu = time.monotonic(), time.process_time()
    stay = work(folder, rows)
    seconds, cpu = time.monotonic() - begun, time.process_time() - cpu
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"stay": stay, "seconds": seconds, "cpu": cpu, "memory": memory}


def make(folder: Path, rows: int) -> int:
    import duckdb

    database, each = duckdb.connect(config={"threads": 2, "memory_limit": "1500MB"}), rows // FILES
    different = rows * 19 // 20
    for i in range(FILES):
        database.execute(f"""COPY (SELECT
            'https://host' || (hash(i % {different} + 1) % 50000) || '.com/images/' || hash(i % {different})
                || '/photo-' || (i % {different}) || '.jpg' AS URL,
            CASE WHEN hash(i + 9) % 200 > 0 THEN
                'a photo of ' || (hash(i + 2) % 100000) || ' ' || md5(i::VARCHAR) || ' in the garden' END AS TEXT,
            (hash(i + 3) % 1900)::INT AS HEIGHT, (hash(i + 4) % 1900)::INT AS WIDTH,
            0.2 + (hash(i + 5) % 1000) / 4000.0 AS similarity, ((hash(i + 6) % 1000) / 1000.0)::FLOAT AS punsafe,
            ((hash(i + 7) % 1000) / 1000.0)::FLOAT AS pwatermark
            FROM range({i * each}, {(i + 1) * each}) t(i)) TO '{folder}/part-{i:05d}.parquet' (COMPRESSION snappy)""")
    return rows


def by_duckdb(folder: Path, rows: int) -> int:
    import duckdb

    database = duckdb.connect(config={"threads": 2, "memory_limit": "1200MB", "temp_directory": str(folder / "spill")})
    database.execute(f"""COPY (SELECT {COLUMNS} FROM (
        SELECT {COLUMNS}, row_number() OVER (PARTITION BY URL ORDER BY file, row) AS nth FROM (
            SELECT *, filename AS file, file_row_number AS row
            FROM read_parquet('{folder}/part-*.parquet', filename = true, file_row_number = true)) WHERE {RULES})
        WHERE nth = 1) TO '{folder}/by_duckdb.parquet' (COMPRESSION zstd)""")
    (kept,) = database.execute(f"SELECT count(*) FROM '{folder}/by_duckdb.parquet'").fetchone()
    return kept


def by_arrow(folder: Path, rows: int) -> int:
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.dataset as ds
    import pyarrow.parquet as pq

    field, single = pc.field, pa.float32()  # as DuckDB compares a FLOAT
    least = pc.min_element_wise(field("WIDTH"), field("HEIGHT"))
    most = pc.max_element_wise(field("WIDTH"), field("HEIGHT"))
    rules = ((pc.utf8_length(pc.utf8_trim_whitespace(field("TEXT"))) >= 3) & (least >= 96) & (most <= least * 3)
             & (field("similarity") >= 0.28) & (field("similarity") <= 1) & (field("punsafe") <= pa.scalar(0.5, single))
             & (field("pwatermark") <= pa.scalar(0.8, single)))  # fmt: skip
    files = sorted(map(str, folder.glob("part-*.parquet")))
    table = ds.dataset(files).to_table(columns=COLUMNS.split(", "), filter=rules)
    others = [(name, "first") for name in COLUMNS.split(", ")[1:]]
    kept = table.group_by("URL", use_threads=False).aggregate(others)
    pq.write_table(kept, folder / "by_arrow.parquet", compression="zstd")
    return kept.num_rows


def by_polars(folder: Path, rows: int) -> int:
    import polars as pl

    least, most = pl.min_horizontal("WIDTH", "HEIGHT"), pl.max_horizontal("WIDTH", "HEIGHT")
    rules = ((pl.col("TEXT").str.strip_chars().str.len_chars() >= 3) & (least >= 96) & (most <= least * 3)
             & pl.col("similarity").is_between(0.28, 1) & (pl.col("punsafe") <= 0.5)
             & (pl.col("pwatermark") <= pl.lit(0.8, pl.Float32)))
    found = pl.scan_parquet(folder / "part-*.parquet").filter(rules)
    kept = found.unique("URL", keep="first", maintain_order=True).select(COLUMNS.split(", "))
    kept.sink_parquet(folder / "by_polars.parquet", compression="zstd")
    return pl.scan_parquet(folder / "by_polars.parquet").select(pl.len()).collect().item()


def by_stage(folder: Path, rows: int) -> int:
    from pipelines.config import compose
    from pipelines.dag import Dag
    from pipelines.manifest import StageFolder
    from pipelines.stages import filter_metadata

    output = folder / "stage"
    shutil.rmtree(output, ignore_errors=True)
    job = Dag(compose(["dataset.filter_metadata.shard_samples=10000"])).job("filter_metadata")
    source = replace(job.what["dataset.source"], metadata=str(folder / "part-*.parquet"))
    job = replace(job, what={**job.what, "dataset.source": source}, output=StageFolder(output, "filter_metadata"))
    return filter_metadata.run(job)["samples"]


if __name__ == "__main__":
    main()

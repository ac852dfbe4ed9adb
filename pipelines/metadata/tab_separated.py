"""Tab-separated metadata without a header, as CC12M and CC3M have it; its columns are called column0, column1, ...

A line is cut at its first tabs only, so that the last column may hold tabs, and nothing in a line can spoil the lines
after it: there are no quotes, no escapes, and bytes that are no UTF-8 become U+FFFD.
"""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

LINES = 100_000  # that are held at once


def as_parquet(file: Path, path: Path, columns: dict[str, str]) -> None:
    """Writes the file as parquet. A column that a line does not reach is null."""
    names = [f"column{i}" for i in range(1 + max(map(_number, columns.values())))]
    schema = pa.schema([(name, pa.string()) for name in names])
    with open(file, "rb") as lines, pq.ParquetWriter(path, schema) as writer:
        while block := list(islice(lines, LINES)):
            cells = [line.rstrip(b"\r\n").split(b"\t", len(names) - 1) for line in block]
            values = [[_text(row[i]) if i < len(row) else None for row in cells] for i in range(len(names))]
            writer.write_table(pa.table(values, schema=schema))


def _text(cell: bytes) -> str:
    return cell.decode("utf-8", "replace")


def _number(column: str) -> int:
    """Raises ValueError for a name that no column of such a file has."""
    head, number = column[:6], column[6:]
    if head != "column" or not number.isdigit():
        raise ValueError(
            f"dataset.source.columns: found {column!r}, but a tsv file has no header; expected column0, column1, ..."
        )
    return int(number)

"""Parquet whose text is not UTF-8 throughout, as crawls leave it behind: DuckDB would refuse the whole file.

Such a file is written again with the columns that are needed, row for row. A row with broken text has NOT_UTF8 for its
URL there and falls by that; all else is as it was.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

NOT_UTF8 = "\x7fnot UTF-8"  # no URL begins with a control character
ROWS = 1 << 14  # that are held at once
ENDING_BYTES = 8  # of a parquet file: the length of its footer, and PAR1


def mended(file: Path, path: Path, columns: list[str], url: str) -> None:
    """Writes the columns of a file anew, with NOT_UTF8 in column `url` of rows with broken text."""
    with pq.ParquetFile(file, metadata=_plain_metadata(file)) as source:
        writer = None
        for batch in source.iter_batches(ROWS, columns=columns):
            table = _mended(batch, url)
            writer = writer or pq.ParquetWriter(path, table.schema)
            writer.write_table(table)
        if writer is not None:
            writer.close()


def _plain_metadata(file: Path) -> pq.FileMetaData:
    """What a file says of itself, without Arrow's own schema: it may name types that run code when they are read."""
    with open(file, "rb") as source:
        source.seek(-ENDING_BYTES, io.SEEK_END)
        footer_bytes = int.from_bytes(source.read(4), "little")
        source.seek(-ENDING_BYTES - footer_bytes, io.SEEK_END)
        footer = source.read()
    return pq.read_metadata(io.BytesIO(b"PAR1" + footer.replace(b"ARROW:schema", b"not_a_schema")))


def _mended(batch: pa.RecordBatch, url: str) -> pa.Table:
    broken, columns = np.zeros(batch.num_rows, bool), {}
    for name, values in zip(batch.schema.names, batch.columns, strict=True):
        if pa.types.is_string(values.type):
            wrong = _no_utf8(values)
            broken |= wrong
            values = pc.if_else(pa.array(wrong), pa.scalar(None, values.type), values)
        columns[name] = values
    columns[url] = pc.if_else(pa.array(broken), NOT_UTF8, columns[url])
    return pa.table(columns)


def _no_utf8(values: pa.StringArray) -> np.ndarray:
    """(n,) bool: the strings that are none."""
    try:
        values.validate(full=True)
    except pa.ArrowInvalid:
        return np.array([value is not None and not _is_utf8(value) for value in values.cast(pa.binary()).to_pylist()])
    return np.zeros(len(values), bool)


def _is_utf8(value: bytes) -> bool:
    try:
        value.decode()
    except UnicodeDecodeError:
        return False
    return True

"""Tables that may be larger than memory: a DuckDB that puts what does not fit into files. The one file that knows it.

    with database(scratch, job.how.cluster.filter_metadata) as tables:
        tables.execute("CREATE TABLE ...")
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import duckdb

from pipelines.settings import TableResources

Tables = duckdb.DuckDBPyConnection
Error, InvalidInput, VERSION = duckdb.Error, duckdb.InvalidInputException, duckdb.__version__
SPILLED = "duckdb_temp"  # what the names of its files begin with


class NoRoom(RuntimeError):
    """What a table needs fits neither into memory nor onto the disk."""


@contextmanager
def database(scratch: Path, limits: TableResources) -> Iterator[Tables]:
    """An empty database that keeps to the limits and spills into the folder `scratch`. Raises NoRoom when it cannot."""
    tables = duckdb.connect(":memory:", config={
        "temp_directory": str(scratch), "threads": limits.threads, "memory_limit": f"{limits.memory_bytes}B",
        "preserve_insertion_order": True, "autoinstall_known_extensions": False,
    })  # fmt: skip
    try:
        tables.execute("SET enable_progress_bar = false")
        yield tables
    except Error as error:
        if not lacks_room(error):
            raise
        free = shutil.disk_usage(scratch).free
        raise NoRoom(
            f"tables of more than cluster.filter_metadata.memory_bytes={limits.memory_bytes} go to {scratch}, where "
            f"{free:,} bytes are free and no more could be written: {str(error).splitlines()[0]} Free some there, or "
            f"set a higher cluster.filter_metadata.memory_bytes where there is memory; the same command tries again"
        ) from error
    finally:
        tables.close()


def lacks_room(error: Exception) -> bool:
    """Whether DuckDB failed for want of memory or at files of its own, and not at those that it was given."""
    return isinstance(error, duckdb.OutOfMemoryException) or isinstance(error, Error) and SPILLED in str(error)

"""Gives a finished data set its next edition: new rows of metadata, and URLs that failed and may do better today.

    python -m pipelines.extend                          rows of metadata files that have come since
    python -m pipelines.extend retry=transient          and the URLs that failed for a passing reason
    python -m pipelines.extend retry=http_403,dns       or for these reasons; retry=all takes them all
    python -m pipelines.extend name=mine dataset=cc12m  which run: the same arguments as pipelines.run

What is new becomes new shards of filter_metadata, after those that are there; nothing that is done is touched. Then
`python -m pipelines.run` downloads, judges and encodes the new shards and closes edition n + 1. A model that was
trained before stays as it is, on the edition that it was trained on; name=OTHER trains on the new one.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ldm.storage import StorageError
from pipelines.config import Config, ConfigError, compose
from pipelines.dag import Dag, check_places
from pipelines.fetch import WORTH_RETRYING
from pipelines.lock import LockedError, lock
from pipelines.manifest import StageFolder, StaleError, shard_name

if TYPE_CHECKING:
    import pyarrow as pa

TRANSIENT = (*WORTH_RETRYING, "dns")


def main(arguments: list[str] | None = None) -> int:
    """The command. Returns the exit code: 0 done or nothing to do, 2 the request does not fit."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
        return 0
    retry = [argument.partition("=")[2] for argument in arguments if argument.startswith("retry=")]
    try:
        config = compose([argument for argument in arguments if not argument.startswith("retry=")])
        check_places(config)
        print(extend(config, set(retry[-1].split(",")) if retry else set()))
    except (ConfigError, StaleError, LockedError, FileNotFoundError, StorageError, ValueError) as error:
        print(f"\n{error}\n", file=sys.stderr)
        return 2
    return 0


def extend(config: Config, retry: set[str]) -> str:
    """Adds an edition to filter_metadata; returns what to say of it."""
    from pipelines.stages import filter_metadata

    dag = Dag(config)
    with lock(dag.home("filter_metadata") / "lock", f"extend of {config.name}"):
        status, download = dag.refresh("filter_metadata"), dag.refresh("download").job.output
        manifest = status.job.output.manifest()
        if not status.done or manifest is None:
            raise ConfigError(
                f"filter_metadata in {status.job.output.path} is not finished, so there is nothing to extend; "
                f"python -m pipelines.run +stage=filter_metadata name={config.name} finishes it"
            )
        if retry and not dag.statuses["download"].done:
            raise ConfigError(
                f"download in {download.path} is not finished, so nothing is known of what failed for good; "
                f"python -m pipelines.run +stage=download name={config.name} finishes it"
            )
        metadata = status.job.output
        _clear_unfinished(metadata, len(manifest["shards"]))
        failed = failures(metadata, download)
        wanted = reasons_meant(retry, failed)
        files = filter_metadata.source_files(status.job)
        added = filter_metadata.extend(status.job, files, manifest, failed_rows(metadata, download, wanted))
        if not added["rows"]:
            told = ", ".join(f"{reason} {count}" for reason, count in failed.most_common()) or "none"
            return f"Nothing to add. URLs that failed and were not tried again: {told}"
        edition = manifest["edition"] + 1
        records = list(metadata.committed().values())
        editions = {row["shard"]: row["edition"] for row in manifest["shards"]}
        editions |= {record.shard: edition for record in records if record.shard not in editions}
        funnel = _sum(manifest["funnel"], added)
        read = filter_metadata.sources(status.job, files)
        metadata.close(status.job.fingerprint, records, funnel, editions=editions, sources=read)
    return (
        f"Edition {edition}: {added['samples']} rows in {len(records) - len(manifest['shards'])} new shards "
        f"({sum(added['dropped'].values())} new rows fell: {added['dropped']}); python -m pipelines.run fetches them"
    )


def _clear_unfinished(metadata: StageFolder, listed: int) -> None:
    """Takes away the shards of an edition that was never closed; they would be written just so again."""
    metadata.forget(metadata.shards()[listed:])
    metadata.sweep()


def _sum(old: dict, new: dict) -> dict:
    dropped = Counter(old["dropped"]) + Counter(new["dropped"])
    return {"rows": old["rows"] + new["rows"], "samples": old["samples"] + new["samples"],
            "dropped": dict(sorted(dropped.items()))}  # fmt: skip


# -- the ledger -------------------------------------------------------------------------------------------------------
def reasons_meant(retry: set[str], failed: Counter[str]) -> set[str]:
    """The reasons that are asked for. Raises ConfigError for a word that is none."""
    if "all" in retry:
        return set(failed)
    meant = {reason for word in retry for reason in (TRANSIENT if word == "transient" else (word,))}
    unknown = retry - {"transient"} - set(failed) - set(TRANSIENT)
    if unknown:
        raise ConfigError(
            f"retry={','.join(sorted(unknown))}: nothing failed for that; expected transient, all, or some of: "
            f"{', '.join(f'{reason} ({count})' for reason, count in failed.most_common())}"
        )
    return meant


def failures(metadata: StageFolder, download: StageFolder) -> Counter[str]:
    """URLs without a picture by reason; one that was tried again counts by its last try only."""
    tried, found = retried_keys(metadata), Counter[str]()
    for shard in download.committed():
        for row in _ledger(download, shard):
            if row["key"] not in tried:
                found[row["reason"]] += 1
    return found


def failed_rows(metadata: StageFolder, download: StageFolder, reasons: set[str]) -> Iterator[pa.Table]:
    """The rows that failed for one of these reasons, in key order, shard by shard, as a new shard takes them."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    tried = retried_keys(metadata)
    for shard in download.committed() if reasons else ():
        again = {row["key"] for row in _ledger(download, shard) if row["reason"] in reasons} - tried
        if again:
            rows = pq.read_table(metadata.data(f"{shard_name(shard)}.parquet"))
            rows = rows.filter(pa.array([key in again for key in rows["key"].to_pylist()]))
            keys = rows["key"]
            rows = rows.drop([name for name in ("key", "retry_of") if name in rows.column_names])
            yield rows.append_column("retry_of", keys)


def retried_keys(metadata: StageFolder) -> set[str]:
    """Keys of rows that came again in a later shard."""
    import pyarrow.parquet as pq

    keys: set[str] = set()
    for shard in metadata.committed():
        file = pq.ParquetFile(metadata.data(f"{shard_name(shard)}.parquet"))
        if "retry_of" in file.schema_arrow.names:
            keys.update(key for key in file.read(["retry_of"])["retry_of"].to_pylist() if key is not None)
    return keys


def _ledger(download: StageFolder, shard: int) -> list[dict]:
    """The rows of a shard that have no picture: key and reason."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    rows = pq.read_table(download.data(f"{shard_name(shard)}.parquet"), columns=["key", "reason"],
                         filters=pc.field("reason") != "")  # fmt: skip
    return rows.to_pylist()


if __name__ == "__main__":
    sys.exit(main())

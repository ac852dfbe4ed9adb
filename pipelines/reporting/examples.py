"""Examples of a run's data for the report: pictures that are used, pictures that are not by what they fell by, and
addresses that gave no picture.

Of what was downloaded and fell later the bytes are there to be shown. Of what fell while it was downloaded nothing was
kept but the ledger's line, so those addresses are written as text: the page asks no server for anything.
"""

from __future__ import annotations

import heapq
import zlib
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

from pipelines.manifest import StageFolder, shard_name
from pipelines.reporting.data import judged_of, rows_of, selection_reasons, spread
from pipelines.reporting.page import cell, embed, figure

SHARDS = 8  # whose pictures are looked through
PICTURE_BYTES = 256_000_000  # that are read of all of them
KEPT_EXAMPLES, DROPPED_EXAMPLES, ADDRESSES = 36, 12, 5
ADDRESS_CHARS = 160
PICTURES = ("jpg", "png", "webp", "gif")


def example_sections(folders: dict[str, StageFolder], dropped: Mapping[str, Mapping[str, int]]) -> list[str]:
    """Contact sheets and addresses by reason; `dropped` has the counts of each stage by reason."""
    if "download" not in folders:
        return []
    parts = []
    if "filter_images" in folders:
        counts = {**dropped.get("filter_images", {}), **dropped.get("train", {})}
        sheets = examples(folders)
        if kept := sheets.pop("", []):
            parts = ["<h3>Kept</h3>", _sheet(kept)]
        for reason in sorted(sheets):
            parts += [f"<h3>Dropped: {_named(reason, counts)}</h3>", _sheet(sheets[reason])]
    return [*parts, *_addresses(folders["download"], dropped.get("download", {}))]


def _named(reason: str, counts: Mapping[str, int]) -> str:
    count = f" ({counts[reason]:,})" if reason in counts else ""
    return cell(reason.replace("_", " ") + count)


def _sheet(pictures: list[tuple[bytes, str]]) -> str:
    return f'<div class="sheet">{"".join(figure(_thumbnail(data), caption) for data, caption in pictures)}</div>'


def _thumbnail(data: bytes) -> str:
    """A small embedded picture; empty for what no decoder takes, which may be why it was dropped."""
    try:
        return embed(data, side=128, quality=80)
    except (OSError, ValueError, SyntaxError):  # what Pillow raises for broken files
        return ""


class Few:
    """A bounded number of examples by reason: those whose keys have the lowest hashes, so any part of a data set."""

    def __init__(self, dropped: int, kept: int = 0) -> None:
        self.dropped, self.kept = dropped, kept
        self.found: dict[str, list[tuple[int, str, Any]]] = defaultdict(list)

    def add(self, reason: str, key: str, example: Any) -> None:
        heap, most = self.found[reason], self.dropped if reason else self.kept
        (heapq.heappush if len(heap) < most else heapq.heappushpop)(heap, (-zlib.crc32(key.encode()), key, example))

    def by_reason(self) -> dict[str, list[Any]]:
        """The examples of each reason, in the order of their keys."""
        return {reason: [example for _, _, example in sorted(heap, key=lambda item: item[1])]
                for reason, heap in self.found.items()}  # fmt: skip


def examples(folders: dict[str, StageFolder]) -> dict[str, list[tuple[bytes, str]]]:
    """Reason ("" for kept) -> [(picture bytes, caption)], from shards spread evenly over the run."""
    few = Few(DROPPED_EXAMPLES, KEPT_EXAMPLES)
    for key, reason, data, caption in _judged(folders):
        few.add(reason, key, (data, caption))
    return few.by_reason()


def _judged(folders: dict[str, StageFolder]) -> Iterator[tuple[str, str, bytes, str]]:
    """(key, reason, picture, caption) of downloaded samples, PICTURE_BYTES of them at most."""
    from ldm.shards import iterate_tar

    shards = spread(folders["filter_images"].shards(), SHARDS)
    selected = selection_reasons(folders, shards)
    for shard in shards:
        fates = judged_of(folders["filter_images"], shard, selected.get(shard))
        # Of a shard that was quarantined nothing is read: it may be its tar that cannot be.
        left = PICTURE_BYTES // len(shards)
        for key, fields in iterate_tar(folders["download"].data(f"{shard_name(shard)}.tar")) if fates else ():
            data = next((fields[name] for name in PICTURES if name in fields), b"")
            yield key, fates[key].reason, data, fields.get("txt", b"").decode(errors="replace")
            left -= len(data)
            if left < 0:
                break


def _addresses(download: StageFolder, counts: Mapping[str, int]) -> list[str]:
    """What gave no picture: exact counts, and a few addresses of each reason as text."""
    few = Few(ADDRESSES)
    for shard in spread(download.shards(), SHARDS):
        for row in rows_of(download, shard, ("key", "url", "reason")):
            if row["reason"]:
                few.add(row["reason"], row["key"], row["url"])
    found = few.by_reason()
    if not found:
        return []
    note = (
        "No bytes are kept of what fell while it was downloaded, so there is no picture to show; these are some of the "
        "addresses. Rows that fell before that were asked of nobody."
    )
    lines = [f"<h3>Without a picture</h3><p class='soft'>{note}</p>"]
    for reason in sorted(found, key=lambda reason: (-counts.get(reason, 0), reason)):
        shown = "".join(f"<li><code>{cell(_short(url))}</code></li>" for url in found[reason])
        lines.append(f"<p>{_named(reason, counts)}</p><ul>{shown}</ul>")
    return lines


def _short(url: str) -> str:
    return url if len(url) <= ADDRESS_CHARS else f"{url[:ADDRESS_CHARS]}..."

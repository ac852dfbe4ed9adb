"""The journal: what a run has to say, in append-only files on disk, one for each writer.

    outputs/<name>/journal/train/driver.jsonl      what the driver says of the stage
    outputs/<name>/journal/train/rank0.jsonl       what the training worker says: losses, images/s, grids
    outputs/<name>/journal/train/rank0.sent.json   how far pipelines/tracking.py has sent it to MLflow

Writing is one append of one line: no network, no lock, no wait, so a server that is away costs a training
step nothing. The journal is the truth; MLflow is a view of it that can be made again (`python -m
pipelines.sync`), and so is the report. A writer that dies in the middle of a line leaves a torn one: it is
skipped, the others stand.

A training that goes back begins another way: a line of kind "rewind" says to which step, and lines of later steps
before it fall. Ways of a stage are numbered; the first, which no line begins, is way 0.
"""

from __future__ import annotations

import json
import math
import os
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm.storage import is_remote

RUN = "run"  # the journal of the DAG itself stands beside those of its stages
DRIVER = "driver"  # the writer that tells of what happened, once; the others are processes that a restart puts back
FROM_NOTHING = -1  # the step before all others, and before what is told of none


def journal_path(output: str | Path, stage: str, writer: str = DRIVER) -> Path:
    """The journal of one writer of one stage of the run whose results lie in `output`."""
    return Path(output) / "journal" / stage / f"{writer}.jsonl"


def journal_paths(output: str | Path, stage: str) -> list[Path]:
    """Every journal of a stage, in order of name."""
    return sorted((Path(output) / "journal" / stage).glob("*.jsonl"))


def output_of(path: str | Path) -> Path:
    """The run's folder of a journal."""
    return Path(path).absolute().parents[2]


class Journal:
    """Appends to one journal, from any thread. Any process may open one; only one at a time writes to a file."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).absolute()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._handle = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        size = os.fstat(self._handle).st_size
        self._lock, self._closed = threading.Lock(), False
        self._torn = size > 0 and os.pread(self._handle, 1, size - 1) != b"\n"

    def metrics(self, values: Mapping[str, float], step: int | None = None) -> None:
        """Numbers at a step. Steps of one name rise; a step said twice (after a restart, say) counts once."""
        self._append("metrics", step=step, values={name: float(value) for name, value in values.items()})

    def params(self, values: Mapping[str, Any]) -> None:
        """Settings; nested mappings and lists become dotted names."""
        self._append("params", values=flatten(values))

    def tags(self, values: Mapping[str, Any]) -> None:
        self._append("tags", values={name: str(value) for name, value in values.items()})

    def text(self, name: str, text: str) -> None:
        """A text file among the run's artifacts, `name` with its ending."""
        self._append("text", name=name, text=text)

    def table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Rows with named columns, shown as a table."""
        self._append("table", name=name, rows=[dict(row) for row in rows])

    def image(self, key: str, path: str | Path, step: int | None = None) -> None:
        """A picture that lies on disk and stays there; one key over many steps becomes a slider."""
        self._append("image", key=key, path=self._place(path), step=step)

    def artifact(self, path: str | Path, folder: str = "") -> None:
        """A small file that lies on disk and stays there (report, metrics, card)."""
        self._append("artifact", path=self._place(path), folder=folder)

    def dataset(self, name: str, digest: str, path: str | Path, context: str = "training") -> None:
        """A data set that the run reads, by the digest of its manifest."""
        self._append("dataset", name=name, digest=digest, path=self._place(path), context=context)

    def model(
        self, name: str, path: str | Path, sha256: str, step: int, values: Mapping[str, float] | None = None
    ) -> None:
        """Weights that lie on disk and stay there: a checkpoint, by the hash of its manifest, and what it measured."""
        self._append("model", name=name, path=self._place(path), sha256=sha256, step=step, values=dict(values or {}))

    def model_removed(self, name: str, step: int) -> None:
        """Weights that were told of are no longer kept."""
        self._append("model_removed", name=name, step=step)

    def status(self, status: str, reason: str = "") -> None:
        """RUNNING, FINISHED, FAILED or KILLED."""
        self._append("status", status=status, reason=reason)

    def rewind(self, step: int, why: str = "", way: int | None = None) -> None:
        """Training goes back to `step`, `why` by which settings: what was told of later steps is abandoned."""
        beside = self.path.parent.glob("*.jsonl")
        self._append("rewind", step=step, why=why, way=way or 1 + max(_newest_way(path) for path in beside))

    def close(self) -> None:
        """No line after this: the handle's number may be another file's by then."""
        with self._lock:
            if not self._closed:
                self._closed = True
                os.close(self._handle)

    def _place(self, path: str | Path) -> str:
        """From the run's own folder when the path lies there, so that the folder may be moved."""
        if is_remote(path):
            return str(path)
        absolute, output = Path(os.path.abspath(path)), output_of(self.path)
        return str(absolute.relative_to(output) if absolute.is_relative_to(output) else absolute)

    def _append(self, kind: str, **fields: Any) -> None:
        entry = {"kind": kind, "time": time.time_ns() // 1_000_000, **fields}
        line = json.dumps(entry, separators=(",", ":"), ensure_ascii=False).encode(errors="replace") + b"\n"
        with self._lock:
            if self._closed:
                raise ValueError(f"{self.path} is closed; it does not take a line of kind {kind!r}")
            data = b"\n" + line if self._torn else line
            self._torn = True  # until all of it is down: a full disk may take half a line
            while data:
                data = data[os.write(self._handle, data) :]
            self._torn = False


def flatten(values: Any, prefix: str = "") -> dict[str, str]:
    """Nested mappings and lists of mappings as one mapping of dotted names to text."""
    if isinstance(values, Mapping):
        items: Iterable[tuple[Any, Any]] = values.items()
    elif isinstance(values, (list, tuple)) and any(isinstance(value, Mapping) for value in values):
        items = enumerate(values)
    else:
        return {prefix: str(values)}
    flat: dict[str, str] = {}
    for name, value in items:
        flat.update(flatten(value, f"{prefix}.{name}" if prefix else str(name)))
    return flat


def _lines(path: str | Path, offset: int = 0) -> Iterator[tuple[dict[str, Any] | None, int]]:
    """The whole lines from `offset` on, each with the offset behind it.

    A line that does not parse, None, is what a killed writer left. A line without an end is still being written: it
    waits.
    """
    with open(path, "rb") as file:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n"):
                return
            offset += len(line)
            yield _parse(line), offset


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) and "kind" in entry else None


def read_entries(path: str | Path, offset: int = 0) -> tuple[list[dict[str, Any]], int]:
    """What the whole lines from `offset` on say, and the offset behind them."""
    entries = []
    for entry, behind in _lines(path, offset):
        offset = behind
        if entry is not None:
            entries.append(entry)
    return entries, offset


# ---- ways ----------------------------------------------------------------------------------------
def begin_from_nothing(output: str | Path, stage: str) -> None:
    """What a stage has told so far is of results that are no more: all its journals are told so, if there is any."""
    paths = journal_paths(output, stage)
    if any(_tells(path) for path in paths):
        way = 1 + max(_newest_way(path) for path in paths)
        for path in paths:
            journal = Journal(path)
            journal.rewind(FROM_NOTHING, way=way)
            journal.close()


def rewinds_in(path: str | Path) -> Iterator[dict[str, Any]]:
    """The lines that begin another way, each with its number. Other lines are not even parsed."""
    with open(path, "rb") as file:
        way = 0
        for line in file:
            if line.startswith(b'{"kind":"rewind"') and (entry := _parse(line)) is not None:
                way = entry.get("way", way + 1)  # not numbered when only one journal of a stage had any
                yield {"way": way, **entry}


def _newest_way(path: Path) -> int:
    return max((entry["way"] for entry in rewinds_in(path)), default=0)


def _tells(path: Path) -> bool:
    """Whether a journal says more than that the stage begins from nothing."""
    with open(path, "rb") as file:
        last = deque(file, maxlen=1)
    entry = _parse(last[0]) if last else None
    return bool(last) and not (entry and entry["kind"] == "rewind" and entry["step"] == FROM_NOTHING)


@dataclass(frozen=True)
class Part:
    """A part of a journal: of one way, or of one and the next ones that are known."""

    entries: list[dict[str, Any]]  # those that stand
    offset: int  # behind it
    way: int  # at its end
    rewind: dict[str, Any] | None  # the line behind it, where that begins a way that is not known


def read_standing(path: str | Path, offset: int, limit_bytes: int, rewinds: Sequence[int], way: int) -> Part:
    """The whole lines from `offset` on, about `limit_bytes` of them, without those that fall.

    `rewinds` has for every known way but the first the step that it goes back to; `way` is that of `offset`.
    """
    entries, start = [], offset
    for entry, behind in _lines(path, offset):
        if entry is not None and entry["kind"] == "rewind":
            entry = {"way": way + 1, **entry}
            if entry["way"] > len(rewinds):
                return Part(entries, offset, way, entry)
            way = entry["way"]
        elif entry is not None and (entry.get("step") or 0) <= min(rewinds[way:], default=math.inf):
            entries.append(entry)
        offset = behind
        if offset - start >= limit_bytes:
            break
    return Part(entries, offset, way, None)


def _all_standing(path: Path) -> list[dict[str, Any]]:
    """The lines of the newest way, and those of older ones that it did not go back over."""
    stand, newest = [], math.inf
    for entry in reversed(read_entries(path)[0]):
        if entry["kind"] == "rewind":
            newest = min(newest, entry["step"])
        elif (entry.get("step") or 0) <= newest:
            stand.append(entry)
    return stand[::-1]


def last_step(path: str | Path) -> int:
    """The highest step of which numbers stand; -1 where there are none."""
    highest = -1
    for entry, _ in _lines(path):
        if entry is not None and entry["kind"] == "rewind":
            highest = min(highest, entry["step"])
        elif entry is not None and entry["kind"] == "metrics":
            highest = max(highest, entry["step"] or 0)
    return highest


def make_durable(path: str | Path) -> None:
    """After this a power cut cannot make the journal shorter than it is now."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


# ---- what reports show ---------------------------------------------------------------------------
def read_metrics(output: str | Path, stage: str) -> dict[str, list[tuple[int, float, int]]]:
    """Metrics of a stage: name -> [(step, value, time in ms)] by step; the last word on a step counts."""
    points: dict[str, dict[int, tuple[float, int]]] = {}
    for path in journal_paths(output, stage):
        for entry in _all_standing(path):
            if entry["kind"] == "metrics":
                for name, value in entry["values"].items():
                    points.setdefault(name, {})[entry["step"] or 0] = (value, entry["time"])
    return {
        name: [(step, value, at) for step, (value, at) in sorted(by_step.items())]
        for name, by_step in sorted(points.items())
    }


def read_images(output: str | Path, stage: str) -> dict[str, list[tuple[int, Path]]]:
    """Every picture of a stage: key -> [(step, path)] by rising step."""
    images: dict[str, dict[int, Path]] = {}
    for path in journal_paths(output, stage):
        for entry in _all_standing(path):
            if entry["kind"] == "image":
                images.setdefault(entry["key"], {})[entry["step"] or 0] = output_of(path) / entry["path"]
    return {key: sorted(by_step.items()) for key, by_step in sorted(images.items())}

"""The journal: what a run has to say, in append-only files on disk, one for each writer.

    outputs/<name>/journal/train/driver.jsonl      what the driver says of the stage
    outputs/<name>/journal/train/rank0.jsonl       what the training worker says: losses, images/s, grids
    outputs/<name>/journal/train/rank0.sent.json   how far pipelines/tracking.py has sent it to MLflow

Writing is one append of one line: no network, no lock, no wait, so a server that is away costs a training
step nothing. The journal is the truth; MLflow is a view of it that can be made again (`python -m
pipelines.sync`), and so is the report. A writer that dies in the middle of a line leaves a torn one: it is
skipped, the others stand.
"""

from __future__ import annotations

import json
import math
import os
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ldm.storage import is_remote

RUN = "run"  # the journal of the DAG itself stands beside those of its stages


def journal_path(output: str | Path, stage: str, writer: str = "driver") -> Path:
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
        self._lock = threading.Lock()
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

    def model(self, name: str, path: str | Path, sha256: str, step: int) -> None:
        """Weights that lie on disk and stay there: a checkpoint, by the hash of its manifest."""
        self._append("model", name=name, path=self._place(path), sha256=sha256, step=step)

    def model_removed(self, name: str, step: int) -> None:
        """Weights that were told of are no longer kept."""
        self._append("model_removed", name=name, step=step)

    def status(self, status: str, reason: str = "") -> None:
        """RUNNING, FINISHED, FAILED or KILLED."""
        self._append("status", status=status, reason=reason)

    def rewind(self, step: int) -> None:
        """Training went back to `step` on purpose: what was told of later steps is abandoned, and told anew."""
        self._append("rewind", step=step)

    def close(self) -> None:
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


def read_entries(
    path: str | Path, offset: int = 0, limit_bytes: int = 1 << 62
) -> tuple[list[dict[str, Any]], int]:
    """The whole lines from `offset` on, about `limit_bytes` of them, and the offset behind them.

    A line that does not parse is what a killed writer left: it is passed over. A line without an end is still
    being written: it waits.
    """
    entries = []
    with open(path, "rb") as file:
        file.seek(offset)
        start = offset
        for line in file:
            if not line.endswith(b"\n"):
                break
            offset += len(line)
            entry = _parse(line)
            if entry is not None:
                entries.append(entry)
            if offset - start >= limit_bytes:
                break
    return entries, offset


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) and "kind" in entry else None


def that_stand(
    entries: list[dict[str, Any]], rewinds: list[int]
) -> tuple[list[dict[str, Any]], list[int], dict[str, Any] | None]:
    """The lines without those of steps that training went back over later.

    `rewinds` are the steps of the times that it went back to among these lines or behind them. Returned with the lines
    are those that are still to come; and where a time is met that is not among them, the lines end before it, and it
    is the third.
    """
    stand, coming = [], list(rewinds)
    for entry in entries:
        if entry["kind"] == "rewind":
            if not coming:
                return stand, [], entry
            coming.pop(0)
        elif (entry.get("step") or 0) <= min(coming, default=math.inf):
            stand.append(entry)
    return stand, coming, None


def _read_standing(path: Path) -> list[dict[str, Any]]:
    entries = read_entries(path)[0]
    return that_stand(entries, [entry["step"] for entry in entries if entry["kind"] == "rewind"])[0]


def read_metrics(output: str | Path, stage: str) -> dict[str, list[tuple[int, float, int]]]:
    """Metrics of a stage: name -> [(step, value, time in ms)] by step; the last word on a step counts."""
    points: dict[str, dict[int, tuple[float, int]]] = {}
    for path in journal_paths(output, stage):
        for entry in _read_standing(path):
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
        for entry in _read_standing(path):
            if entry["kind"] == "image":
                images.setdefault(entry["key"], {})[entry["step"] or 0] = output_of(path) / entry["path"]
    return {key: sorted(by_step.items()) for key, by_step in sorted(images.items())}

"""Names, long values and tables as MLflow takes them, without changing them in silence."""

from __future__ import annotations

import csv
import hashlib
import io
import posixpath
import re
from typing import Any

MAX_KEY = 250  # characters of a name


def safe_name(name: str, image: bool = False) -> str:
    """A name that MLflow takes and that leads nowhere else as a path; the key of a picture has no colon."""
    clean = re.sub(r"[^\w./ -]" if image else r"[^\w./ :-]", "_", name.replace("@", "_at_"), flags=re.ASCII)
    parts = [part for part in clean.split("/") if part not in ("", ".", "..")]
    return posixpath.join(*parts)[:MAX_KEY] if parts else ""


def shorten(value: str, limit: int) -> str:
    """A value that MLflow would cut silently, cut with its length and its hash."""
    if len(value) <= limit:
        return value
    mark = f" ... {len(value)} characters, sha256 {hashlib.sha256(value.encode()).hexdigest()[:16]}"
    return value[: limit - len(mark)] + mark


def to_markdown(rows: list[dict[str, Any]]) -> str:
    """Rows as the table that MLflow shows as the description of a run."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = [columns, ["---"] * len(columns), *([row.get(name, "") for name in columns] for row in rows)]
    return "\n".join("| " + " | ".join(str(value).replace("|", "\\|") for value in line) + " |" for line in lines)


def to_csv(rows: list[dict[str, Any]]) -> str:
    """Rows as CSV, which MLflow shows as a table; a whole file: telling it twice does not double it."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()

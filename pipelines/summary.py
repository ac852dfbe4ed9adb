"""What a run says in the end: a table of its stages, and where to look next."""

from __future__ import annotations

from typing import Any

from pipelines.dag import Dag, Status
from pipelines.manifest import read_json, sum_funnel


def funnel_of(status: Status) -> dict[str, Any] | None:
    """{rows, samples, dropped} of a stage: the whole once it is done, before that what is committed so far."""
    return status.funnel or (sum_funnel(list(status.records.values())) if status.records else None)


def funnel_rows(dag: Dag, wanted: list[str]) -> list[dict[str, Any]]:
    """One row for each stage: in, out, dropped, seconds of work over all its runs."""
    rows = []
    for stage in wanted:
        status = dag.statuses[stage]
        note = status.job.output / "run.json"
        runs = read_json(note)["runs"] if note.exists() else []
        funnel = funnel_of(status) or {"rows": 0, "samples": 0, "dropped": {}}
        rows.append({
            "stage": stage, "in": funnel["rows"], "out": funnel["samples"], "dropped": sum(funnel["dropped"].values()),
            "seconds": round(sum(run["seconds"] for run in runs), 1), "done": status.done,
        })  # fmt: skip
    return rows


def summary(dag: Dag, wanted: list[str]) -> str:
    """The table that a run ends with."""
    lines = [f"{'stage':<20}{'in':>10}{'out':>10}{'dropped':>10}{'seconds':>10}"]
    for row in funnel_rows(dag, wanted):
        open_note = "" if row["done"] else "   open"
        lines.append(f"{row['stage']:<20}{row['in']:>10}{row['out']:>10}{row['dropped']:>10}{row['seconds']:>10}{open_note}")
    return "\n" + "\n".join(lines) + "\n"


def pointers(dag: Dag) -> str:
    """Where to look next, as far as it is there."""
    from pipelines.tracking import page_command

    places = [("pictures", "generate/grid.png"), ("figures", "evaluate/metrics.json"), ("report", "report.html")]
    lines = [f"{label:<10}{dag.run_folder / name}" for label, name in places if (dag.run_folder / name).exists()]
    return "\n".join([*lines, f"{'MLflow':<10}{page_command(dag.config.tracking, dag.run_folder)}"])

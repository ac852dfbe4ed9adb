"""The report of a run: one HTML file that needs nothing but itself, made from what lies on disk.

It reads plans, records, run.json, journals and result files of outputs/<name> and writes outputs/<name>/report.html.
What is not there is left out, so that a run that has only come to `download` has a report too.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ldm.node_cache import NodeCache
from ldm.storage import place
from pipelines import quarantine
from pipelines.bucket import stage_folder
from pipelines.dag import ROOT, STAGES
from pipelines.embedded_web.drawings import ATTRIBUTION
from pipelines.journal import RUN, journal_paths, read_entries, read_images, read_metrics
from pipelines.manifest import StageFolder, read_json, sum_funnel, write_whole
from pipelines.reporting.data import data_sections
from pipelines.reporting.examples import example_sections
from pipelines.reporting.page import (
    Html,
    bar,
    cell,
    curve,
    file_figure,
    markdown,
    navigation,
    number_card,
    page,
    section,
    table,
)

GRIDS = 8


@dataclass
class Said:
    """What the journal of the DAG says of all its sessions together."""

    params: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    sessions: list[dict[str, Any]] = field(default_factory=list)  # begun, ended, status, reason


@dataclass
class Made:
    """One stage as it lies on disk."""

    name: str
    folder: StageFolder
    funnel: dict[str, Any] | None
    runs: list[dict[str, Any]]
    fingerprint: str


def write_report(run_folder: str | Path, stopped: str = "") -> Path:
    """Writes report.html of the run in outputs/<name>; returns its path. `stopped` is what ended it before its end."""
    run_folder = Path(run_folder).absolute()
    said = read_said(run_folder)
    if stopped and said.sessions:  # its own end is not in the journal yet
        said.sessions[-1].update(status="STOPPED", reason=stopped)
    stages = read_stages(run_folder, said.params)
    folders = {stage.name: stage.folder for stage in stages}
    dropped = {stage.name: stage.funnel["dropped"] for stage in stages if stage.funnel}
    parts = {
        "Pictures": _pictures(run_folder, stages),
        "Prompt recall": _recall(run_folder),
        "Where every row went": _funnel(stages),
        "What the data looks like": data_sections(run_folder, folders),
        "Examples of the data": example_sections(folders, dropped),
        "Training": _training(run_folder),
        "Autoencoder": _autoencoder(said, stages),
        "What ran": _what_ran(said, stages),
        "Where the data comes from": _credit(said),
    }
    sections = [section(title, *inside) for title, inside in parts.items()]
    shown = [title for title, text in zip(parts, sections, strict=True) if text]
    title = f"<h1>{cell(run_folder.name)}</h1>"
    body = [title, _summary(said, stages), _stopped(stopped), navigation(shown), *sections]
    path = run_folder / "report.html"
    write_whole(path, page(f"Run {run_folder.name}", body).encode())
    return path


# ---- reading -----------------------------------------------------------------------------------------------------
def read_said(run_folder: Path) -> Said:
    said = Said()
    for path in journal_paths(run_folder, RUN):
        for entry in read_entries(path)[0]:
            if entry["kind"] == "params":
                said.params.update(entry["values"])
            elif entry["kind"] == "tags":
                said.tags.update(entry["values"])
            elif entry["kind"] == "status" and entry["status"] == "RUNNING":
                said.sessions.append({"begun": entry["time"], "ended": None, "status": "RUNNING", "reason": ""})
            elif entry["kind"] == "status" and said.sessions:
                said.sessions[-1].update(ended=entry["time"], status=entry["status"], reason=entry["reason"])
    return said


def read_stages(run_folder: Path, params: dict[str, str]) -> list[Made]:
    """The stages that have begun, in order; one that another run lent is read there."""
    found = []

    def told(name: str) -> str | None:
        return None if params.get(name) == "None" else params.get(name)

    cache = NodeCache(told("cluster.cache.folder"), int(told("cluster.cache.max_bytes") or 0))
    for name, stage in STAGES.items():
        root = run_folder.parent if stage.kind == "whole" else place(told("paths.shards") or run_folder.parent)
        home = root / params.get(f"paths.reuse.{name}", run_folder.name) / name
        path = newest_result(home) if stage.many else home
        folder = stage_folder(path or home, name, cache)
        plan = folder.read_plan()
        if plan is not None:
            note = folder / "run.json"
            runs = read_json(note)["runs"] if note.exists() else []
            found.append(Made(name, folder, _funnel_of(folder, stage.kind), runs, plan["fingerprint"]))
    return found


def newest_result(home: Path) -> Path | None:
    """The folder, among those of a stage that keeps many, that was finished last."""
    records = sorted(home.glob("*/record.json"), key=lambda path: (path.stat().st_mtime_ns, path))
    return records[-1].parent if records else None


def _funnel_of(folder: StageFolder, kind: str) -> dict[str, Any] | None:
    """{rows, samples, dropped} of what is committed; the manifest knows it at once when the stage is closed."""
    if kind == "whole":
        record = folder.record()
        return sum_funnel([record]) if record else None
    manifest = folder.manifest()
    if manifest is not None:
        return manifest["funnel"]
    records = list(folder.committed().values())
    return sum_funnel(records) if records else None


# ---- sections ----------------------------------------------------------------------------------------------------
def _summary(said: Said, stages: list[Made]) -> str:
    seconds = sum(run["seconds"] for stage in stages for run in stage.runs)
    words = [f"code {said.tags.get('code_version', 'unknown')}"]
    if said.sessions:
        begun, last = said.sessions[0]["begun"], said.sessions[-1]
        now = _when(1000 * time.time())  # a run writes its report as its last act, so its own end is not in it
        ended = f"{last['status'].lower()} {_when(last['ended'])}" if last["ended"] else f"written {now}"
        words = [f"begun {_when(begun)}", ended, *words]
    words.append(f"{_duration(seconds)} of work in {len(stages)} stages")
    return f'<p class="soft">{cell(" · ".join(words))}</p>'


def _stopped(reason: str) -> str:
    words = "This run stopped before its end, and what follows is what it had made by then."
    return f'<div class="card stopped"><b>{words}</b><p>{cell(reason)}</p></div>' if reason else ""


def _pictures(run_folder: Path, stages: list[Made]) -> list[str]:
    grid = file_figure(run_folder / "generate/grid.png", "Drawn from captions alone.")
    made = next((stage for stage in stages if stage.name == "generate"), None)
    if not grid or made is None:
        return [grid]
    prompts = read_json(made.folder / "prompts.json")["prompts"]
    unseen = [prompt["prompt"] for prompt in prompts if not prompt["seen"]]
    note = f"{len(prompts) - len(unseen):,} captions of the training set"
    if unseen:
        note += f", and {len(unseen)} prompts that it does not hold: " + ", ".join(f"“{p}”" for p in unseen)
    return [grid, f'<p class="soft">{cell(note + ".")}</p>']


def _recall(run_folder: Path) -> list[str]:
    path = run_folder / "evaluate/metrics.json"
    if not path.exists():
        return []
    figures = read_json(path)
    candidates = figures["prompt_recall_candidates"]
    cards = [
        number_card(f"{figures['prompt_recall@1']:.1%}", "of the prompts: nearest to their own training picture"),
        number_card(f"{candidates:,}", "training pictures to choose from"),
        number_card(f"{figures['prompt_recall_shuffled']:.1%}", "with the captions dealt out anew (the control)"),
        number_card(f"{1 / candidates:.1%}", "by chance"),
    ]
    note = (
        "Each caption of the training set is drawn once, from noise that knows nothing of it. The latent counts as "
        "right if no other training latent lies nearer (L2). A small model on a small set memorises: this shows that "
        "text, denoiser, guidance, sampler and data work together, not how well the model draws something new."
    )
    caption = "Left: generated. Right: the training picture of that prompt."
    pairs = file_figure(run_folder / "evaluate/pairs.png", caption)
    return [f'<div class="figures">{"".join(cards)}</div>', f"<p>{cell(note)}</p>", pairs]


def _funnel(stages: list[Made]) -> list[str]:
    blocks, largest = [], max((stage.funnel["rows"] for stage in stages if stage.funnel), default=0)
    for stage in stages:
        if stage.funnel is None or not stage.funnel["rows"]:
            continue
        rows, kept, dropped = stage.funnel["rows"], stage.funnel["samples"], stage.funnel["dropped"]
        by_count = sorted(dropped.items(), key=lambda item: (-item[1], item[0]))
        lost = rows - kept - sum(dropped.values())
        total = f"{rows:,} in = {kept:,} out + {sum(dropped.values()):,} dropped"
        verdict = f"{total}: every row is accounted for" if lost == 0 else f"{total}: {lost:,} ARE MISSING"
        blocks.append(
            f'<div class="step"><div class="head"><b>{stage.name}</b><span class="soft">{cell(verdict)}</span></div>'
            f'{bar([("out", kept), *by_count], width=max(0.1, rows / largest))}</div>'
        )
        if quarantine.QUARANTINED in dropped:
            lines = quarantine.describe(stage.name, stage.folder.committed().values())
            blocks.append(f'<p class="soft">{"<br>".join(map(cell, lines))}</p>')
    return blocks


def _training(run_folder: Path) -> list[str]:
    metrics = read_metrics(run_folder, "train")
    names = [name for name in metrics if not name.startswith(("funnel/", "data/"))]
    names.sort(key=lambda name: (not name.endswith("loss"), name))  # what everybody looks for first
    curves = [_curve(metrics[name], name) for name in names]
    curves = [text for text in curves if text]
    rest = "".join(curves[1:])
    more = f"<details><summary>{len(curves) - 1} more curves</summary>{rest}</details>" if rest else ""
    return [*curves[:1], more, *(_strip(key, shown) for key, shown in read_images(run_folder, "train").items())]


def _curve(points: list[tuple[int, float, int]], name: str) -> str:
    return curve([(step, value) for step, value, _ in points], f"{name} by step", logarithmic=name.endswith("loss"))


def _strip(key: str, pictures: list[tuple[int, Path]]) -> str:
    """Pictures of one key side by side, as far as they still lie on disk."""
    shown = spread_to_end([(step, path) for step, path in pictures if path.is_file()], GRIDS)
    steps = "".join(file_figure(path, f"step {step:,}", 480) for step, path in shown)
    return f'<h3>{cell(key)} by step</h3><div class="strip">{steps}</div>' if steps else ""


def spread_to_end(items: list[Any], count: int) -> list[Any]:
    """At most `count` of the items, evenly spaced, first and last among them."""
    if len(items) <= count:
        return items
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def _autoencoder(said: Said, stages: list[Made]) -> list[str]:
    """The card beside the weights that were given, or the figures of those that this run trained."""
    weights = said.params.get("autoencoder.weights", "None")
    card = (ROOT / weights).with_suffix(".md")
    if weights != "None" and card.exists():
        return [f'<div class="card">{markdown(card.read_text())}</div>']
    made = next((stage.folder.record() for stage in stages if stage.name == "train_autoencoder"), None)
    return [table([{"figure": name, "value": value} for name, value in made.facts.items()])] if made else []


def _what_ran(said: Said, stages: list[Made]) -> list[str]:
    rows = []
    for stage in stages:
        newest = stage.runs[-1] if stage.runs else {}
        rows.append({
            "stage": stage.name,
            "fingerprint": Html(f"<code>{cell(stage.fingerprint[:12])}</code>"),
            "seconds": round(sum(run["seconds"] for run in stage.runs), 1),
            "runs": len(stage.runs),
            "last finished": _when(1000 * newest["finished"]) if newest else "",
            "host": newest.get("host", ""),
            "code": Html(f"<code>{cell(newest.get('code_version', ''))}</code>"),
        })  # fmt: skip
    last = said.sessions[-1] if said.sessions else None
    sessions = [
        {
            "session": i,
            "begun": _when(session["begun"]),
            "ended": _when(session["ended"]) if session["ended"] else "" if session is last else "killed",
            "status": session["status"].lower(),
            "reason": session["reason"],
        }
        for i, session in enumerate(said.sessions, 1)
    ]
    settings = table([{"setting": name, "value": value} for name, value in sorted(said.params.items())])
    command = said.tags.get("command")
    return [
        table(rows),
        "<h3>Sessions</h3>" + table(sessions) if sessions else "",
        f"<p>Last command: <code>python -m pipelines.run {cell(command)}</code></p>" if command is not None else "",
        f"<details><summary>{len(said.params)} settings</summary>{settings}</details>" if said.params else "",
    ]


def _credit(said: Said) -> list[str]:
    """Whose pictures these are, for the data set that comes along; another one has its own terms."""
    if "dataset.sample_web.seed" not in said.params:
        return []
    words = (
        f"{ATTRIBUTION} They were drawn as pictures by resvg, captioned with their names in the package emoji, and "
        f"served by a web on this machine that is made to be as unkind as the real one; the scores in its metadata "
        f"are invented. Generated pictures are made from them and come under the same licence."
    )
    return [f"<p>{cell(words)}</p>"]


def _when(milliseconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(milliseconds / 1000))


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"

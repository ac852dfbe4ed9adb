"""Pieces of a self-contained HTML page: pictures inside it, bars and curves as SVG, light and dark, no script."""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

MAX_POINTS = 400  # of a curve; more cannot be seen

STYLE = """
:root { color-scheme: light dark; --back: #fbfaf7; --card: #ffffff; --ink: #23262b; --soft: #6d727b; --line: #e3e0d8;
  --kept: #2f8f6b; --accent: #c2571a; --c0: #d98032; --c1: #b8476b; --c2: #6a5bb5; --c3: #3b7fb6; --c4: #94852f;
  --c5: #7c8794; }
@media (prefers-color-scheme: dark) { :root { --back: #16181c; --card: #1f2228; --ink: #e8e6e1; --soft: #9aa0aa;
  --line: #33373f; --kept: #4cb58c; --accent: #f0935a; --c0: #e39a55; --c1: #d46b8c; --c2: #9285d8; --c3: #64a5d6;
  --c4: #bcab52; --c5: #98a2ae; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 68rem; padding: 2.5rem 1.25rem 5rem; background: var(--back); color: var(--ink);
  font: 16px/1.55 system-ui, sans-serif; }
h1 { font-size: 2rem; line-height: 1.2; margin: 0 0 .3rem; }
h2 { font-size: 1.3rem; margin: 3rem 0 .8rem; }
h3 { font-size: 1rem; margin: 1.6rem 0 .5rem; }
p { margin: .4rem 0 .8rem; max-width: 46rem; }
a { color: inherit; }
code { font: .85em ui-monospace, monospace; overflow-wrap: anywhere; }
nav { display: flex; flex-wrap: wrap; gap: .3rem 1.1rem; font-size: .9rem; margin: 1rem 0 0; }
.soft { color: var(--soft); font-size: .88rem; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: .7rem; padding: 1rem 1.2rem; }
.stopped { border-color: var(--accent); }
.figures { display: flex; flex-wrap: wrap; gap: 1rem; margin: 1rem 0; }
.figures .card { flex: 1 1 9rem; }
.figures b { display: block; font-size: 1.7rem; line-height: 1.25; font-variant-numeric: tabular-nums; }
table { border-collapse: collapse; font-size: .88rem; }
.wide { overflow-x: auto; }
td, th { text-align: left; padding: .3rem .9rem .3rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--soft); font-weight: 600; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
.bar { display: flex; height: 1.5rem; border-radius: .35rem; overflow: hidden; background: var(--line);
  margin: .3rem 0; }
.bar span { min-width: 2px; }
.step { margin: 1.3rem 0; }
.step .head { display: flex; flex-wrap: wrap; justify-content: space-between; gap: 0 1rem; }
.key { display: inline-block; margin: 0 1rem .1rem 0; font-size: .85rem; }
.key i { display: inline-block; width: .7rem; height: .7rem; border-radius: .2rem; margin-right: .35rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(17rem, 1fr)); gap: 1.4rem; }
.sheet { display: grid; grid-template-columns: repeat(auto-fill, minmax(6.2rem, 1fr)); gap: .8rem; }
.strip { display: flex; overflow-x: auto; gap: 1rem; padding-bottom: .6rem; }
.strip figure { flex: 0 0 auto; }
figure { margin: 0; }
figcaption { color: var(--soft); font-size: .78rem; line-height: 1.3; margin-top: .2rem; overflow-wrap: anywhere; }
img { max-width: 100%; display: block; border-radius: .4rem; background: #fff; }
.gone { aspect-ratio: 1; border: 1px dashed var(--soft); border-radius: .4rem; display: grid; place-items: center;
  color: var(--soft); font-size: .75rem; text-align: center; }
svg { max-width: 46rem; width: 100%; display: block; }
svg text { fill: var(--soft); font: 11px system-ui, sans-serif; }
svg .grid { stroke: var(--line); } svg .curve { stroke: var(--accent); stroke-width: 1.6; fill: none; }
details { margin: .6rem 0; } summary { cursor: pointer; }
"""

COLOURS = [f"var(--c{i})" for i in range(6)]


def page(title: str, body: Iterable[str]) -> str:
    """A whole page that needs nothing but itself."""
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(part for part in body if part)
        + "\n</body>\n</html>\n"
    )


def section(title: str, *parts: str) -> str:
    """A heading that the page's navigation leads to, and what stands under it; nothing when nothing does."""
    inside = "\n".join(part for part in parts if part)
    anchor = title.lower().replace(" ", "-")
    return f'<section id="{escape(anchor)}">\n<h2>{escape(title)}</h2>\n{inside}\n</section>' if inside else ""


def navigation(titles: Iterable[str]) -> str:
    links = (f'<a href="#{escape(t.lower().replace(" ", "-"))}">{escape(t)}</a>' for t in titles)
    return f"<nav>{''.join(links)}</nav>"


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows with named columns; numbers stand to the right. A value that is `Html` goes in as it is."""
    if not rows:
        return ""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    numeric = {name for name in columns if all(isinstance(row.get(name), int | float | None) for row in rows)}
    kind = {name: ' class="number"' if name in numeric else "" for name in columns}
    head = "".join(f"<th{kind[name]}>{escape(name)}</th>" for name in columns)
    lines = ("".join(f"<td{kind[n]}>{cell(row.get(n))}</td>" for n in columns) for row in rows)
    return f'<div class="wide"><table><tr>{head}</tr>{"".join(f"<tr>{line}</tr>" for line in lines)}</table></div>'


class Html(str):
    """Text that is HTML already."""


def cell(value: Any) -> str:
    if isinstance(value, Html):
        return value
    if value is None:
        return ""
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return escape(f"{value:.4g}" if isinstance(value, float) else str(value))


def number_card(value: str, label: str) -> str:
    return f'<div class="card"><b>{escape(value)}</b><span class="soft">{escape(label)}</span></div>'


def bar(parts: Sequence[tuple[str, int]], width: float = 1.0) -> str:
    """One bar of labelled lengths over a share of the page's width, and its key; the first part is what was kept."""
    total = sum(count for _, count in parts) or 1
    colours = ["var(--kept)", *(COLOURS[i % len(COLOURS)] for i in range(len(parts)))]
    shown = [(label, count, colour) for (label, count), colour in zip(parts, colours, strict=False) if count]
    spans = (
        f'<span style="flex:{count / total:.6f};background:{colour}" title="{escape(label)}: {count:,}"></span>'
        for label, count, colour in shown
    )
    keys = (
        f'<span class="key"><i style="background:{colour}"></i>{escape(label)} {count:,}</span>'
        for label, count, colour in shown
    )
    return f'<div class="bar" style="width:{width:.0%}">{"".join(spans)}</div><div>{"".join(keys)}</div>'


def markdown(text: str) -> str:
    """The little Markdown that our cards are written in: headings, lists, tables, paragraphs, `code`."""
    return "\n".join(_block(block.splitlines()) for block in re.split(r"\n\s*\n", text.strip()))


def _block(lines: list[str]) -> str:
    if lines[0].startswith("#"):
        return "\n".join([f"<h3>{_inline(lines[0].lstrip('# '))}</h3>", *([_block(lines[1:])] if lines[1:] else [])])
    if lines[0].startswith("|"):
        rows = [line.strip("|").split("|") for line in lines if not set(line) <= set("|-: ")]
        cells = ("".join(f"<td>{_inline(part.strip())}</td>" for part in row) for row in rows)
        return f"<table>{''.join(f'<tr>{row}</tr>' for row in cells)}</table>"
    if lines[0].startswith("- "):
        items = re.split(r"\n- ", "\n".join(lines)[2:])
        return f"<ul>{''.join(f'<li>{_inline(item)}</li>' for item in items)}</ul>"
    return f"<p>{_inline(' '.join(lines))}</p>"


def _inline(text: str) -> str:
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))


# ---- pictures --------------------------------------------------------------------------------------------------
def embed(data: bytes, side: int | None = None, quality: int = 88) -> str:
    """Picture bytes as a data address, as WebP no larger than `side`. Raises OSError for what is no picture."""
    from PIL import Image, ImageOps

    with Image.open(io.BytesIO(data)) as opened:
        opened.load()
        image = ImageOps.exif_transpose(opened)
        image = image.convert("RGBA" if "transparency" in image.info or image.mode in ("LA", "RGBA") else "RGB")
    if side is not None:
        image.thumbnail((side, side))
    sink = io.BytesIO()
    image.save(sink, "WEBP", quality=quality, method=4)
    return "data:image/webp;base64," + base64.b64encode(sink.getvalue()).decode()


def figure(address: str, caption: str) -> str:
    """A picture with its caption; an empty address leaves a frame that says that there is none."""
    shown = f'<img src="{address}" alt="{escape(caption)}">' if address else '<div class="gone">no picture</div>'
    return f"<figure>{shown}<figcaption>{escape(caption)}</figcaption></figure>"


def file_figure(path: Path, caption: str, side: int | None = None) -> str:
    """A picture file with its caption, nothing when there is no such file."""
    return figure(embed(path.read_bytes(), side), caption) if path.is_file() else ""


# ---- distributions ---------------------------------------------------------------------------------------------
def histogram(values: Sequence[float], kept: Sequence[float], label: str, bins: int = 24) -> str:
    """How often values occur, as bars; before them, in green, how often among those kept.

    Bars reach from the lowest value to the 99.5th percentile; what lies above is counted in words.
    """
    usable = sorted(value for value in values if math.isfinite(value))
    if not usable:
        return ""
    low, high = usable[0], usable[math.ceil(0.995 * (len(usable) - 1))]
    high = high if high > low else low + 1
    counts = [[0] * bins, [0] * bins]
    for row, group in zip(counts, (usable, kept), strict=True):
        for value in group:
            if low <= value <= high:
                row[min(bins - 1, int((value - low) / (high - low) * bins))] += 1
    width, height, bottom = 320, 130, 18
    across, up = width / bins, (height - bottom - 4) / max(counts[0])
    shapes = [
        f'<rect x="{i * across + 0.5:.1f}" y="{height - bottom - n * up:.1f}" width="{across - 1:.1f}" '
        f'height="{n * up:.1f}" fill="{colour}"/>'
        for row, colour in zip(counts, ("var(--line)", "var(--kept)"), strict=True)
        for i, n in enumerate(row)
        if n
    ]
    ends = (
        f'<text x="0" y="{height - 4}">{low:.4g}</text>'
        f'<text x="{width}" y="{height - 4}" text-anchor="end">{high:.4g}</text>'
    )
    above = sum(value > high for value in usable)
    note = f"{label}; {above:,} above" if above else label
    return (
        f'<figure><svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}">{"".join(shapes)}{ends}'
        f"</svg><figcaption>{escape(note)}</figcaption></figure>"
    )


# ---- curves ----------------------------------------------------------------------------------------------------
def curve(points: Sequence[tuple[float, float]], label: str, logarithmic: bool = False) -> str:
    """A curve over steps as SVG; points that are not finite (or positive, if logarithmic) are counted."""
    usable = [(x, y) for x, y in points if math.isfinite(y) and (y > 0 or not logarithmic)]
    if len(usable) < 2:
        return ""
    lost = len(points) - len(usable)
    width, height, left, bottom, right = 640, 240, 56, 26, 24
    scale = math.log10 if logarithmic else float
    xs, ys = [x for x, _ in usable], [scale(y) for _, y in usable]
    x0, x1, y0, y1 = min(xs), max(xs), min(ys), max(ys)
    y0, y1 = (y0, y1) if y1 > y0 else (y0 - 0.5, y1 + 0.5)

    def place(x: float, y: float) -> tuple[float, float]:
        across = left + (width - left - right) * (x - x0) / ((x1 - x0) or 1)
        return across, (height - bottom) - (height - bottom - 12) * (scale(y) - y0) / (y1 - y0)

    grid = []
    for tick in ticks(10**y0 if logarithmic else y0, 10**y1 if logarithmic else y1, logarithmic):
        _, y = place(x0, tick)
        grid.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{y:.1f}" y2="{y:.1f}"/>'
                    f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:.4g}</text>')
    for tick in ticks(x0, x1):
        x, _ = place(tick, usable[0][1])
        grid.append(f'<text x="{x:.1f}" y="{height - 8}" text-anchor="middle">{tick:,.6g}</text>')
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in thin(usable)))
    note = f" ({lost} points are not finite and not drawn)" if lost else ""
    return (
        f'<figure><svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}">{"".join(grid)}'
        f'<polyline class="curve" points="{path}"/></svg><figcaption>{escape(label + note)}</figcaption></figure>'
    )


def thin(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most about MAX_POINTS of a curve: of each stretch its lowest and its highest, so that no spike is lost."""
    if len(points) <= MAX_POINTS:
        return list(points)
    size = math.ceil(2 * len(points) / MAX_POINTS)
    kept = [points[0]]
    for start in range(0, len(points), size):
        stretch = points[start : start + size]
        ends = {min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1])}
        kept += sorted(ends)
    return [*kept, points[-1]]


def ticks(low: float, high: float, logarithmic: bool = False) -> list[float]:
    """About five round numbers between low and high."""
    if logarithmic:
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        found = [m * 10.0**p for p in powers for m in (1, 2, 5) if low <= m * 10.0**p <= high]
        if len(found) >= 4:
            return found[:: math.ceil(len(found) / 6)]
    if high <= low:
        return [low]
    raw = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw)
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]

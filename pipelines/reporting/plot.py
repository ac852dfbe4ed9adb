"""The funnel as a picture, for places that show no HTML."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

KEPT, DROPPED = "#2f8f6b", ("#d98032", "#b8476b", "#6a5bb5", "#3b7fb6", "#94852f", "#7c8794")
LABELLED = 0.06  # of the longest bar: what is shorter has no room for a name


def funnel_png(stages: Sequence[tuple[str, Mapping[str, Any]]]) -> bytes:
    """One bar for each (stage, {rows, samples, dropped}): what went out, then what was dropped by reason."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 0.9 + 0.55 * len(stages)), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    longest = max((funnel["rows"] for _, funnel in stages), default=0) or 1
    for place, (_, funnel) in enumerate(stages):
        dropped = sorted(funnel["dropped"].items(), key=lambda item: (-item[1], item[0]))
        left = 0
        for i, (reason, count) in enumerate([("out", funnel["samples"]), *dropped]):
            colour = DROPPED[(i - 1) % len(DROPPED)] if i else KEPT
            axes.barh(place, count, left=left, color=colour)
            if count > LABELLED * longest:
                words = f"{reason}\n{count:,}"
                axes.text(left + count / 2, place, words, ha="center", va="center", color="white", size=7)
            left += count
    axes.set_yticks(range(len(stages)), [stage for stage, _ in stages])
    axes.invert_yaxis()
    axes.set_xlabel("rows")
    axes.spines[["top", "right"]].set_visible(False)
    sink = io.BytesIO()
    FigureCanvasAgg(figure).print_png(sink)
    return sink.getvalue()

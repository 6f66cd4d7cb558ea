"""Figures of a benchmark: times as bars with a table beside them, and latency scaling."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pi0.bench.report import accuracy_cells
from pi0.figures import INK, MUTED, RED, SERIES, VERBATIM, bare, lettering, new_figure, wrapped

if TYPE_CHECKING:
    from matplotlib.axes import Axes

VISION, LANGUAGE, STEPS = "#2b6cb0", "#63b3ed", "#ed8936"
BARS = (
    ("vision", VISION),
    ("rest of prefill (all of prefill where vision is not shown)", LANGUAGE),
    ("denoising steps", STEPS),
)
NOTHING = ("", "—", "baseline")  # cells that make no column
AXES = {
    "cameras": "cameras",
    "tokens": "text tokens",
    "steps": "denoising steps",
    "batch": "batch",
}


def plot_times(path: Path, data: dict[str, Any], title: str, small: str) -> None:
    """Writes a PNG with one bar per engine, as long as its median and divided among its parts, and
    a table of speed and accuracy. A failure takes the place of the bar.

    Args:
        data: see `report.to_data`.
        small: a line in small type below the title.
    """
    from matplotlib.ticker import MaxNLocator

    rows = data["engines"]
    figure = new_figure(10.5, 1.9 + 0.55 * len(rows))
    axes, table = figure.subplots(1, 2, sharey=True, width_ratios=[3, 2])
    longest = max((row["max_ms"] or 0.0 for row in rows), default=0.0) or 1.0
    scale, unit = (1e3, "s") if longest >= 10_000 else (1.0, "ms")
    for place, row in enumerate(rows):
        if row["ms"] is not None:
            _bar(axes, place, row, data["point"]["steps"], scale)
        if row["failure"]:
            _failure(axes, place, row["failure"])
    for label, colour in BARS:
        axes.barh([0], [0], color=colour, label=label)
    axes.set_yticks(range(len(rows)), [row["engine"] for row in rows], **VERBATIM)
    axes.set_ylim(len(rows) - 0.5, -0.9)
    axes.set_xlim(0, 1.03 * longest / scale)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.set_xlabel(f"{unit} for a chunk of actions: median; the line is from minimum to maximum")
    bare(axes, "x")
    for label, row in zip(axes.get_yticklabels(), rows, strict=True):
        label.set_color(RED if row["failure"] else INK)
    _table(table, data, scale, unit)
    letters = lettering(title, small)
    heading = letters.draw(f"{wrapped(title, 100, 2)}")
    figure.suptitle(
        heading, x=0.01, ha="left", fontsize=12, color=INK, fontfamily=letters.families, **VERBATIM
    )
    axes.set_title(
        letters.draw(wrapped(small, 84, 3)),
        loc="left", fontsize=8, color=MUTED, fontfamily=letters.families, **VERBATIM,
    )  # fmt: skip
    figure.legend(loc="outside lower left", ncols=3, frameon=False, fontsize=8.5)
    figure.savefig(path, format="png", dpi=150)


def _bar(axes: Axes, place: int, row: dict[str, Any], steps: int, scale: float) -> None:
    vision = row["vision_ms"] or 0.0
    parts = [vision, max(row["prefill_ms"] - vision, 0.0), row["step_ms"] * steps]
    left = 0.0
    for part, (_, colour) in zip(parts, BARS, strict=True):
        width = row["ms"] / scale * part / sum(parts)
        axes.barh(place, width, 0.62, left, color=colour, edgecolor="white", linewidth=0.6)
        left += width
    axes.hlines(place, row["min_ms"] / scale, row["max_ms"] / scale, color=INK, linewidth=1.2)


def _failure(axes: Axes, place: int, sentence: str) -> None:
    axes.text(
        0.01, place, "✕ " + textwrap.fill(f"failed: {sentence}", 84, max_lines=2, placeholder=" …"),
        transform=axes.get_yaxis_transform(), va="center", fontsize=7.5, color=RED,
        bbox={"facecolor": "white", "edgecolor": RED, "linewidth": 0.8}, **VERBATIM,
    )  # fmt: skip


def _table(axes: Axes, data: dict[str, Any], scale: float, unit: str) -> None:
    """Median, speed relative to the peer, and accuracy, in line with the bars."""
    cells = [_cells(row, data, scale, unit) for row in data["engines"]]
    peer = data["ratio_to"].replace(":", ":\n").replace("@", "\n@")
    heads = ("median", f"× {peer}", "error", "PCC")
    shown = [i for i in range(len(heads)) if any(row[i] not in NOTHING for row in cells)]
    for column, i in enumerate(shown):
        x = (column + 1) / len(shown)
        axes.text(
            x, -0.55, heads[i], ha="right", va="bottom", fontsize=8.5, color=MUTED, **VERBATIM
        )
        for place, row in enumerate(cells):
            axes.text(x, place, row[i], ha="right", va="center", fontsize=9, color=INK)
    if heads.index("error") in shown:
        axes.text(
            1, len(cells) - 0.45, "error: relative to what the model moved\n(actions − noise)",
            ha="right", va="top", fontsize=7.5, color=MUTED,
        )  # fmt: skip
    axes.set_xlim(0, 1)
    axes.axis("off")


def _cells(row: dict[str, Any], data: dict[str, Any], scale: float, unit: str) -> tuple[str, ...]:
    if row["ms"] is None:
        return ("—",) * 4
    value = row["ms"] / scale
    time = f"{value:.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"
    ratio = "1" if row["engine"] == data["ratio_to"] else f"{row['ratio']:.2f}"
    return (time, ratio, *accuracy_cells(row, data["baseline"]))


def plot_scaling(path: Path, scaling: list[dict[str, Any]], title: str) -> None:
    """Writes a PNG with one panel per size that was varied: time and the arithmetic needed, both
    as multiples of those of the first workload."""
    figure = new_figure(9.5, 6)
    panels = figure.subplots(2, 2).flat
    for axes, (name, label) in zip(panels, AXES.items(), strict=True):
        points = [point for point in scaling if point["varied"] == name]
        values = [point["value"] for point in points]
        for engine, colour in zip(points[0]["ms"], SERIES * len(points[0]["ms"]), strict=False):
            times = [point["ms"][engine] for point in points]
            if times[0] is not None:
                ratios = [float("nan") if ms is None else ms / times[0] for ms in times]
                axes.plot(values, ratios, "o-", color=colour, label=engine, ms=4, linewidth=1.5)
        needed = [point["gflop"] / points[0]["gflop"] for point in points]
        axes.plot(values, needed, "--", color=MUTED, label="arithmetic needed", linewidth=1.2)
        axes.set_xticks(values)
        axes.set_xlabel(label)
        axes.set_ylabel(f"time, relative to {label} = {values[0]}", fontsize=8.5)
        axes.set_ylim(bottom=0)
        axes.margins(y=0.08)
        bare(axes)
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, color=INK, **VERBATIM)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower left", ncols=4, frameon=False, fontsize=8.5)
    figure.savefig(path, format="png", dpi=150)

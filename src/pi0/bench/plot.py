"""Pictures of a benchmark."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

VISION, LANGUAGE, STEPS = "#2b6cb0", "#63b3ed", "#ed8936"
INK, FAINT = "#1a202c", "#718096"
LINES = ("#2b6cb0", "#ed8936", "#38a169", "#805ad5", "#d53f8c", "#4a5568")
BARS = (
    ("vision", VISION),
    ("rest of prefill (all of it where vision is not shown)", LANGUAGE),
    ("denoising steps", STEPS),
)
AXES = {
    "cameras": "cameras",
    "tokens": "text tokens",
    "steps": "denoising steps",
    "batch": "batch",
}


def plot_times(path: Path, data: dict[str, Any], title: str, small: str) -> None:
    """Writes a PNG with one bar an engine, as long as its median, shared out among its parts.

    Args:
        data: see `report.to_data`.
        small: print under the title.
    """
    from matplotlib.figure import Figure

    rows = data["engines"]
    figure = Figure(figsize=(9.5, 1.7 + 0.55 * len(rows)), layout="constrained")
    axes = figure.subplots()
    longest = max((row["max_ms"] or 0.0 for row in rows), default=0.0) or 1.0
    scale, unit = (1e3, "s") if longest >= 10_000 else (1.0, "ms")
    for place, row in enumerate(rows):
        if row["ms"] is not None:
            _bar(axes, place, row, data["point"]["steps"], scale)
        axes.annotate(
            _label(row, scale, unit, data["ratio_to"]),
            ((row["max_ms"] or 0.0) / scale, place),
            (6, 0),
            textcoords="offset points",
            va="center",
            color=FAINT if row["failure"] else INK,
            fontsize=9,
        )
    for label, colour in BARS:
        axes.barh([0], [0], color=colour, label=label)
    axes.set_yticks(range(len(rows)), [row["engine"] for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(0, longest / scale * 1.45)  # room for the labels
    axes.set_xlabel(f"{unit} for a chunk of actions: median; the line is least to most")
    axes.set_title(textwrap.fill(small, 110), loc="left", fontsize=8.5, color=FAINT)
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, color=INK)
    figure.legend(loc="outside lower left", ncols=3, frameon=False, fontsize=8.5)
    _bare(axes, "x")
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


def _label(row: dict[str, Any], scale: float, unit: str, peer: str) -> str:
    if row["ms"] is None:
        return "failed"
    value = row["ms"] / scale
    time = f"{value:.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"
    return (
        time
        if row["engine"] == peer
        else f"{time}   {row['ratio']:.2f} × as fast as {peer.partition(':')[0]}"
    )


def plot_scaling(path: Path, scaling: list[dict[str, Any]], title: str) -> None:
    """Writes a PNG with a panel for each thing that was varied: time, as a multiple of the
    first point's, beside the arithmetic needed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.5, 6), layout="constrained")
    panels = figure.subplots(2, 2).flat
    for axes, (name, label) in zip(panels, AXES.items(), strict=True):
        points = [point for point in scaling if point["varied"] == name]
        values = [point["value"] for point in points]
        for engine, colour in zip(points[0]["ms"], LINES * len(points[0]["ms"]), strict=False):
            times = [point["ms"][engine] for point in points]
            if times[0] is not None:
                ratios = [float("nan") if ms is None else ms / times[0] for ms in times]
                axes.plot(values, ratios, "o-", color=colour, label=engine, ms=4, linewidth=1.5)
        needed = [point["gflop"] / points[0]["gflop"] for point in points]
        axes.plot(values, needed, "--", color=FAINT, label="arithmetic needed", linewidth=1.2)
        axes.set_xticks(values)
        axes.set_xlabel(label)
        axes.set_ylabel(f"× {label} = {values[0]}")
        axes.set_ylim(bottom=0)
        _bare(axes, "both")
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, color=INK)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower left", ncols=4, frameon=False, fontsize=8.5)
    figure.savefig(path, format="png", dpi=150)


def _bare(axes: Axes, grid: str) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, alpha=0.25)  # type: ignore[arg-type]
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=9)

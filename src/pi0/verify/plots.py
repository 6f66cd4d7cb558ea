"""Figures of a verification: errors beside their limits, through stages, blocks and steps.

The figures name no case: `case_styles` is for a legend beside them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pi0.figures import RED, new_figure
from pi0.verify.error_axis import (
    METRICS,
    annotate_worst,
    case_styles,
    draw_lines,
    draw_marks,
    error_axis,
    finish_axes,
    line_legend,
    offset,
)
from pi0.verify.rows import Row
from pi0.verify.thresholds import BLOCK

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STEP = re.compile(r"(oracle\.)?velocity\.(\d+)")
SHOWN_BLOCKS = (None, "keys", "values")  # of a block: its output, keys and values


def plot_stages(rows: Sequence[Row]) -> Figure:
    """The errors of everything that is neither one of many blocks nor a velocity in the loop; an
    error that has no limit is not drawn."""
    styles = case_styles(rows)
    elsewhere = {id(row) for row in block_rows(rows)}
    rows = [row for row in rows if not STEP.fullmatch(row.name) and id(row) not in elsewhere]
    names = list(dict.fromkeys(row.name for row in rows))
    figure = new_figure(max(6.0, 1.6 + 0.66 * len(names)), 7.6)
    panels = figure.subplots(len(METRICS), 1, sharex=True)
    for axes, metric in zip(panels, METRICS, strict=True):
        limited = [row for row in rows if math.isfinite(metric.limit(row))]
        axis = error_axis(limited, metric)
        for place, name in enumerate(names):
            here = [row for row in limited if row.name == name]
            for limit in {metric.limit(row) for row in here}:
                axes.hlines(axis.place(limit), place - 0.42, place + 0.42, color=RED, linewidth=1.3)
            annotate_worst(axes, axis, metric, place, here)
        for i, (case, style) in enumerate(styles.items()):
            shift = offset(i, len(styles))
            points = [(names.index(r.name) + shift, r) for r in limited if r.case == case]
            draw_marks(axes, axis, metric, points, style)
        finish_axes(axes, axis, metric)
        axes.set_xlim(-0.6, len(names) - 0.4)
    panels[-1].set_xticks(range(len(names)), names, rotation=35, ha="right", fontsize=8)
    return figure


def block_rows(rows: Sequence[Row]) -> list[Row]:
    """Rows of blocks, of the stages that have more than one of them."""
    found = [
        (row, match)
        for row in rows
        if (match := BLOCK.fullmatch(row.name)) and match[3] in SHOWN_BLOCKS
    ]
    blocks = {(match[1], match[2]) for _, match in found}
    many = {stage for stage, _ in blocks if sum(stage == other for other, _ in blocks) > 1}
    return [row for row, match in found if match[1] in many]


def plot_blocks(rows: Sequence[Row]) -> Figure | None:
    """The errors through the depth of each tower, and of keys and values; None without blocks."""
    styles, rows = case_styles(rows), block_rows(rows)
    if not rows:
        return None
    towers = list(dict.fromkeys(row.name.partition(".")[0] for row in rows))
    figure = new_figure(max(6.0, 3.2 * len(towers)), 7)
    panels = figure.subplots(len(METRICS), len(towers), sharey="row", sharex="col", squeeze=False)
    for line, metric in zip(panels, METRICS, strict=True):
        axis = error_axis(rows, metric)
        for tower, axes in zip(towers, line, strict=True):
            mine = [row for row in rows if row.name.startswith(f"{tower}.")]
            for part, dashes in ((None, "-"), ("keys", "--"), ("values", ":")):
                of_part = [row for row in mine if _block(row)[2] == part]
                label = part or "output of the block"
                draw_lines(
                    axes, axis, metric, of_part, lambda row: _block(row)[1], styles, dashes, label
                )
            annotate_worst(axes, axis, metric, None, mine, lambda row: _block(row)[1])
            finish_axes(axes, axis, metric)
            axes.label_outer()
    for axes, tower in zip(panels[0], towers, strict=True):
        axes.set_title(tower, fontsize=10)
    for axes in panels[-1]:
        axes.set_xlabel("block", fontsize=9)
    line_legend(figure, panels[0][-1])
    return figure


def plot_velocities(rows: Sequence[Row]) -> Figure | None:
    """The errors of the velocity in each step of the loop, of the candidate and of the oracle; None
    without steps."""
    styles = case_styles(rows)
    found = [(row, match) for row in rows if (match := STEP.fullmatch(row.name))]
    rows = [row for row, _ in found]
    if not rows:
        return None
    figure = new_figure(10, 3.2)
    panels = figure.subplots(1, len(METRICS))
    for axes, metric in zip(panels, METRICS, strict=True):
        axis = error_axis(rows, metric)
        for oracle, dashes, label in (
            (False, "-", "candidate against reference"),
            (True, "--", "oracle against reference"),
        ):
            mine = [row for row, match in found if bool(match[1]) == oracle]
            draw_lines(axes, axis, metric, mine, _step, styles, dashes, label)
        annotate_worst(axes, axis, metric, None, rows, _step)
        finish_axes(axes, axis, metric)
        axes.set_xlabel("denoising step", fontsize=9)
    line_legend(figure, panels[0])
    return figure


def _block(row: Row) -> tuple[str, int, str | None]:
    match = BLOCK.fullmatch(row.name)
    assert match is not None  # only rows of blocks are asked
    return match[1], int(match[2]), match[3]


def _step(row: Row) -> int:
    return int(row.name.rpartition(".")[2])

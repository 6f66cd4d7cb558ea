"""Figures of a verification: errors beside their limits, and where the actions differ.

Cases differ in colour, marker and place; what is beyond its limit is red and has both numbers. An
error of 0 and a comparison without a number (NaN, a constant) have rows of their own below and
above the logarithmic axis, so that they neither stretch it nor look like errors. The figures name
no case: `case_styles` is for a legend beside them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pi0.figures import INK, MUTED, RED, SERIES, bare, new_figure
from pi0.verify.run import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from torch import Tensor

    Actions = dict[str, tuple[Tensor, Tensor]]  # by case: reference and candidate, [B, H, D]

MARKERS = ("o", "s", "D", "^", "v", "P")
JOINTS_SHOWN = 8
NO_NUMBER = "no number"
BLOCK = re.compile(r"(\w+)\.block\.(\d+)(?:\.(\w+))?")  # stage, block, and keys or values of it
STEP = re.compile(r"(oracle\.)?velocity\.(\d+)")


@dataclass(frozen=True)
class Style:
    colour: str
    marker: str


@dataclass(frozen=True)
class Metric:
    """A measure of error that has a limit: what both are, and how both are written.

    `rounding`: errors up to it are drawn as 0.
    """

    label: str
    rounding: float
    error: Callable[[Row], float]
    limit: Callable[[Row], float]
    exceeded: Callable[[Row], bool]
    numbers: Callable[[Row], str]


REL_L2 = Metric(
    "relative L2 error",
    0.0,  # a single bit counts
    error=lambda row: row.comparison.rel_l2,
    limit=lambda row: row.limit.max_rel_l2,
    exceeded=lambda row: not row.comparison.rel_l2 <= row.limit.max_rel_l2,
    numbers=lambda row: f"{row.comparison.rel_l2:.1e}\n> {row.limit.max_rel_l2:.0e}",
)
PCC = Metric(
    "1 − PCC",
    1e-9,  # far below every limit; PCC of equal tensors is not exactly 1
    error=lambda row: 1 - row.comparison.pcc,
    limit=lambda row: 1 - row.limit.min_pcc,
    exceeded=lambda row: not row.comparison.pcc >= row.limit.min_pcc,
    numbers=lambda row: f"{row.comparison.pcc:.6f}\n< {row.limit.min_pcc:g}",
)
METRICS = (REL_L2, PCC)


@dataclass(frozen=True)
class ErrorAxis:
    """A logarithmic y axis from `low` to `high`, with a row for 0 below and one for what has no
    number above, where they are needed."""

    rounding: float
    low: float
    high: float
    has_zero: bool
    has_fault: bool

    @classmethod
    def of(cls, values: Sequence[float], rounding: float = 0.0) -> ErrorAxis:
        shown = [value for value in values if math.isfinite(value) and value > rounding]
        low = 10.0 ** math.floor(math.log10(min(shown, default=1e-6)))
        high = 10.0 ** math.ceil(math.log10(max(shown, default=1e-6)) + 0.4)
        zero = any(value <= rounding for value in values)
        return cls(rounding, low, high, zero, not all(map(math.isfinite, values)))

    def place(self, value: float) -> float:
        """Where a value is drawn."""
        step = 1.5 * math.exp(0.12 * math.log(self.high / self.low))
        if not math.isfinite(value):
            return self.high * step
        return value if value > self.rounding else self.low / step

    def apply(self, axes: Axes) -> None:
        """Scale, ticks, and a line where the axis is broken."""
        axes.set_yscale("log")
        bottom, top = (self.place(0.0) if self.has_zero else self.low), self.high
        top = self.place(math.nan) if self.has_fault else top
        margin = (top / bottom) ** 0.06
        axes.set_ylim(bottom / margin, top * margin)
        decades = range(round(math.log10(self.low)), round(math.log10(self.high)) + 1)
        ticks = [10.0**n for n in decades[:: -(-len(decades) // 7)]]
        labels = [f"{tick:.0e}" for tick in ticks]
        for wanted, value, label in (
            (self.has_zero, 0.0, "0"),
            (self.has_fault, math.nan, NO_NUMBER),
        ):
            if wanted:
                place = self.place(value)
                ticks.append(place)
                labels.append(label)
                axes.axhline(
                    math.sqrt(place * (self.high if place > self.high else self.low)),
                    color=MUTED, linewidth=0.8, linestyle=(0, (1, 3)),
                )  # fmt: skip
        axes.set_yticks(ticks, labels)
        axes.minorticks_off()


def case_styles(rows: Sequence[Row]) -> dict[str, Style]:
    """Colour and marker of each case."""
    cases = dict.fromkeys(row.case for row in rows)
    n = len(MARKERS)
    return {
        case: Style(SERIES[(i + i // n) % len(SERIES)], MARKERS[i % n])
        for i, case in enumerate(cases)
    }


def plot_stages(rows: Sequence[Row]) -> Figure:
    """Both errors of everything that is neither one of many blocks nor a velocity in the loop."""
    styles = case_styles(rows)
    elsewhere = {id(row) for row in block_rows(rows)}
    rows = [row for row in rows if not STEP.fullmatch(row.name) and id(row) not in elsewhere]
    names = list(dict.fromkeys(row.name for row in rows))
    figure = new_figure(max(6.0, 1.6 + 0.66 * len(names)), 5.6)
    panels = figure.subplots(2, 1, sharex=True)
    for axes, metric in zip(panels, METRICS, strict=True):
        axis = _axis(rows, metric)
        for place, name in enumerate(names):
            here = [row for row in rows if row.name == name]
            for limit in {metric.limit(row) for row in here}:
                axes.hlines(axis.place(limit), place - 0.42, place + 0.42, color=RED, linewidth=1.3)
            _annotate_worst(axes, axis, metric, place, here)
        for i, (case, style) in enumerate(styles.items()):
            shift = _offset(i, len(styles))
            points = [(names.index(r.name) + shift, r) for r in rows if r.case == case]
            _mark(axes, axis, metric, points, style)
        _finish(axes, axis, metric)
        axes.set_xlim(-0.6, len(names) - 0.4)
    panels[-1].set_xticks(range(len(names)), names, rotation=35, ha="right", fontsize=8)
    return figure


def block_rows(rows: Sequence[Row]) -> list[Row]:
    """Rows of blocks, of the stages that have more than one of them."""
    found = [(row, match) for row in rows if (match := BLOCK.fullmatch(row.name))]
    blocks = {(match[1], match[2]) for _, match in found}
    many = {stage for stage, _ in blocks if sum(stage == other for other, _ in blocks) > 1}
    return [row for row, match in found if match[1] in many]


def plot_blocks(rows: Sequence[Row]) -> Figure | None:
    """Both errors through the depth of each tower, and of keys and values; None without blocks."""
    styles, rows = case_styles(rows), block_rows(rows)
    if not rows:
        return None
    towers = list(dict.fromkeys(row.name.partition(".")[0] for row in rows))
    figure = new_figure(max(6.0, 3.2 * len(towers)), 5)
    panels = figure.subplots(2, len(towers), sharey="row", sharex="col", squeeze=False)
    for line, metric in zip(panels, METRICS, strict=True):
        axis = _axis(rows, metric)
        for tower, axes in zip(towers, line, strict=True):
            mine = [row for row in rows if row.name.startswith(f"{tower}.")]
            for part, dashes in ((None, "-"), ("keys", "--"), ("values", ":")):
                of_part = [row for row in mine if _block(row)[2] == part]
                label = part or "output of the block"
                _lines(
                    axes, axis, metric, of_part, lambda row: _block(row)[1], styles, dashes, label
                )
            _annotate_worst(axes, axis, metric, None, mine, lambda row: _block(row)[1])
            _finish(axes, axis, metric)
            axes.label_outer()
    for axes, tower in zip(panels[0], towers, strict=True):
        axes.set_title(tower, fontsize=10)
    for axes in panels[-1]:
        axes.set_xlabel("block", fontsize=9)
    _line_legend(figure, panels[0][-1])
    return figure


def plot_velocities(rows: Sequence[Row]) -> Figure:
    """Both errors of the velocity in each step of the loop, of the candidate and of the oracle."""
    styles = case_styles(rows)
    found = [(row, match) for row in rows if (match := STEP.fullmatch(row.name))]
    rows = [row for row, _ in found]
    figure = new_figure(9, 3.2)
    panels = figure.subplots(1, 2)
    for axes, metric in zip(panels, METRICS, strict=True):
        axis = _axis(rows, metric)
        for oracle, dashes, label in (
            (False, "-", "candidate against reference"),
            (True, "--", "oracle against reference"),
        ):
            mine = [row for row, match in found if bool(match[1]) == oracle]
            _lines(axes, axis, metric, mine, _step, styles, dashes, label)
        _annotate_worst(axes, axis, metric, None, rows, _step)
        _finish(axes, axis, metric)
        axes.set_xlabel("denoising step", fontsize=9)
    _line_legend(figure, panels[0])
    return figure


def plot_differences(actions: Actions, styles: dict[str, Style]) -> Figure:
    """Candidate minus reference over the chunk, of the actions that deviate most in any case."""
    differences = {case: (b - a).double() for case, (a, b) in actions.items()}
    sizes = [
        d.abs().amax(dim=(0, 1)).nan_to_num(nan=math.inf).tolist() for d in differences.values()
    ]
    worst = [max(of_joint) for of_joint in zip(*sizes, strict=True)]
    joints = sorted(sorted(range(len(worst)), key=lambda j: -worst[j])[:JOINTS_SHOWN])
    columns = min(4, len(joints))
    figure = new_figure(max(5.0, 2.4 * columns), 2.1 * -(-len(joints) // columns) + 0.3)
    panels = figure.subplots(
        -(-len(joints) // columns), columns, sharey=True, sharex=True, squeeze=False
    )
    largest = max(
        (float(d[d.isfinite()].abs().max()) for d in differences.values() if d.isfinite().any()),
        default=0.0,
    )
    for place, axes in enumerate(panels.flat):
        if place >= len(joints):
            axes.set_visible(False)
            continue
        for case, difference in differences.items():
            values = difference[:, :, joints[place]].T.numpy()
            axes.plot(values, color=styles[case].colour, linewidth=1.2)
            if not difference[:, :, joints[place]].isfinite().all():
                axes.set_title(NO_NUMBER, loc="right", fontsize=8, color=RED)
        axes.axhline(0, color=MUTED, linewidth=0.6)
        axes.set_title(f"action {joints[place]}", loc="left", fontsize=9)
        axes.set_ylim(-1.1 * (largest or 1.0), 1.1 * (largest or 1.0))
        axes.set_xlim(-0.5, difference.shape[1] - 0.5)
        bare(axes)
        if place >= len(joints) - columns:
            axes.set_xlabel("action of the chunk", fontsize=8)
            axes.tick_params(labelbottom=True)
    figure.supylabel("candidate − reference", fontsize=9)
    return figure


def plot_largest_deviations(actions: Actions, styles: dict[str, Style]) -> Figure:
    """Bars side by side: the largest deviation of each action, by case; a cross for no number."""
    figure = new_figure(9, 2.4)
    axes = figure.subplots()
    width = 0.8 / len(actions)
    for i, (case, (a, b)) in enumerate(actions.items()):
        deviations = (a - b).abs().amax(dim=(0, 1)).tolist()
        places = [joint + (i + 0.5) * width - 0.4 for joint in range(len(deviations))]
        heights = [value if math.isfinite(value) else 0.0 for value in deviations]
        axes.bar(places, heights, width, color=styles[case].colour)
        lost = [x for x, value in zip(places, deviations, strict=True) if not math.isfinite(value)]
        axes.plot(lost, [0.0] * len(lost), "X", color=RED, clip_on=False)
    axes.set_xlabel("action", fontsize=9)
    axes.set_ylabel("largest deviation", fontsize=9)
    axes.set_ylim(bottom=0)
    axes.margins(x=0.01)
    bare(axes, "y")
    return figure


def _axis(rows: Sequence[Row], metric: Metric) -> ErrorAxis:
    values = [value for row in rows for value in (metric.error(row), metric.limit(row))]
    return ErrorAxis.of(values, metric.rounding)


def _offset(index: int, count: int) -> float:
    """How far a case is drawn beside the middle."""
    return 0.5 * ((index + 0.5) / count - 0.5)


def _mark(
    axes: Axes,
    axis: ErrorAxis,
    metric: Metric,
    points: Sequence[tuple[float, Row]],
    style: Style,
    size: float = 5,
) -> None:
    """Marks of one case at (x, row): red beyond the limit, a cross for no number."""
    kinds = {(metric.exceeded(row), math.isfinite(metric.error(row))) for _, row in points}
    for failed, finite in sorted(kinds):
        mine = [
            (x, axis.place(metric.error(row)))
            for x, row in points
            if (metric.exceeded(row), math.isfinite(metric.error(row))) == (failed, finite)
        ]
        axes.plot(
            *zip(*mine, strict=True),
            style.marker if finite else "X",
            color=RED if failed else style.colour,
            markeredgecolor=INK if failed else style.colour,
            markersize=size + failed,
            linestyle="none",
            zorder=3,
        )


def _lines(
    axes: Axes,
    axis: ErrorAxis,
    metric: Metric,
    rows: Sequence[Row],
    x: Callable[[Row], int],
    styles: dict[str, Style],
    dashes: str,
    label: str,
) -> None:
    """A line for each case, its marks, and the limits."""
    from matplotlib.ticker import MaxNLocator

    for i, (case, style) in enumerate(styles.items()):
        mine = sorted((row for row in rows if row.case == case), key=x)
        shift = 0.3 * _offset(i, len(styles))
        places = [x(row) + shift for row in mine]
        errors = [axis.place(metric.error(row)) for row in mine]
        axes.plot(places, errors, dashes, color=style.colour, linewidth=1.1, alpha=0.7)
        _mark(axes, axis, metric, list(zip(places, mine, strict=True)), style, 3.5)
    if rows:
        ends = sorted({x(row) for row in rows})
        for limit in {metric.limit(row) for row in rows}:
            y = axis.place(limit)
            axes.hlines(
                y, ends[0] - 0.4, ends[-1] + 0.4, color=RED, linewidth=1.2, linestyle=dashes
            )
        axes.plot([], [], dashes, color=INK, linewidth=1.1, label=label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _annotate_worst(
    axes: Axes,
    axis: ErrorAxis,
    metric: Metric,
    place: float | None,
    rows: Sequence[Row],
    x: Callable[[Row], float] = lambda row: 0.0,
) -> None:
    """Error and limit of the worst of these rows that failed, at a place or at its own."""
    failed = [row for row in rows if metric.exceeded(row)]
    numbers = [row for row in failed if math.isfinite(metric.error(row))]
    if not failed or not numbers:
        return
    worst = max(numbers, key=metric.error)
    axes.annotate(
        metric.numbers(worst),
        (x(worst) if place is None else place, axis.place(metric.error(worst))),
        (0, 6),
        textcoords="offset points",
        ha="center",
        va="bottom",
        fontsize=7,
        color=RED,
        zorder=4,
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.5},
    )


def _finish(axes: Axes, axis: ErrorAxis, metric: Metric) -> None:
    axis.apply(axes)
    axes.set_ylabel(metric.label, fontsize=9)
    bare(axes)


def _line_legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    limit: Any = axes.plot([], [], "-", color=RED, linewidth=1.2)[0]
    figure.legend(
        [*handles, limit], [*labels, "limit"],
        loc="outside lower center", ncols=4, frameon=False, fontsize=8,
    )  # fmt: skip


def _block(row: Row) -> tuple[str, int, str | None]:
    match = BLOCK.fullmatch(row.name)
    assert match is not None  # only rows of blocks are asked
    return match[1], int(match[2]), match[3]


def _step(row: Row) -> int:
    return int(row.name.rpartition(".")[2])
